"""theta grown by an update that is given, as Muon's second half and wrapped optimizers have one, and by decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.accumulators import Accumulator
from collage.rules.folding import Rounding
from collage.rules.rule import Advance, Rule, Setting, Slot


class Constants(NamedTuple):
    lr: Any
    w: Any  # lr * weight_decay


def update(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    """g: the update, to be taken away lr times."""
    (theta,) = slots
    delta = -(c.lr * g + c.w * theta.value)
    return Advance((theta.grown(delta),), delta)


def fold(lr: float, hyper: Sequence[float], step: int, dtype: torch.dtype) -> Constants:
    to = Rounding(dtype)
    return Constants(to.number(lr, "lr"), to.number(lr * hyper[0], "weight_decay", lr and hyper[0]))


APPLY = Rule("apply", (Slot("param", "param"),), (Setting("weight_decay"),), update, fold, 2)
