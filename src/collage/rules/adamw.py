"""AdamW (Loshchilov, Hutter 2019) as in Collage's Algorithm 2, with the paper's compact weight decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collage import constants, mcf
from collage.accumulators import Accumulator
from collage.constants import Constants
from collage.rules import Advance, Rule


def update(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    """One step of Algorithm 2. Decay is part of the one increment, so that it is compensated with it.

    m and v enter the update as registers, before a format rounds them; theta as its value.
    """
    theta, m, v = slots
    m = m.scaled(c.beta1).grown(c.one_minus_beta1 * g)  # first moment
    v = v.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g))  # second moment
    delta = -((c.a * m.value) / (mcf.sqrt(v.value) + c.e) + c.w * theta.value)  # bias corrections are folded into a, e
    return Advance(delta, (theta.grown(delta), m, v))


def fold(lr: float, hyper: Sequence[float], step: int, dtype: torch.dtype) -> Constants:
    """hyper: beta1, beta2, eps, weight_decay."""
    beta1, beta2, eps, weight_decay = hyper
    return constants.fold(lr, (beta1, beta2), eps, weight_decay, step, dtype)


ADAMW = Rule("adamw", (("param", "param"), ("exp_avg", "momentum"), ("exp_avg_sq", "variance")), update, fold, 9)
