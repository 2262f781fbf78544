"""What runs real training under several precision strategies: models, data, comparison, report, command line."""
