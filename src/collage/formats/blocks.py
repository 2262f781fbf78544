"""Moments in 8 bits: a code per element, and a power of two for every block of elements of a row.

Codes are companded by a shift of bits, ``(bits(float(k)) - bits(2**n)) << n``: a piecewise linear k**(2**n). So they
are fine at the top of a block and coarse far below, decoding is integer arithmetic, and between neighbours a code is
linear, which makes stochastic rounding exact. Below k = 2**n it is linear, as subnormals are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collage.accumulators import Accumulator
from collage.formats.format import InRegister
from collage.formats.scales import factors, finite_sizes, inverses, scales
from collage.layout import Plane, Planes

F32 = torch.float32


@dataclass(frozen=True)
class Companded(InRegister):
    """int8 (|m| ~ k**4) and uint8 (v ~ k**8) codes, with a scale (E8M0) for a block; the largest one never saturates.

    The scale is a pure function of the new numbers: no history. A positive number never becomes 0 in uint8, because a
    second moment of 0 under a first one that is not makes an update of any size.
    """

    dtype: torch.dtype
    twin: str
    stochastic: bool = False
    block: int = 128

    @property
    def planes(self) -> tuple[Plane, ...]:  # type: ignore[override]
        return Plane("", self.dtype), Plane("_scale", torch.uint8, per=self.block)

    @property
    def signed(self) -> bool:
        """Whether it holds negative numbers."""
        return self.dtype == torch.int8

    @property
    def _n(self) -> int:
        return 2 if self.signed else 3

    @property
    def _top(self) -> int:
        """The largest code; its value, in float32 bits below the exponent, is `_limit`."""
        return 127 if self.signed else 254

    @property
    def _limit(self) -> int:
        return 0x780000 if self.signed else 0x700000  # 1.9375, 1.875

    @property
    def _nan(self) -> int:
        return -128 if self.signed else 255

    @property
    def _linear(self) -> int:
        """Exponent of the value of code 2**n: below it codes are linear, 2**n to that value."""
        return -19 if self.signed else -39

    def value(self, planes: Planes) -> Tensor:
        codes, scale = planes[0].int(), planes[1]
        k = codes.abs().float()
        companded = (((k.view(torch.int32) - _power(self._n)) << self._n) + _power(self._linear)).view(F32)
        x = torch.where(k < 2**self._n, k * 2.0 ** (self._linear - self._n), companded)
        x = self._rows(self._blocks(x) * factors(scale)[..., None], codes.shape[1])
        return torch.where(codes == self._nan, torch.nan, torch.where(codes < 0, -x, x))

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        x = number.value
        scale = self._scales(x)
        y = self._rows(self._blocks(x.abs()) * inverses(scale)[..., None], x.shape[1])
        j0 = _power(self._linear)
        shifted = ((y.view(torch.int32) - j0 + (1 << (self._n - 1))) >> self._n) + _power(self._n)
        code = torch.where(y.view(torch.int32) >= j0, shifted.view(F32), y * 2.0 ** (self._n - self._linear))
        fixed = torch.where(x.isfinite(), code * 65536.0, 0.0).round().int()  # 16 bits of fraction; to nearest even
        k = ((fixed + (0x7FFF + ((fixed >> 16) & 1) if random is None else random)) >> 16).clamp(max=self._top)
        if self.signed:
            k = torch.where(x < 0, -k, k).masked_fill(~x.isfinite(), self._nan)
        else:
            k = torch.where(x > 0, k.clamp(min=1), k).masked_fill(~x.isfinite() | (x < 0), self._nan)
        return k.to(self.dtype), scale

    def spacing(self, planes: Planes) -> Tensor:
        k = planes[0].int().abs().clamp(max=self._top - 1).to(torch.uint8 if not self.signed else torch.int8)
        return self.value((k + 1, planes[1])).double() - self.value((k, planes[1])).double()

    def broken(self, planes: Planes) -> Tensor:
        return torch.zeros_like(planes[0], dtype=torch.bool)

    def _scales(self, x: Tensor) -> Tensor:
        """uint8 [rows, blocks] of [rows, columns]."""
        largest = self._blocks(finite_sizes(x)).amax(2)
        least = 22 if self.signed else 43  # with it the smallest code is a normal float32
        return scales(largest, 0, self._limit, least, 254)

    def _blocks(self, x: Tensor) -> Tensor:
        """[rows, columns] -> [rows, blocks, block], zeros after the end of a row."""
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % self.block))
        return padded.view(len(x), -(-x.shape[1] // self.block), self.block)

    def _rows(self, x: Tensor, columns: int) -> Tensor:
        return x.flatten(1)[:, :columns]


def _power(exponent: int) -> int:
    """The bits of the float32 2**exponent."""
    return (127 + exponent) << 23
