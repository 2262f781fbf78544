"""What a rehearsal means: "safe", "loses" or "unknown", and why. The thresholds are measured: docs/advise.md."""

from __future__ import annotations

import math
from typing import NamedTuple

from collage.advice.rehearsal import Rehearsed, Settings
from collage.advised.words import LOSES, OVER, PART, SAFE, STUCK, UNKNOWN, WHOLE, arrive
from collage.numerals import percent

# Where the error is larger than SCATTERED, some weights lack all of their movement; otherwise all lack a bit of it,
# which acts as a slightly smaller lr: 0.02 to 0.09 nats went with 4 to 5 % of it.
SCATTERED, SCATTERED_PART = 0.1, 0.96
NOTHING = 2e-4  # of the weights: what lacks no more than that is too little to be seen
# Norms and biases that stay while float32 moves them by STILL of their size. In training from scratch 0.02 nats and
# more went with it where matrices lost a little, too; in fine-tuning nothing.
STAYED, STILL, NEARLY_WHOLE = 0.5, 0.005, 0.985
NOISY = 0.15  # of the weights: rounding noise of matrices that go where they should on average
SOON_STUCK = 1.1  # second moment over float32's, of a run that is longer than the rehearsal
DECAYED, DECAY_PART = 0.01, 0.75  # of the weights: a decay that can be seen; and how much of it has to arrive
HASTY = 0.04  # lr over the size of a weight: from here on runs that differ in nothing but noise end apart


class Verdict(NamedTuple):
    """SAFE, LOSES or UNKNOWN, and why in a few words."""

    word: str
    why: str


def judged(seen: Rehearsed, settings: Settings) -> Verdict:
    """What a strategy's rehearsal says of a run."""
    if not all(map(math.isfinite, (seen.main.arrived, seen.main.off, seen.v_ratio))):
        return Verdict(UNKNOWN, "float32 itself does not move these weights, or not to finite numbers")
    if seen.main.off == 0:
        return Verdict(SAFE, "float32's own bits")
    lost = _lost(seen)
    if lost and seen.main.noise < NOTHING:
        return Verdict(UNKNOWN, f"{lost}, of next to no movement")
    if lost:
        return Verdict(LOSES, lost)
    doubt = _doubt(seen, settings)
    return Verdict(UNKNOWN, doubt) if doubt else Verdict(SAFE, arrive(seen.main.arrived))


def _lost(seen: Rehearsed) -> str:
    part = SCATTERED_PART if seen.main.off > SCATTERED else PART
    if seen.main.arrived < part:
        return arrive(seen.main.arrived)
    return _stay(seen) if seen.main.arrived < NEARLY_WHOLE else ""


def _doubt(seen: Rehearsed, settings: Settings) -> str:
    main, stuck = seen.main, SOON_STUCK if settings.steps > settings.rehearsed else STUCK
    if main.arrived < WHOLE:
        return arrive(main.arrived)
    if main.arrived > OVER:
        return arrive(main.arrived)
    if main.noise > NOISY:
        return f"rounding noise grows to {percent(main.noise)} of the weights"
    if seen.v_ratio > stuck:
        return f"the second moment sticks {seen.v_ratio:.2f} times too high"
    if seen.decay is not None and settings.decayed > DECAYED and abs(seen.decay - 1) > 1 - DECAY_PART:
        return f"{percent(round(max(seen.decay, 0.0), 3))} of the decay arrives"
    if seen.haste > HASTY:
        return f"steps of {percent(seen.haste)} of a weight: noise alone sets runs apart"
    return _stay(seen)


def _stay(seen: Rehearsed) -> str:
    """What is said of norms and biases that do not move though they should; "": they do."""
    vectors = seen.vectors
    stay = vectors is not None and vectors.arrived < STAYED and vectors.noise > STILL
    return "norms and biases stay where they are" if stay else ""
