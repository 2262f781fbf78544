"""`collage plan`: how much memory a training step takes, before there is a machine to run it on."""
