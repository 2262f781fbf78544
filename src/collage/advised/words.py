"""The three verdicts, and the shares that part them, wherever they were measured."""

from __future__ import annotations

from collage.numerals import percent

SAFE, LOSES, UNKNOWN = "safe", "loses", "unknown"

# Shares of float32's movement: in 65 runs nothing was lost with more, and 0.02 nats and up with less.
WHOLE, PART = 0.97, 0.92
OVER = 1.08  # more of it is as strange as less
STUCK = 1.25  # second moment over float32's: from here on it is in doubt what follows


def arrive(share: float) -> str:
    """How much of the updates arrives."""
    return f"{percent(round(max(share, 0.0), 3))} of the updates arrive"
