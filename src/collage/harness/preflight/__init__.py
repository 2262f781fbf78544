"""`collage preflight`: what a step cannot move in a model's weights, before any training."""
