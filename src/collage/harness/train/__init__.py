"""`collage train`, and every run of `collage compare`."""
