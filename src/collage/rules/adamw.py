"""AdamW (Loshchilov, Hutter 2019) as in Collage's Algorithm 2, with the paper's compact weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage import mcf
from collage.accumulators import Accumulator, raised
from collage.rules.folding import Rounding, power
from collage.rules.rule import Advance, Rule, Setting, Slot


class Constants(NamedTuple):
    """Floats as `fold` returns them. beta1 and beta2 are expansions: one component in float32, (hi, lo) in bfloat16."""

    beta1: tuple[Any, ...]
    one_minus_beta1: Any
    beta2: tuple[Any, ...]
    one_minus_beta2: Any
    a: Any  # lr * s / (1 - beta1**t), with s = sqrt(1 - beta2**t)
    e: Any  # eps * s
    w: Any  # lr * weight_decay


def update(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    """One step of Algorithm 2. Decay is part of the one increment, so that it is compensated with it.

    m and v enter the update as registers, before a format rounds them; theta as its value.
    """
    theta, m, v, *top = slots
    m = m.scaled(c.beta1).grown(c.one_minus_beta1 * g)  # first moment
    v = v.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g))  # second moment
    top = [raised(x, v) for x in top]  # AMSGrad: the largest so far
    root = mcf.sqrt((*top, v)[0].value)
    delta = -((c.a * m.value) / (root + c.e) + c.w * theta.value)  # bias corrections are folded into a, e
    return Advance((theta.grown(delta), m, v, *top), delta)


def fold(lr: float, hyper: Sequence[float], step: int, dtype: torch.dtype) -> Constants:
    """The constants of step t, from 1. With them Adam's bias corrections cost no operation per element:

    lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)  ==  a * m / (sqrt(v) + e)
    """
    beta1, beta2, eps, weight_decay = hyper
    s = math.sqrt(1.0 - power(beta2, step))
    a = lr * s / (1.0 - power(beta1, step))
    to = Rounding(dtype)
    to.number(lr * s, "lr", lr)  # s grows, and a is no less: where this is not 0 at the first step no later a is
    return Constants(
        to.expansion(beta1, "betas"), to.number(1.0 - beta1, "betas"),
        to.expansion(beta2, "betas"), to.number(1.0 - beta2, "betas"),
        to.number(a, "lr", lr), to.number(eps * s, "eps", eps),
        to.number(lr * weight_decay, "weight_decay", lr and weight_decay),
    )  # fmt: skip


def of_torch(group: Mapping[str, Any], keys: set[str], decoupled: bool, amsgrad: bool) -> str:
    """Why a group of one of torch's optimizers is not Adam's or AdamW's; "" if it is."""
    # Only Adam and AdamW have "amsgrad"; older releases of torch do not say which of the two it was
    theirs = group.get("decoupled_weight_decay", decoupled)
    has = bool(group.get("amsgrad")) or "max_exp_avg_sq" in keys
    reasons = {
        f"it has amsgrad={has}, and this optimizer amsgrad={amsgrad}": has != amsgrad,
        "it has the setting momentum_decay, as NAdam": "momentum_decay" in group,
        "it has no setting amsgrad, as RAdam and others": "amsgrad" not in group,
        f"it is Adam's with weight_decay={group.get('weight_decay')}, which is in its moments; here decay is "
        "decoupled": decoupled and not theirs and bool(group.get("weight_decay")),
        f"it is AdamW's with weight_decay={group.get('weight_decay')}, which is decoupled; here decay is in the "
        "moments": not decoupled and theirs and bool(group.get("weight_decay")),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


MOMENTS = (Slot("param", "param"), Slot("exp_avg", "momentum"), Slot("exp_avg_sq", "variance"))
LARGEST = Slot("max_exp_avg_sq", "variance")
SETTINGS = (Setting("betas", below=1.0, numbers=2), Setting("eps"), Setting("weight_decay"))
ADAMW = Rule(
    "adamw",
    MOMENTS,
    SETTINGS,
    update,
    fold,
    9,
    title="torch.optim.AdamW",
    torch=lambda group, keys: of_torch(group, keys, True, False),
)
ADAMW_AMSGRAD = Rule(
    "adamw_amsgrad", (*MOMENTS, LARGEST), SETTINGS, update, fold, 9, title="torch.optim.AdamW",
    torch=lambda group, keys: of_torch(group, keys, True, True),
)  # fmt: skip
