"""`collage results`: the page of what was measured, from records of its runs."""
