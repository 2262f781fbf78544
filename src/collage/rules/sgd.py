"""Stochastic gradient descent: plain, with momentum (Polyak 1964), with Nesterov's (Sutskever et al. 2013)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.accumulators import Accumulator
from collage.rules.folding import Rounding
from collage.rules.rule import Advance, Rule, Setting, Slot


class Plain(NamedTuple):
    lr: Any
    w: Any  # weight_decay, an L2 penalty


class Constants(NamedTuple):
    momentum: tuple[Any, ...]
    gain: Any  # 1 - dampening; 1 at the first step, as in torch
    lr: Any
    w: Any  # weight_decay, an L2 penalty


def plain(slots: tuple[Accumulator, ...], g: Tensor, c: Plain) -> Advance:
    (theta,) = slots
    delta = -(c.lr * (g + c.w * theta.value))
    return Advance((theta.grown(delta),), delta)


def heavy_ball(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    theta, b = slots
    b = b.scaled(c.momentum).grown(c.gain * (g + c.w * theta.value))
    delta = -(c.lr * b.value)
    return Advance((theta.grown(delta), b), delta)


def nesterov(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    theta, b = slots
    d = g + c.w * theta.value
    b = b.scaled(c.momentum).grown(c.gain * d)
    delta = -(c.lr * (d + b.scaled(c.momentum).value))
    return Advance((theta.grown(delta), b), delta)


def fold_plain(lr: float, hyper: Sequence[float], step: int, dtype: torch.dtype) -> Plain:
    to = Rounding(dtype)
    return Plain(to.number(lr, "lr"), to.number(hyper[0], "weight_decay"))


def fold(lr: float, hyper: Sequence[float], step: int, dtype: torch.dtype) -> Constants:
    """torch takes the first gradient whole, whatever the dampening."""
    momentum, dampening, weight_decay = hyper
    to = Rounding(dtype)
    gain = 1.0 if step == 1 else 1.0 - dampening
    return Constants(
        to.expansion(momentum, "momentum"), to.number(gain, "dampening"), to.number(lr, "lr"),
        to.number(weight_decay, "weight_decay"),
    )  # fmt: skip


def of_torch(group: Mapping[str, Any], keys: set[str]) -> str:
    """Why a group of one of torch's optimizers is not SGD's; "" if it is."""
    return "" if {"momentum", "dampening", "nesterov"} <= set(group) else "it has no settings dampening and nesterov"


THETA, BUFFER = Slot("param", "param"), Slot("momentum_buffer", "momentum")
DECAY = Setting("weight_decay")
SETTINGS = (Setting("momentum"), Setting("dampening"), DECAY)
SGD = Rule("sgd", (THETA,), (DECAY,), plain, fold_plain, 2, title="torch.optim.SGD", torch=of_torch, torch_counts=False)
SGD_MOMENTUM = Rule(
    "sgd_momentum",
    (THETA, BUFFER),
    SETTINGS,
    heavy_ball,
    fold,
    5,
    title="torch.optim.SGD",
    torch=of_torch,
    torch_counts=False,
)
SGD_NESTEROV = Rule(
    "sgd_nesterov",
    (THETA, BUFFER),
    SETTINGS,
    nesterov,
    fold,
    5,
    title="torch.optim.SGD",
    torch=of_torch,
    torch_counts=False,
)
