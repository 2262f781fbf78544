"""Fold settings and the step number into a rule's constants: once per step, in float64, then rounded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch

PRECISION = {torch.float32: (24, -126), torch.bfloat16: (8, -126)}
C = TypeVar("C", bound=NamedTuple)


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


class Rounding(NamedTuple):
    """To the registers of an arithmetic. A number that would become 0 there is an error that names its setting.

    >>> Rounding(torch.float32).number(1e-60, "eps")
    Traceback (most recent call last):
    ValueError: eps: 1e-60 becomes 0 in float32, as if it were not there; use a larger one, or 0
    """

    dtype: torch.dtype

    def number(self, x: float, of: str, asked: float | None = None) -> float:
        """asked: what x is a multiple of and so may be 0 for, where x itself may be too small for float64."""
        y = rounded(x, self.dtype)
        if y == 0 and (x or asked):
            name = str(self.dtype).removeprefix("torch.")
            raise ValueError(f"{of}: {x:.3g} becomes 0 in {name}, as if it were not there; use a larger one, or 0")
        return y

    def expansion(self, x: float, of: str) -> tuple[float, ...]:
        """One component in float32, (hi, lo) in bfloat16."""
        hi = self.number(x, of)
        return (hi,) if self.dtype == torch.float32 else (hi, rounded(x - hi, self.dtype))


def tensors(constants: Iterable[Any], dtype: torch.dtype, device: torch.device) -> Any:
    """The same constants as 0-d tensors of the arithmetic's dtype, for the reference backend."""

    def tensor(x: Any) -> Any:
        return tuple(map(tensor, x)) if isinstance(x, tuple) else torch.tensor(x, dtype=dtype, device=device)

    return type(constants)(*map(tensor, constants))


def row(constants: Iterable[Any]) -> list[float]:
    """As a kernel reads them: every expansion with two components."""
    numbers: list[float] = []
    for x in constants:
        numbers += (*x, 0.0)[:2] if isinstance(x, tuple) else (x,)
    return numbers
