"""`collage bench --gradients`: what becomes of gradients between backward and the step, and what that costs."""
