"""What `collage.wrap` is made of: another optimizer's step as a function, its states in formats, and its shadow."""
