"""Formats made of floats: one, an expansion of several, a float32 master weight, Kahan's compensation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collage import mcf
from collage.accumulators import Accumulator, Expanded, Kahan, PaperExpanded, Register, total
from collage.formats.format import Format, ulp
from collage.layout import Plane, Planes

F32, BF16 = torch.float32, torch.bfloat16


def _register(plane: Tensor, arithmetic: torch.dtype) -> Tensor:
    return plane.float() if arithmetic == F32 else plane


def _spacing(x: Tensor, dtype: torch.dtype, n: int = 1) -> Tensor:
    """Of numbers of n components."""
    if dtype == F32:
        return ulp(x, 24, 2.0**-149)
    f = mcf.FLOATS[dtype]
    return ulp(x, n * f.precision, 2.0 ** (f.emin - f.precision + 1))


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

    def spacing(self, planes: Planes) -> Tensor:
        return _spacing(planes[0], self.dtype)

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

    def spacing(self, planes: Planes) -> Tensor:
        return _spacing(planes[0], self.dtype, self.n)

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

    def spacing(self, planes: Planes) -> Tensor:
        return _spacing(planes[1], F32)

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

    def spacing(self, planes: Planes) -> Tensor:
        return _spacing(planes[0], BF16, 2)

    def broken(self, planes: Planes) -> Tensor:
        return _apart(planes[0], planes[1], BF16, 1.0, stochastic=False)  # where |delta| > |theta| it reaches an ulp
