"""Numbers that survive small increments.

theta, m, v, weight averages and accumulated gradients are all a number that must survive many small increments. Each
class here is one way to hold such a number in registers between load and store, with the same three verbs:

    value           what an update rule reads
    scaled(beta)    the number times a constant
    grown(delta)    the number plus an increment

Nothing is changed in place: every verb returns a new number. `parts` is what a format stores: the visible component,
and what is left for the others (still in a register; the format rounds it).

Registers are float32 tensors in float32 arithmetic and bfloat16 tensors in bfloat16 arithmetic, where torch rounds
every single ``+ - * /`` and ``sqrt`` to bfloat16. A constant is an expansion in the arithmetic's dtype: one component
in float32, (hi, lo) in bfloat16, where beta2 = 0.999 would otherwise be 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from collage import mcf


class Accumulator(Protocol):
    """The three verbs, and the parts a format stores."""

    @property
    def value(self) -> Tensor: ...

    def scaled(self, beta: mcf.Expansion) -> Accumulator: ...

    def grown(self, delta: Tensor) -> Accumulator: ...

    def parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(visible component, representable in dtype; the rest, unrounded)."""
        ...


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
    """hi + lo in float32 arithmetic. Grows lo first: in one float32 sum the last component would see nothing."""

    hi: Tensor
    lo: Tensor
    dtype: torch.dtype  # of the stored components

    @property
    def value(self) -> Tensor:
        return self.lo + self.hi

    def scaled(self, beta: mcf.Expansion) -> Register:
        return Register(self.value).scaled(beta)

    def grown(self, delta: Tensor) -> Expanded:
        r = self.lo + delta
        h = mcf.rn(self.hi + r, self.dtype).float()
        return Expanded(h, (self.hi - h) + r, self.dtype)

    def parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.hi, self.lo


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
