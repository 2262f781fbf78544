"""Planes in memory <-> numbers in registers, and the table of formats.

A format holds one number per element in one or more *planes*: tensors of the parameter's shape and strides. Plane 0 is
the visible one; for theta it is the parameter itself. A format is pure: it decodes planes into an accumulator and
encodes an accumulator into new planes; only a backend writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from collage import mcf
from collage.accumulators import Accumulator, Expanded, Kahan, PaperExpanded, Register

Planes = Sequence[Tensor]
F32, BF16 = torch.float32, torch.bfloat16
PIECE = 1 << 21  # elements


class Format(Protocol):
    """How one number per element lies in memory."""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """dtype of each plane."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What follows the slot's name in the state key of each plane."""
        ...

    @property
    def stochastic(self) -> bool:
        """Whether `encode` takes random bits."""
        ...

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        """The number, in registers of the arithmetic's dtype."""
        ...

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        """New planes. random: 16-bit integers for a stochastic format; without them it rounds to nearest."""
        ...

    def value(self, planes: Planes) -> Tensor:
        """The number the planes stand for, float32. What checkpoints hold."""
        ...

    def components(self, planes: Planes) -> Planes:
        """The planes whose sum is the number, largest first. What EDQ differences."""
        ...

    def broken(self, planes: Planes) -> Tensor:
        """bool per element: planes that no `encode` could have left, because plane 0 was changed alone."""
        ...


def _register(plane: Tensor, arithmetic: torch.dtype) -> Tensor:
    return plane.float() if arithmetic == F32 else plane


def _round(x: Tensor, dtype: torch.dtype, random: Tensor | None) -> Tensor:
    return mcf.rn(x, dtype) if random is None else mcf.sr(x, random)


@dataclass(frozen=True, slots=True)
class Single:
    """One plane: fp32, bf16, fp16."""

    dtype: torch.dtype
    stochastic: bool = False
    suffixes: tuple[str, ...] = ("",)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.dtype,)

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        return Register(_register(planes[0], arithmetic))

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        return (_round(number.value.float(), self.dtype, random),)

    def value(self, planes: Planes) -> Tensor:
        return planes[0].float()

    def components(self, planes: Planes) -> Planes:
        return planes

    def broken(self, planes: Planes) -> Tensor:
        return torch.zeros_like(planes[0], dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class Pair:
    """hi + lo, both of one dtype. hi = RN(x), lo = R(x - hi), and lo = +0 where either is not finite."""

    dtype: torch.dtype
    stochastic: bool = False
    suffixes: tuple[str, ...] = ("", "_lo")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.dtype, self.dtype)

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        if arithmetic == F32:
            return Expanded(planes[0].float(), planes[1].float(), self.dtype)
        return PaperExpanded(planes[0], planes[1])

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        hi, rest = (part.float() for part in number.parts(self.dtype))
        rest = rest.masked_fill(~(hi + rest).isfinite(), 0.0)
        return mcf.rn(hi, self.dtype), _round(rest, self.dtype, random)

    def value(self, planes: Planes) -> Tensor:
        return planes[1].float() + planes[0].float()

    def components(self, planes: Planes) -> Planes:
        return planes

    def broken(self, planes: Planes) -> Tensor:
        return _broken(planes, self.dtype, 0.5, self.stochastic)


def _broken(planes: Planes, dtype: torch.dtype, ulps: float, stochastic: bool) -> Tensor:
    """Where |lo| is more than so many ulps of hi and one step: stochastic rounding of a tail just above may go there.

    To nearest, hi is 0 only for what lo, too, rounds to 0.
    """
    hi, lo = (p.float() for p in planes)
    f = mcf.FLOATS[dtype]
    binade = (hi.view(torch.int32) & 0x7F800000).view(F32)  # 2**exponent
    bound = binade.clamp(min=2.0**f.emin) * (ulps * 2.0 ** (1 - f.precision))
    bound = bound + (bound * 2.0 ** (1 - f.precision)).clamp(min=2.0 ** (f.emin - f.precision + 1))
    alone = ~hi.isfinite() if stochastic else ~hi.isfinite() | (hi == 0)
    return ~torch.where(alone, lo == 0, lo.abs() <= bound)


@dataclass(frozen=True, slots=True)
class Master:
    """bf16 for the forward pass, and the float32 master weight it is a cast of. The number is the master alone."""

    dtypes: tuple[torch.dtype, ...] = (BF16, F32)
    suffixes: tuple[str, ...] = ("", "_master")
    stochastic: bool = False

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        return Register(planes[1])

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        return mcf.rn(number.value, self.dtypes[0]), number.value

    def value(self, planes: Planes) -> Tensor:
        return planes[1].clone()

    def components(self, planes: Planes) -> Planes:
        return planes[1:]

    def broken(self, planes: Planes) -> Tensor:
        hi, cast = planes[0].float(), mcf.rn(planes[1], self.dtypes[0]).float()
        return ~((hi == cast) | (hi.isnan() & cast.isnan()))


@dataclass(frozen=True, slots=True)
class Compensated:
    """bf16 with Kahan's compensation in a second bf16 plane."""

    dtypes: tuple[torch.dtype, ...] = (BF16, BF16)
    suffixes: tuple[str, ...] = ("", "_kahan")
    stochastic: bool = False

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        return Kahan(planes[0], planes[1])

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        return Pair(BF16).encode(number)

    def value(self, planes: Planes) -> Tensor:
        return planes[1].float() + planes[0].float()

    def components(self, planes: Planes) -> Planes:
        return planes

    def broken(self, planes: Planes) -> Tensor:
        return _broken(planes, BF16, 1.0, stochastic=False)  # where |delta| > |theta| it reaches a whole ulp


FORMATS: dict[str, Format] = {
    "fp32": Single(F32),
    "bf16": Single(BF16),
    "fp16": Single(torch.float16),
    "bf16x2": Pair(BF16),
    "bf16+fp32": Master(),
    "bf16+kahan": Compensated(),
    "bf16:sr": Single(BF16, stochastic=True),
    "bf16x2:sr": Pair(BF16, stochastic=True),
}


def format_of(name: str) -> Format:
    """The format of that name. Raises ValueError listing the known ones."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def split(fmt: Format, x: Tensor) -> tuple[Tensor, ...]:
    """Planes that hold float32 ``x`` as well as the format can."""
    return fmt.encode(Register(x))


def pieces(planes: Planes) -> Iterator[Planes]:
    """Views of some million elements each, so that no temporary is as large as a parameter."""
    if all(plane.is_contiguous() for plane in planes):
        planes = [plane.view(-1) for plane in planes]
    rows = max(1, PIECE * len(planes[0]) // max(1, planes[0].numel()))
    return zip(*(torch.split(plane, rows) for plane in planes), strict=True)


def bytes_per_value(fmt: Format) -> int:
    """Bytes of all planes for one element."""
    return sum(dtype.itemsize for dtype in fmt.dtypes)


def fitted(fmt: Format, planes: Planes) -> tuple[tuple[Tensor, ...], Tensor]:
    """(planes that fit plane 0, bool per element: which did not). Pure.

    Others write to plane 0 alone: clamping, pruning, a loaded model. Where that shows (`broken`), the other planes are
    derived from it as it is now; everywhere else they stay.
    """
    broken = fmt.broken(planes)
    fresh = split(fmt, planes[0].float())
    others = (torch.where(broken, new, old) for new, old in zip(fresh[1:], planes[1:], strict=True))
    return (planes[0], *others), broken
