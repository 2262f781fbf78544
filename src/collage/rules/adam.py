"""Adam (Kingma, Ba 2015), with weight decay as an L2 penalty: part of the gradient, and so of the moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collage import mcf
from collage.accumulators import Accumulator, raised
from collage.rules import adamw
from collage.rules.adamw import LARGEST, MOMENTS, SETTINGS, Constants
from collage.rules.folding import Rounding
from collage.rules.rule import Advance, Rule


def update(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    """As AdamW's, of the gradient of the penalised loss; c.w is the weight decay itself."""
    theta, m, v, *top = slots
    g = g + c.w * theta.value
    m = m.scaled(c.beta1).grown(c.one_minus_beta1 * g)
    v = v.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g))
    top = [raised(x, v) for x in top]  # AMSGrad: the largest so far
    delta = -((c.a * m.value) / (mcf.sqrt((*top, v)[0].value) + c.e))
    return Advance((theta.grown(delta), m, v, *top), delta)


def fold(lr: float, hyper: Sequence[float], step: int, dtype: torch.dtype) -> Constants:
    """AdamW's constants but w."""
    beta1, beta2, eps, weight_decay = hyper
    folded = adamw.fold(lr, (beta1, beta2, eps, 0.0), step, dtype)
    return folded._replace(w=Rounding(dtype).number(weight_decay, "weight_decay"))


ADAM = Rule(
    "adam",
    MOMENTS,
    SETTINGS,
    update,
    fold,
    9,
    title="torch.optim.Adam",
    torch=lambda group, keys: adamw.of_torch(group, keys, False, False),
)
ADAM_AMSGRAD = Rule(
    "adam_amsgrad", (*MOMENTS, LARGEST), SETTINGS, update, fold, 9, title="torch.optim.Adam",
    torch=lambda group, keys: adamw.of_torch(group, keys, False, True),
)  # fmt: skip
