"""A weight and an integer remainder: the number is one word, and the visible plane is how it shows. (Or its master.)

The word is that of a float with more significand bits than the visible one; splitting and joining it is integer
arithmetic on the magnitude, which carries into the next binade by itself. hi is the word rounded half up in magnitude,
which differs from rounding to nearest even only at exact ties (to even, 65,537 words would round to each even hi of
``bf16+int16``). Nearly every pair (hi, lo) is a valid word, so that a changed hi can rarely be seen; with an old lo it
is off by at most half an ulp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collage.accumulators import Accumulator
from collage.formats.floats import Master
from collage.formats.format import InRegister, ulp
from collage.formats.scales import factors, finite_sizes, inverses, scales_of_rows
from collage.layout import Plane, Planes
from collage.rounding import FLOATS, code_of

F32 = torch.float32
INTEGERS = {8: torch.int8, 16: torch.int16}


class Remainder(InRegister):
    """A number that is one word."""

    bits: int  # of the remainder
    shows_edits = False


@dataclass(frozen=True)
class Cut(Remainder):
    """bf16 and the next 16 or 8 bits of a float32: all of it, or cut to 24 bits, to nearest or stochastically."""

    bits: int
    stochastic: bool = False

    @property
    def planes(self) -> tuple[Plane, ...]:  # type: ignore[override]
        return Plane("", torch.bfloat16), Plane("_lo", INTEGERS[self.bits])

    def value(self, planes: Planes) -> Tensor:
        hi, lo = planes[0].view(torch.int16).int(), planes[1].int()
        return ((hi << 16) + (lo << (16 - self.bits))).view(F32)

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        x, b = number.value, self.bits
        u = torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32))
        w = u if b == 16 else (u + (0x7F + ((u >> 8) & 1) if random is None else random >> 8)) >> 8
        if random is not None:
            w = w - (((w & 0x7FFFFF) == 0x7F8000) & x.isfinite()).int()  # back from Inf
        hi, lo = (w >> b) + ((w >> (b - 1)) & 1), w & ((1 << b) - 1)
        return hi.to(torch.int16).view(torch.bfloat16), lo.to(INTEGERS[b])

    def spacing(self, planes: Planes) -> Tensor:
        return ulp(planes[0], 8 + self.bits, 2.0 ** (-133 - self.bits))

    def broken(self, planes: Planes) -> Tensor:
        hi, lo = planes
        return ((hi == 0) & (lo < 0)) | (hi.isinf() & (lo > 0)) | (hi.isnan() & (lo != 0))


@dataclass(frozen=True)
class Word(Remainder):
    """fp16 or e4m3 followed by 8 or 16 more significand bits; scaled: times one power of two per row.

    The scale is the smallest with which the row's largest finite number is within the format's largest, so it is a pure
    function of the row. (E8M0: a byte E stands for 2**(E - 127).)
    """

    dtype: torch.dtype
    bits: int
    stochastic: bool = False
    scaled: bool = False

    @property
    def planes(self) -> tuple[Plane, ...]:  # type: ignore[override]
        words = Plane("", self.dtype), Plane("_lo", INTEGERS[self.bits])
        return (*words, Plane("_scale", torch.uint8, per=None)) if self.scaled else words

    @property
    def beside(self) -> str:  # type: ignore[override]
        return "bf16x2:sr" if self.scaled else ""

    @property
    def _first(self) -> int:
        """Exponent field, in float32, of the smallest normal number."""
        return 127 + FLOATS[self.dtype].emin

    @property
    def _wide(self) -> int:
        """Significand bits of the word, without the hidden one."""
        return FLOATS[self.dtype].precision - 1 + self.bits

    def value(self, planes: Planes) -> Tensor:
        f = FLOATS[self.dtype]
        code = planes[0].view(f.storage).int()
        magnitude = code & torch.iinfo(f.storage).max
        w = (magnitude << self.bits) + planes[1]
        normal = ((w + ((self._first - 1) << self._wide)) << (23 - self._wide)).view(F32)
        x = torch.where(w >> self._wide > 0, normal, w.float() * 2.0 ** (f.emin - self._wide))
        if self.scaled:
            x = x * factors(planes[2])[:, None]
        elif f.inf_code != f.nan_code:
            x = torch.where(magnitude == f.inf_code, torch.inf, x)
        x = torch.where(magnitude > f.max_code + (f.inf_code != f.nan_code), torch.nan, x)
        return torch.where(code < 0, -x, x)

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        scale = self._scales(number.value) if self.scaled else None
        words = self.words(number.value, scale, random)
        return words if scale is None else (*words, scale)

    def words(self, x: Tensor, scale: Tensor | None, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(hi, lo) of float32 numbers under these scales."""
        f, b = FLOATS[self.dtype], self.bits
        a = (x.abs() if scale is None else x.abs() * inverses(scale)[:, None]).view(torch.int32)
        w = code_of(a, self._wide + 1, f.emin, random).clamp(max=(f.max_code << b) + (1 << (b - 1)) - 1)
        hi = (w + (1 << (b - 1))) >> b
        lo = w - (hi << b)
        inf = x.isinf() if scale is not None else x.abs() >= _OVERFLOW[self.dtype]
        hi = torch.where(x.isnan(), f.nan_code, torch.where(inf, f.inf_code, hi))
        sign = ((x.view(torch.int32) >> 31) & ~torch.iinfo(f.storage).max).masked_fill(x.isnan(), 0)
        lo = torch.where(inf | x.isnan(), 0, lo)
        return (hi | sign).to(f.storage).view(self.dtype), lo.to(INTEGERS[b])

    def visible(self, planes: Planes) -> Tensor:
        return planes[0].float() * factors(planes[2])[:, None] if self.scaled else planes[0]

    def shown(self, planes: Planes) -> tuple[Tensor, ...]:
        hi, lo, *scale = planes
        return hi, torch.zeros_like(lo), *scale  # a scale belongs to what shows

    def continued(self, planes: Planes, low: Tensor) -> tuple[Tensor, ...]:
        hi, _, *scale = planes
        if self.bits == 8:  # to nearest; what shows stays as it is, so that the largest is 127 at most
            low = ((low.int() + 128) >> 8).clamp_(max=127).to(torch.int8)
        return hi, low, *scale

    def moved(self, old: Planes, new: Planes) -> Tensor:
        """A scale that moves by a power of two changes words, but numbers only where it cuts some."""
        return self.value(old) != self.value(new) if self.scaled else super().moved(old, new)

    def spacing(self, planes: Planes) -> Tensor:
        f = FLOATS[self.dtype]
        apart = ulp(planes[0].float(), f.precision + self.bits, 2.0 ** (f.emin - self._wide))
        return apart * factors(planes[2])[:, None] if self.scaled else apart

    def broken(self, planes: Planes) -> Tensor:
        f = FLOATS[self.dtype]
        magnitude = planes[0].view(f.storage).int() & torch.iinfo(f.storage).max
        lo = planes[1]
        return ((magnitude == 0) & (lo < 0)) | ((magnitude > f.max_code) & (lo != 0))

    def _scales(self, x: Tensor) -> Tensor:
        """uint8 per row."""
        sizes = finite_sizes(x)
        largest = sizes.amax(1) if x.shape[1] else sizes.new_zeros(len(x))
        return scales_of_rows(largest)


@dataclass(frozen=True)
class ScaledMaster(Master):
    """What a word's first plane shows, and the float32 master weight that it is cut from. The number is the master."""

    dtype: torch.dtype = torch.float8_e4m3fn
    beside: str = "bf16+fp32"

    @property
    def planes(self) -> tuple[Plane, ...]:  # type: ignore[override]
        return (*super().planes, Plane("_scale", torch.uint8, per=None))

    @property
    def _word(self) -> Word:
        return Word(self.dtype, 16, scaled=True)

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        hi, _, scale = self._word.encode(number)
        return hi, number.value, scale

    def components(self, planes: Planes) -> Planes:
        return planes[1:2]

    def visible(self, planes: Planes) -> Tensor:
        return self._word.visible(planes)

    def shown(self, planes: Planes) -> tuple[Tensor, ...]:
        return planes[0], self.visible(planes), planes[2]

    def continued(self, planes: Planes, low: Tensor) -> tuple[Tensor, ...]:
        hi, _, scale = planes
        return hi, self._word.value((hi, low, scale)), scale

    def moved(self, old: Planes, new: Planes) -> Tensor:
        return old[1] != new[1]

    def broken(self, planes: Planes) -> Tensor:
        hi, cast = planes[0].float(), self._word.words(planes[1], planes[2])[0].float()
        return ~((hi == cast) | (hi.isnan() & cast.isnan()))


_OVERFLOW = {torch.float16: 65520.0}  # what rounding to nearest sends to Inf
