"""Numbers that survive small increments.

theta, m, v, weight averages and accumulated gradients are all a number that must survive many small increments. Each
class here is one way to hold such a number in registers between load and store, with the same three verbs:

    value           what an update rule reads
    scaled(beta)    the number times a constant
    grown(delta)    the number plus an increment

and `raised`, the larger of two numbers, for AMSGrad. Nothing is changed in place: every verb returns a new number.
`parts` is what a format stores: the visible component, and what is left for the others (still in a register; the format
rounds it).

Registers are float32 tensors in float32 arithmetic and bfloat16 tensors in bfloat16 arithmetic, where torch rounds
every single ``+ - * /`` and ``sqrt`` to bfloat16. A constant is an expansion in the arithmetic's dtype: one component
in float32, (hi, lo) in bfloat16, where beta2 = 0.999 would otherwise be 1.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from collage import mcf


class Accumulator(Protocol):
    """The verbs, and the parts a format stores."""

    @property
    def value(self) -> Tensor: ...

    def scaled(self, beta: mcf.Expansion) -> Accumulator: ...

    def grown(self, delta: Tensor) -> Accumulator: ...

    def parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(visible component, representable in dtype; the rest, unrounded)."""
        ...


def total(components: Sequence[Tensor]) -> Tensor:
    """Their sum, the last (smallest) first."""
    return reduce(lambda rest, c: c + rest, reversed(components))


@dataclass(frozen=True, slots=True)
class Register:
    """A single register: every format once it is decoded, and what an expansion becomes when it is scaled."""

    value: Tensor

    def scaled(self, beta: mcf.Expansion) -> Register:
        return Register(self.value * beta[0])

    def grown(self, delta: Tensor) -> Register:
        return Register(self.value + delta)

    def parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        hi = mcf.rn(self.value.float(), dtype).float()
        return hi, self.value - hi


@dataclass(frozen=True, slots=True)
class Expanded:
    """c0 + c1 + ... in float32 arithmetic. Grows the last first: in one float32 sum it would see nothing."""

    components: tuple[Tensor, ...]  # largest first
    dtype: torch.dtype  # of the stored components

    @property
    def value(self) -> Tensor:
        return total(self.components)

    def scaled(self, beta: mcf.Expansion) -> Register:
        return Register(self.value).scaled(beta)

    def grown(self, delta: Tensor) -> Expanded:
        hi, *others = self.components
        r = total([*others, delta])
        h = mcf.rn(hi + r, self.dtype).float()
        return Expanded((h, (hi - h) + r), self.dtype)

    def parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.components[0], total(self.components[1:])


@dataclass(frozen=True, slots=True)
class PaperExpanded:
    """hi + lo in bfloat16 arithmetic, as in the paper: rules read hi; Mul scales; Grow grows, by TwoSum."""

    hi: Tensor
    lo: Tensor

    @property
    def value(self) -> Tensor:
        return self.hi

    def scaled(self, beta: mcf.Expansion) -> PaperExpanded:
        return PaperExpanded(*mcf.mul((self.hi, self.lo), beta))

    def grown(self, delta: Tensor) -> PaperExpanded:
        return PaperExpanded(*mcf.grow((self.hi, self.lo), delta))

    def parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.hi, self.lo


@dataclass(frozen=True, slots=True)
class Kahan:
    """theta and the compensation of its next increment (Kahan 1965), in bfloat16 arithmetic."""

    value: Tensor
    compensation: Tensor

    def scaled(self, beta: mcf.Expansion) -> Kahan:
        return Kahan(self.value * beta[0], self.compensation)

    def grown(self, delta: Tensor) -> Kahan:
        y = delta + self.compensation
        s = self.value + y
        return Kahan(s, (self.value - s) + y)

    def parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.value, self.compensation


def raised(number: Accumulator, other: Accumulator) -> Accumulator:
    """The number, or the other one where that is larger, or NaN. Both of one format and arithmetic."""
    x, y = number.value, other.value
    chosen = (y > x) | y.isnan()
    if isinstance(number, PaperExpanded) and isinstance(other, PaperExpanded):
        return PaperExpanded(torch.where(chosen, y, x), torch.where(chosen, other.lo, number.lo))
    return Register(torch.where(chosen, y, x))
