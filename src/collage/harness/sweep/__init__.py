"""`collage sweep`: strategies over the values of one setting, and the store of finished runs."""
