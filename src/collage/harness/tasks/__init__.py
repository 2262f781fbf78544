"""What is trained, and on what: recipes, text, masks, weights on disk."""
