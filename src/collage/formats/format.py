"""What a format is: planes in memory <-> numbers in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from collage.accumulators import Accumulator, Register
from collage.layout import Plane, Planes


class Format:
    """How one number per element lies in memory. A format says what its planes are, and has these verbs.

    stochastic: whether `encode` takes random bits.
    beside: name of the format of a model's 16-bit weights where this one holds those of its linear layers; "": none.
    shows_edits: whether `broken` sees nearly every change of plane 0 alone.
    twin: name of the format that small parameters take instead, of which this one would save little; "": none.
    """

    planes: tuple[Plane, ...]
    stochastic: bool
    twin: str = ""
    beside: str = ""
    shows_edits: bool = True

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        """The number, in registers of the arithmetic's dtype."""
        raise NotImplementedError

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        """New planes. random: 16-bit integers for a stochastic format; without them it rounds to nearest."""
        raise NotImplementedError

    def value(self, planes: Planes) -> Tensor:
        """The number the planes stand for, float32. What checkpoints hold."""
        raise NotImplementedError

    def components(self, planes: Planes) -> Planes:
        """What EDQ differences: numbers whose sum is the number, largest first."""
        raise NotImplementedError

    def visible(self, planes: Planes) -> Tensor:
        """The number that a forward pass sees."""
        return planes[0]

    def moved(self, old: Planes, new: Planes) -> Tensor:
        """bool per element: whether a step changed it. A NaN is always another."""
        moved = [x != y for plane, x, y in zip(self.planes, old, new, strict=True) if plane.per == 1]
        return torch.stack(moved).any(0)

    def broken(self, planes: Planes) -> Tensor:
        """bool per element: planes that no `encode` could have left, because plane 0 was changed alone."""
        raise NotImplementedError

    def shown(self, planes: Planes) -> tuple[Tensor, ...]:
        """Planes of the number that plane 0 shows alone."""
        return self.encode(Register(planes[0].float()))

    def continued(self, planes: Planes, low: Tensor) -> tuple[Tensor, ...]:
        """Planes whose first stays as it is. low: int16, the 16 bits below it, of a format with a scale per row."""
        raise NotImplementedError

    def spacing(self, planes: Planes) -> Tensor:
        """float64 per element: an ulp, of the digits that the format vouches for; of 0 the smallest."""
        raise NotImplementedError

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """dtype of each plane."""
        return tuple(plane.dtype for plane in self.planes)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What follows the slot's prefix in the state key of each plane."""
        return tuple(plane.suffix for plane in self.planes)

    @property
    def elementwise(self) -> bool:
        """Whether every plane has a word per element."""
        return all(plane.per == 1 for plane in self.planes)


class InRegister(Format):
    """What is one float32 register once it is decoded, in any arithmetic."""

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        return Register(self.value(planes))

    def components(self, planes: Planes) -> Planes:
        return (self.value(planes),)


def ulp(x: Tensor, digits: int, least: float) -> Tensor:
    """float64: what neighbours of so many significant bits are apart at each number, and that at least."""
    size = x.double().abs()
    exponent = torch.frexp(size)[1] - digits
    return torch.where(size > 0, torch.ldexp(torch.ones_like(size), exponent), least).clamp(min=least)
