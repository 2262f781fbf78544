"""Muon (Jordan et al. 2024): a momentum that is orthogonalised, matrix by matrix, before theta grows by it.

No backend steps by this rule: an optimizer makes its step of `MOMENTUM`, an orthogonalisation and `APPLY`. It says what
the two keep, by which settings, and with which constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.accumulators import Accumulator
from collage.rules import apply, momentum
from collage.rules.rule import Advance, Rule


class Constants(NamedTuple):
    momentum: tuple[Any, ...]
    one_minus_momentum: Any
    lr: Any
    w: Any  # lr * weight_decay


def update(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    raise NotImplementedError("muon: a matrix is orthogonalised as a whole, so its step is no rule of single elements")


def fold(lr: float, hyper: Sequence[float], step: int, dtype: torch.dtype) -> Constants:
    """Those of both halves."""
    first = momentum.fold(lr, hyper[:1], step, dtype)
    return Constants(*first, *apply.fold(lr, hyper[1:], step, dtype))


def of_torch(group: Mapping[str, Any], keys: set[str]) -> str:
    """Why a group of one of torch's optimizers is not Muon's; "" if it is."""
    return "" if {"ns_steps", "ns_coefficients"} <= set(group) else "it has no settings ns_steps and ns_coefficients"


MUON = Rule(
    "muon", (*apply.APPLY.slots, momentum.SLOTS[0]), (*momentum.SETTINGS, *apply.APPLY.settings), update, fold, 5,
    elementwise=False, title="torch.optim.Muon", torch=of_torch, torch_counts=False,
)  # fmt: skip
