"""`collage compare`: the same run under several strategies, and what they say together."""
