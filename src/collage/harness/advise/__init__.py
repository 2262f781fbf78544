"""`collage advise`: which precision strategy to take, and why."""
