"""Which precision strategy to take: see `collage.advise`."""
