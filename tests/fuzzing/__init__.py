"""What the fuzzer knows: the world it acts on, what others do to it, and what a user expects of it."""
