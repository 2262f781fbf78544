"""Update rules: what an optimizer intends, written once over the three verbs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.accumulators import Accumulator


class Advance(NamedTuple):
    """What a rule returns: the intended update, then every slot's new number, theta first."""

    delta: Tensor
    slots: tuple[Accumulator, ...]


class Rule(NamedTuple):
    """A rule and its slots.

    slots: (state prefix, slot of the strategy) pairs, theta first.
    update: (slots' numbers, gradient, constants) -> Advance.
    fold: (lr, hyper-parameters, step from 1, dtype of the arithmetic) -> constants, as floats.
    constants: how many they are in a kernel's row.
    """

    name: str
    slots: tuple[tuple[str, str], ...]
    update: Callable[[tuple[Accumulator, ...], Tensor, Any], Advance]
    fold: Callable[[float, Sequence[float], int, torch.dtype], Any]
    constants: int
