"""The first half of Muon (Jordan et al. 2024), as torch has it: a momentum, and the direction it points to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.accumulators import Accumulator, Register
from collage.rules.folding import Rounding
from collage.rules.rule import Advance, Rule, Setting, Slot


class Constants(NamedTuple):
    momentum: tuple[Any, ...]
    one_minus_momentum: Any


def plain(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    b = slots[0].scaled(c.momentum).grown(c.one_minus_momentum * g)
    return Advance((b, Register(b.value)))


def nesterov(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    b = slots[0].scaled(c.momentum).grown(c.one_minus_momentum * g)
    return Advance((b, Register(c.one_minus_momentum * g + b.scaled(c.momentum).value)))


def fold(lr: float, hyper: Sequence[float], step: int, dtype: torch.dtype) -> Constants:
    to = Rounding(dtype)
    return Constants(to.expansion(hyper[0], "momentum"), to.number(1.0 - hyper[0], "momentum"))


SLOTS = (Slot("momentum_buffer", "momentum"), Slot("direction", "direction", read=False))
SETTINGS = (Setting("momentum", below=1.0),)
MOMENTUM = Rule("momentum", SLOTS, SETTINGS, plain, fold, 3)
MOMENTUM_NESTEROV = Rule("momentum_nesterov", SLOTS, SETTINGS, nesterov, fold, 3)
