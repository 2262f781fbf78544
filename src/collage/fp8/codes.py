"""e4m3 numbers with a power of two for each row: out of float32, and into what a product is computed in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from collage.formats import format_of, split
from collage.formats.scales import factors, finite_sizes, inverses, scales
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
    """[rows, columns] in bfloat16 or a wider dtype: exact, since E lies between 26 and 246.

    On CPUs the bits are moved by integer operations, which torch's own cast takes ten times as long for.
    """
    if hi.device.type == "cpu" and dtype in _SHIFTS:
        wide, shift, clear = _SHIFTS[dtype]
        code = hi.view(torch.int8)
        bits = (code.to(wide) << shift).bitwise_and_(clear)  # the exponent of e4m3 in the wider field: 2**120 too small
        numbers = bits.view(dtype).mul_(2.0**120).masked_fill_((code & 127) == 127, torch.nan)
    else:
        numbers = hi.to(dtype)
    return numbers.mul_(factors(scale).to(dtype)[:, None])


_SHIFTS = {  # dtype -> integers of its size, places that a code moves up, and the bits that then belong to it
    BF16: (torch.int16, 4, -0x8000 | 0x7F0),
    F32: (torch.int32, 20, -0x80000000 | 0x7F00000),
}


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [rows, columns], float32 [rows, 1]) of bfloat16 or float32 numbers, to nearest.

    The row's power of two is that of the weights' formats: the smallest with which its largest number fits. The product
    with it is exact, so that each number is rounded once. Where a row has an Inf or a NaN it is NaN, since torch casts
    Inf to 448.
    """
    largest = x.abs().amax(1).float()
    scale = scales(finite_sizes(largest), 8, 0x600000, 26, 246)
    unit = torch.where(largest.isfinite(), factors(scale), torch.nan)
    return (x * inverses(scale).to(x.dtype)[:, None]).to(E4M3), unit[:, None]
