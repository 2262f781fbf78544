"""`collage convert`: a model and its optimizer's state from one strategy, or optimizer, to another."""
