"""What advice is: rows with verdicts, the choice among them, and how they read. Whoever gives it fills the rows."""
