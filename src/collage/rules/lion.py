"""Lion (Chen et al. 2023, Algorithm 2): the sign of an interpolated momentum, and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage import mcf
from collage.accumulators import Accumulator
from collage.rules.folding import Rounding
from collage.rules.rule import Advance, Rule, Setting, Slot


class Constants(NamedTuple):
    beta1: tuple[Any, ...]
    one_minus_beta1: Any
    beta2: tuple[Any, ...]
    one_minus_beta2: Any
    lr: Any
    w: Any  # lr * weight_decay


def update(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    theta, m = slots
    u = mcf.sign(m.scaled(c.beta1).grown(c.one_minus_beta1 * g).value)
    delta = -(c.lr * u + c.w * theta.value)
    m = m.scaled(c.beta2).grown(c.one_minus_beta2 * g)
    return Advance((theta.grown(delta), m), delta)


def fold(lr: float, hyper: Sequence[float], step: int, dtype: torch.dtype) -> Constants:
    beta1, beta2, weight_decay = hyper
    to = Rounding(dtype)
    return Constants(
        to.expansion(beta1, "betas"), to.number(1.0 - beta1, "betas"),
        to.expansion(beta2, "betas"), to.number(1.0 - beta2, "betas"),
        to.number(lr, "lr"), to.number(lr * weight_decay, "weight_decay", lr and weight_decay),
    )  # fmt: skip


LION = Rule(
    "lion", (Slot("param", "param"), Slot("exp_avg", "momentum")),
    (Setting("betas", below=1.0, numbers=2), Setting("weight_decay")), update, fold, 8, title="Lion",
)  # fmt: skip
