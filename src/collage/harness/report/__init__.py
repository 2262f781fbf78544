"""What a finished comparison shows: its numbers, its columns, its plots, its page."""
