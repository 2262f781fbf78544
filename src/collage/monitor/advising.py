"""Advice from what a monitor saw: the run's own strategy, and those that it ran beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from collage.advised.advice import Advice
from collage.advised.choosing import chosen
from collage.advised.tuned import Tuned
from collage.advised.words import LOSES, OVER, PART, SAFE, STUCK, UNKNOWN, WHOLE, arrive
from collage.strategies import Strategy

if TYPE_CHECKING:
    from collage.monitor.quality import Quality

WORST_FIRST = (LOSES, UNKNOWN, SAFE)
FEW = 10  # measured steps: with less it is too early to say


def advice_of(
    own: Sequence[str], total: Quality, groups: Sequence[Quality], beside: Mapping[str, Quality], lr: float | None
) -> Advice:
    """A row for what the run has (one strategy, or several in its groups), and one for each beside it."""
    named = " + ".join(own) or "this run"
    rows = [
        _row(named, own, total, groups),
        *(_row(name, [name], seen) for name, seen in beside.items() if name not in own),
    ]
    strategy, why = chosen(rows)
    notes = [f"As seen in {total.steps:,} measured steps of this run; strategies beside it on a sample of its weights."]
    if not beside:
        notes.append("Others were not tried: collage.monitor(opt, strategies=...) runs them beside it.")
    return Advice(strategy, why, rows, notes, _tuned(named, total, lr))


def _row(name: str, strategies: Iterable[str], seen: Quality, parts: Sequence[Quality] = ()) -> dict[str, Any]:
    """parts: what was seen of each group; the worst of them is what is said."""
    word, why = min(map(_judged, parts or (seen,)), key=lambda verdict: WORST_FIRST.index(verdict[0]))
    sizes = [Strategy.parse(strategy).bytes_per_param() for strategy in strategies]
    return {
        "strategy": name, "bytes_per_param": max(sizes, default=None), "gigabytes": None, "fits": None,
        "cannot_move": seen.lost, "arrived": _arrived(seen), "decay_arrives": None, "v_ratio": seen.v_ratio,
        "seconds_per_step": None, "verdict": word, "because": why, "evidence": None,
    }  # fmt: skip


def _arrived(seen: Quality) -> float | None:
    """None: nothing was to arrive, or what was is no finite number."""
    found = seen.edq_ratio if seen.edq_shadow is None else seen.edq_shadow
    return None if found is None or not math.isfinite(found) else found


def _judged(seen: Quality) -> tuple[str, str]:
    arrived = _arrived(seen)
    if seen.steps < FEW:
        return UNKNOWN, f"too early to say: {seen.steps} measured steps"
    if arrived is None:
        return UNKNOWN, "no finite update was measured"
    if arrived < PART:
        return LOSES, arrive(arrived)
    if not WHOLE <= arrived <= OVER:
        return UNKNOWN, arrive(arrived)
    if seen.v_ratio is not None and seen.v_ratio > STUCK:
        return UNKNOWN, f"the second moment sticks {seen.v_ratio:.2f} times too high"
    return SAFE, arrive(arrived)


def _tuned(named: str, total: Quality, lr: float | None) -> Tuned | None:
    """What an lr that was found in this run is worth under a strategy that loses nothing."""
    lossy = total.edq_ratio is not None and 0 < total.edq_ratio < PART
    return Tuned(named, lr, total.edq_ratio, "as the monitor saw") if lossy and lr and total.edq_ratio else None
