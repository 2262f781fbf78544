"""A line of the advice: what one strategy takes, moves and loses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from collage.advice import evidence
from collage.advice.counting import stuck
from collage.advice.memory import moved_bytes, planes_bytes, share, total_bytes
from collage.advice.rehearsal import Rehearsed, Settings
from collage.advice.verdict import judged
from collage.advice.weights import Weights
from collage.rules.adamw import ADAMW
from collage.strategies import Strategy

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """memory: bytes of a rank, if it is limited. bandwidth: bytes per second of its memory."""

    memory: int | None
    ranks: int
    bandwidth: float


def row(
    name: str, strategy: Strategy, looked: Weights, seen: Rehearsed, settings: Settings, machine: Machine
) -> dict[str, Any]:
    whole, own = (total_bytes(ADAMW, strategy, looked.shapes, ranks) for ranks in (1, machine.ranks))
    own += looked.frozen // machine.ranks
    parts = [share(shape, machine.ranks) for shape in looked.shapes]
    moved = moved_bytes(
        strategy, planes_bytes(ADAMW, strategy, looked.shapes, machine.ranks), sum(map(math.prod, parts))
    )
    word, why = judged(seen, settings)
    known = evidence.nearest(name, settings.lr)
    return {
        "strategy": name,
        "bytes_per_param": whole / looked.count,
        "gigabytes": own / GB,
        "fits": None if machine.memory is None else own <= machine.memory,
        "cannot_move": _cannot_move(strategy, looked, settings.lr),
        "arrived": _known(seen.main.arrived),
        "decay_arrives": _known(seen.decay),
        "v_ratio": _known(seen.v_ratio),
        "seconds_per_step": moved / machine.bandwidth,
        "verdict": word,
        "because": why,
        "evidence": None if known is None else str(known),
    }


def _known(x: float | None) -> float | None:
    """None for what is no number: float32 did not move."""
    return None if x is None or not math.isfinite(x) else x


def _cannot_move(strategy: Strategy, looked: Weights, lr: float) -> float:
    """The share of the weights that a step of +lr and one of -lr leave as they are."""
    still = 0.0
    for part in looked.parts:
        flat = part.values.flatten()
        still += part.size / len(flat) * stuck(strategy.param, flat, None, lr, strategy.arithmetic)
    return still / looked.count
