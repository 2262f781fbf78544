"""An exponential moving average of weights: average <- decay * average + (1 - decay) * theta, as one increment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.accumulators import Accumulator
from collage.rules.folding import Rounding
from collage.rules.rule import Advance, Rule, Setting, Slot


class Constants(NamedTuple):
    weight: Any  # 1 - decay


def update(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    """theta, with all that its planes hold, is only looked at."""
    average, theta = slots
    return Advance((average.grown(c.weight * (theta.value - average.value)), theta))


def fold(lr: float, hyper: Sequence[float], step: int, dtype: torch.dtype) -> Constants:
    return Constants(Rounding(dtype).number(1.0 - hyper[0], "decay"))


AVERAGE = Rule(
    "average", (Slot("average", "average"), Slot("param", "param", written=False)), (Setting("decay", below=1.0),),
    update, fold, 1, gradient=False,
)  # fmt: skip
