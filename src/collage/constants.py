"""Fold lr, betas, eps, decay and the step number into a rule's constants: once per step, in float64, then rounded."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

PRECISION = {torch.float32: (24, -126), torch.bfloat16: (8, -126)}


def power(base: float, exponent: int) -> float:
    """base**exponent in float64 by square-and-multiply, least significant bit first: the same bits on every device.

    >>> power(0.5, 10)
    0.0009765625
    """
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def rounded(x: float, dtype: torch.dtype) -> float:
    """A float64 rounded once to nearest even in dtype (through float32 to bfloat16 would round twice).

    >>> rounded(0.999, torch.bfloat16)
    1.0
    """
    if x == 0 or not math.isfinite(x):
        return x
    if abs(x) > 2 * torch.finfo(dtype).max:
        return math.copysign(math.inf, x)
    precision, emin = PRECISION[dtype]
    quantum = max(math.frexp(x)[1] - precision, emin - precision + 1)
    y = math.ldexp(round(math.ldexp(abs(x), -quantum)), quantum)
    return math.copysign(y if y <= torch.finfo(dtype).max else math.inf, x)


class Constants(NamedTuple):
    """AdamW's constants: floats as `fold` returns them, 0-d tensors of the arithmetic's dtype as `on` does.

    beta1 and beta2 are expansions: one component in float32, (hi, lo) in bfloat16.
    """

    beta1: tuple[Any, ...]
    one_minus_beta1: Any
    beta2: tuple[Any, ...]
    one_minus_beta2: Any
    a: Any  # lr * s / (1 - beta1**t), with s = sqrt(1 - beta2**t)
    e: Any  # eps * s
    w: Any  # lr * weight_decay

    def on(self, dtype: torch.dtype, device: torch.device) -> Constants:
        """As 0-d tensors, for the reference backend."""

        def tensor(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(tensor, x))
            return torch.tensor(x, dtype=dtype, device=device)

        return Constants(*map(tensor, self))

    def row(self) -> list[float]:
        """As a kernel reads them: every expansion with two components."""
        numbers: list[float] = []
        for x in self:
            numbers += (*x, 0.0)[:2] if isinstance(x, tuple) else (x,)
        return numbers


def fold(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,  # t, from 1
    dtype: torch.dtype,  # the arithmetic's
) -> Constants:
    """The constants of one step. With them Adam's bias corrections cost no operation per element:

    lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)  ==  a * m / (sqrt(v) + e)
    """

    def number(x: float) -> float:
        return rounded(x, dtype)

    def expansion(x: float) -> tuple[float, ...]:
        hi = number(x)
        return (hi,) if dtype == torch.float32 else (hi, number(x - hi))

    beta1, beta2 = betas
    s = math.sqrt(1.0 - power(beta2, step))
    a = lr * s / (1.0 - power(beta1, step))
    return Constants(
        expansion(beta1), number(1.0 - beta1), expansion(beta2), number(1.0 - beta2), number(a), number(eps * s),
        number(lr * weight_decay),
    )  # fmt: skip
