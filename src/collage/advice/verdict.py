"""What a rehearsal means: "safe", "loses" or "unknown", and why. The thresholds are measured: docs/advise.md."""

from __future__ import annotations

from typing import NamedTuple

from collage.advice.rehearsal import Moved, Rehearsed, Settings
from collage.numerals import percent

SAFE, LOSES, UNKNOWN = "safe", "loses", "unknown"

# Shares of float32's movement. In runs of a small Llama 1.9 % less cost 0.008 nats, and 35 % less 0.15 nats.
WHOLE, PART = 0.97, 0.92
# |movement - float32's| / |weights| of norms and biases: where they stayed, training from scratch lost 0.03 nats.
STAYED, STILL = 0.5, 0.005
NOISY = 0.15  # |movement - float32's| / |weights| of matrices whose movement is right on average
STUCK = 1.25  # second moment over float32's


class Verdict(NamedTuple):
    """SAFE, LOSES or UNKNOWN, and why in a few words."""

    word: str
    why: str


def judged(seen: Rehearsed, settings: Settings) -> Verdict:
    """What a strategy's rehearsal says of a run."""
    main = seen.matrices or seen.vectors
    assert main is not None  # there is a sample
    lost = _lost(main, seen.vectors)
    if lost:
        return Verdict(LOSES, lost)
    doubt = _doubt(main, seen)
    return (
        Verdict(UNKNOWN, doubt) if doubt else Verdict(SAFE, f"{percent(min(main.arrived, 1.0))} of the updates arrive")
    )


def _lost(main: Moved, vectors: Moved | None) -> str:
    if main.arrived < PART:
        return f"{percent(max(main.arrived, 0.0))} of the updates arrive"
    if vectors is not None and vectors.arrived < STAYED and vectors.noise > STILL:
        return f"{percent(max(vectors.arrived, 0.0))} of the updates of norms and biases arrive"
    return ""


def _doubt(main: Moved, seen: Rehearsed) -> str:
    if main.arrived < WHOLE:
        return f"{percent(main.arrived)} of the updates arrive"
    if main.noise > NOISY:
        return f"rounding noise is {percent(main.noise)} of the weights"
    if seen.v_ratio > STUCK:
        return f"the second moment is {seen.v_ratio:.2f} times too large"
    return ""
