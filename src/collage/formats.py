"""Planes in memory <-> numbers in registers, and the table of formats.

A format holds one number per element in one or more *planes*. Plane 0 is the visible one; for theta it is the parameter
itself. Most planes have a word per element, in the parameter's shape and strides; a plane may have one per block of
elements (a scale), and then its format is given whole blocks. A format is pure: it decodes planes into an accumulator
and encodes an accumulator into new planes; only a backend writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collage import mcf
from collage.accumulators import Accumulator, Expanded, Kahan, PaperExpanded, Register, total
from collage.layout import Plane, Planes

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class Format:
    """How one number per element lies in memory. A format says what its planes are, and has these verbs.

    stochastic: whether `encode` takes random bits.
    """

    planes: tuple[Plane, ...]
    stochastic: bool

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

    def broken(self, planes: Planes) -> Tensor:
        """bool per element: planes that no `encode` could have left, because plane 0 was changed alone."""
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


def _register(plane: Tensor, arithmetic: torch.dtype) -> Tensor:
    return plane.float() if arithmetic == F32 else plane


def _round(x: Tensor, dtype: torch.dtype, random: Tensor | None) -> Tensor:
    return mcf.rn(x, dtype) if random is None else mcf.sr(x, random, dtype)


@dataclass(frozen=True)
class Single(Format):
    """One plane: fp32, bf16, fp16."""

    dtype: torch.dtype
    stochastic: bool = False

    @property
    def planes(self) -> tuple[Plane, ...]:  # type: ignore[override]
        return (Plane("", self.dtype),)

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


@dataclass(frozen=True)
class Expansion(Format):
    """n components of one dtype. c0 = RN(x), c1 = RN(x - c0), ..., and all but c0 are +0 where x or c0 is not finite.

    The last is rounded to nearest or stochastically.
    """

    dtype: torch.dtype
    n: int = 2
    stochastic: bool = False

    @property
    def planes(self) -> tuple[Plane, ...]:  # type: ignore[override]
        return tuple(Plane(suffix, self.dtype) for suffix in ("", "_lo", "_lo2")[: self.n])

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        if arithmetic == F32:
            return Expanded(tuple(plane.float() for plane in planes), self.dtype)
        return PaperExpanded(planes[0], planes[1])

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        hi, rest = (part.float() for part in number.parts(self.dtype))
        rest = rest.masked_fill(~(hi + rest).isfinite(), 0.0)
        planes = [mcf.rn(hi, self.dtype)]
        for _ in range(self.n - 2):
            planes.append(mcf.rn(rest, self.dtype))
            rest = rest - planes[-1].float()
        return (*planes, _round(rest, self.dtype, random))

    def value(self, planes: Planes) -> Tensor:
        return total([plane.float() for plane in planes])

    def components(self, planes: Planes) -> Planes:
        return planes

    def broken(self, planes: Planes) -> Tensor:
        broken = _apart(planes[0], planes[1], self.dtype, 0.5, self.stochastic and self.n == 2)
        for k in range(1, self.n - 1):
            broken |= _apart(planes[k], planes[k + 1], self.dtype, 0.5, self.stochastic and k == self.n - 2)
        return broken


def _apart(hi: Tensor, lo: Tensor, dtype: torch.dtype, ulps: float, stochastic: bool) -> Tensor:
    """Where |lo| is more than so many ulps of hi and one step: stochastic rounding of a tail just above may go there.

    To nearest, hi is 0 only for what lo, too, rounds to 0.
    """
    hi, lo = hi.float(), lo.float()
    f = mcf.FLOATS[dtype]
    binade = (hi.view(torch.int32) & 0x7F800000).view(F32)  # 2**exponent
    bound = binade.clamp(min=2.0**f.emin) * (ulps * 2.0 ** (1 - f.precision))
    bound = bound + (bound * 2.0 ** (1 - f.precision)).clamp(min=2.0 ** (f.emin - f.precision + 1))
    alone = ~hi.isfinite() if stochastic else ~hi.isfinite() | (hi == 0)
    return ~torch.where(alone, lo == 0, lo.abs() <= bound)


@dataclass(frozen=True)
class Master(Format):
    """16 bits for the forward pass, and the float32 master weight they are a cast of. The number is the master."""

    dtype: torch.dtype = BF16
    stochastic: bool = False

    @property
    def planes(self) -> tuple[Plane, ...]:  # type: ignore[override]
        return Plane("", self.dtype), Plane("_master", F32)

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        return Register(planes[1])

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        return mcf.rn(number.value, self.dtype), number.value

    def value(self, planes: Planes) -> Tensor:
        return planes[1].clone()

    def components(self, planes: Planes) -> Planes:
        return planes[1:]

    def broken(self, planes: Planes) -> Tensor:
        hi, cast = planes[0].float(), mcf.rn(planes[1], self.dtype).float()
        return ~((hi == cast) | (hi.isnan() & cast.isnan()))


@dataclass(frozen=True)
class Compensated(Format):
    """bf16 with Kahan's compensation in a second bf16 plane."""

    planes: tuple[Plane, ...] = (Plane("", BF16), Plane("_kahan", BF16))
    stochastic: bool = False

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        if arithmetic == F32:  # it is only looked at: the recurrence is one in bfloat16
            return Register(self.value(planes))
        return Kahan(planes[0], planes[1])

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        return Expansion(BF16).encode(number)

    def value(self, planes: Planes) -> Tensor:
        return planes[1].float() + planes[0].float()

    def components(self, planes: Planes) -> Planes:
        return planes

    def broken(self, planes: Planes) -> Tensor:
        return _apart(planes[0], planes[1], BF16, 1.0, stochastic=False)  # where |delta| > |theta| it reaches an ulp


FORMATS: dict[str, Format] = {
    "fp32": Single(F32),
    "bf16": Single(BF16),
    "fp16": Single(FP16),
    "bf16x2": Expansion(BF16),
    "bf16x3": Expansion(BF16, 3),
    "fp16x2": Expansion(FP16),
    "bf16+fp32": Master(BF16),
    "fp16+fp32": Master(FP16),
    "bf16+kahan": Compensated(),
    "bf16:sr": Single(BF16, stochastic=True),
    "fp16:sr": Single(FP16, stochastic=True),
    "bf16x2:sr": Expansion(BF16, stochastic=True),
    "bf16x3:sr": Expansion(BF16, 3, stochastic=True),
    "fp16x2:sr": Expansion(FP16, stochastic=True),
}


def format_of(name: str) -> Format:
    """The format of that name. Raises ValueError listing the known ones."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def split(fmt: Format, x: Tensor, random: Tensor | None = None) -> tuple[Tensor, ...]:
    """Planes that hold float32 ``x`` as well as the format can. With blocks: x is [rows, columns] of whole ones."""
    return fmt.encode(Register(x), random)


def fitted(fmt: Format, planes: Planes) -> tuple[tuple[Tensor, ...], Tensor]:
    """(planes that fit plane 0, bool per element: which did not). Pure.

    Others write to plane 0 alone: clamping, pruning, a loaded model. Where that shows (`broken`), the other planes are
    derived from it as it is now; everywhere else they stay.
    """
    broken = fmt.broken(planes)
    fresh = split(fmt, planes[0].float()) if planes[1:] else ()
    others = (torch.where(broken, new, old) for new, old in zip(fresh[1:], planes[1:], strict=True))
    return (planes[0], *others), broken
