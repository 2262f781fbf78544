"""`collage bench --accuracy`: what formats lose, ours and other packages', under one stream of gradients."""
