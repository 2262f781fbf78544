"""e4m3 numbers with a power of two for each row: out of float32, and into what a product is computed in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from collage.formats import format_of, split
from collage.formats.scales import factors, finite_sizes, inverses, scales_of_rows
from collage.layout import PIECE

E4M3, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32

WORD = format_of("e4m3+int16")


class Coded(NamedTuple):
    """A weight as a layer holds it, and what e4m3 cuts off of it."""

    hi: Tensor  # [rows, columns] float8_e4m3fn
    lo: Tensor  # [rows, columns] int16: 16 more significand bits
    scale: Tensor  # [rows] uint8: E stands for 2**(E - 127)


def coded(weight: Tensor) -> Coded:
    """The nearest word of a matrix, some rows at a time: no temporary is as large as the weight."""
    rows = max(1, PIECE // max(weight.shape[1], 1))
    parts = [split(WORD, part.float()) for part in torch.split(weight.detach(), rows)]
    return Coded(*(torch.cat(planes) for planes in zip(*parts, strict=True)))


def decoded(hi: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, columns] in bfloat16 or a wider dtype: exact, since E lies between 26 and 246."""
    numbers = _shifted(hi, dtype) if hi.device.type == "cpu" and dtype in _WIDE else hi.to(dtype)
    return numbers.mul_(factors(scale).to(dtype)[:, None])


class _Wide(NamedTuple):
    """A float that has e4m3's bits as a part of its own."""

    bits: torch.dtype
    shift: int  # of a code, up to where exponent and fraction are
    own: int  # the bits that are then a code's: not the copies of its sign in between
    nan: int


_WIDE = {
    BF16: _Wide(torch.int16, 4, -0x8000 | 0x7F0, 0x7F80),
    F32: _Wide(torch.int32, 20, -0x80000000 | 0x7F00000, 0x7F800000),
}


def _shifted(hi: Tensor, dtype: torch.dtype) -> Tensor:
    """``hi.to(dtype)`` by integer operations: on CPUs torch's own takes five times as long."""
    wide = _WIDE[dtype]
    code = hi.view(torch.int8).to(wide.bits)
    bits = (code << wide.shift).bitwise_and_(wide.own)
    bits |= code.bitwise_and_(127).add_(1).bitwise_right_shift_(7).mul_(wide.nan)  # 7F is NaN
    return bits.view(dtype).mul_(2.0**120)  # the bias of exponents is 7 in e4m3, 127 here


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [rows, columns], float32 [rows, 1]) of bfloat16 or float32 numbers, to nearest.

    The row's power of two is that of the weights' formats: the smallest with which its largest number fits. The product
    with it is exact, so that each number is rounded once. Where a row has an Inf or a NaN it is NaN, since torch casts
    Inf to 448.
    """
    largest = x.abs().amax(1).float()
    scale = scales_of_rows(finite_sizes(largest))
    unit = torch.where(largest.isfinite(), factors(scale), torch.nan)
    return (x * inverses(scale).to(x.dtype)[:, None]).to(E4M3), unit[:, None]
