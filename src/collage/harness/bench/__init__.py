"""`collage bench`: what a step of the optimizer costs."""
