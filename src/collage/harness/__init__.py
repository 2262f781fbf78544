"""The commands: what runs real training under several precision strategies, one room each. `cli` is the door."""
