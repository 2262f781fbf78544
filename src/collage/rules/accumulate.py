"""A sum of gradients over micro-batches, each with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.accumulators import Accumulator
from collage.rules.folding import Rounding
from collage.rules.rule import Advance, Rule, Setting, Slot


class Constants(NamedTuple):
    weight: Any


def update(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    (accumulated,) = slots
    return Advance((accumulated.grown(c.weight * g),))


def fold(lr: float, hyper: Sequence[float], step: int, dtype: torch.dtype) -> Constants:
    return Constants(Rounding(dtype).number(hyper[0], "weight"))


ACCUMULATE = Rule("accumulate", (Slot("accumulated", "accumulated"),), (Setting("weight"),), update, fold, 1)
