"""Rounding float32 to the narrow formats, by integer operations on the bits: to nearest even, and stochastically."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Float(NamedTuple):
    """A binary float format narrower than float32: its parameters and its special codes."""

    precision: int  # significant bits, the hidden one included
    emin: int  # exponent of the smallest normal number
    max_code: int  # bits of Omega
    overflow_code: int  # what a finite number above Omega becomes: Inf, or Omega where there is no Inf
    inf_code: int  # what Inf becomes
    nan_code: int  # the quiet NaN
    storage: torch.dtype  # signed integer of the same width


FLOATS: dict[torch.dtype, Float] = {
    torch.bfloat16: Float(8, -126, 0x7F7F, 0x7F80, 0x7F80, 0x7FC0, torch.int16),
    torch.float16: Float(11, -14, 0x7BFF, 0x7C00, 0x7C00, 0x7E00, torch.int16),
    torch.float8_e5m2: Float(3, -14, 0x7B, 0x7C, 0x7C, 0x7E, torch.int8),
    torch.float8_e4m3fn: Float(4, -6, 0x7E, 0x7E, 0x7F, 0x7F, torch.int8),
}

_MAGNITUDE, _HIDDEN, _INF = 0x7FFFFFFF, 0x800000, 0x7F800000


def rn(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``x`` to ``dtype``, to nearest, ties to even, subnormals kept; NaN becomes the quiet NaN.

    Integer operations on the bits, because compilers fold a cast down and up into nothing. Adding "half an ulp less
    one, plus the last kept bit" to the magnitude carries into the kept bits exactly when rounding goes up; a carry out
    of the significand is the next binade. Below the smallest normal the same is had by adding a power of two whose ulp
    is the format's smallest subnormal. ``float8_e4m3fn`` has no Inf: finite overflow saturates, Inf becomes NaN.

    >>> rn(torch.tensor([1.00390625, 1.01171875]), torch.bfloat16)  # both are ties
    tensor([1.0000, 1.0156], dtype=torch.bfloat16)
    """
    if dtype == torch.float32:
        return x
    f = FLOATS[dtype]
    bits = x.view(torch.int32)
    shift = 24 - f.precision
    if f.emin == -126:  # float32's exponents: sign, subnormals, Inf and overflow come out right by themselves
        code = (((bits >> shift) & 1).add_(bits).add_((1 << (shift - 1)) - 1)) >> shift
        return code.masked_fill_(x.isnan(), f.nan_code).to(f.storage).view(dtype)
    magnitude = bits & _MAGNITUDE
    code = (magnitude + ((1 << (shift - 1)) - 1) + ((magnitude >> shift) & 1)) >> shift
    if f.emin > -126:
        code = code - ((126 + f.emin) << (f.precision - 1))
        magic = torch.full_like(x, 2.0 ** (f.emin - f.precision + 24))
        subnormal = (x.abs() + magic).view(torch.int32) - magic.view(torch.int32)
        code = torch.where(x.abs() < 2.0**f.emin, subnormal, code)
    code = torch.where(code > f.max_code, f.overflow_code, code)
    return _pack(code, bits, magnitude, f).view(dtype)


def sr(x: Tensor, random: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Round float32 ``x`` stochastically: up in magnitude with the probability of the part dropped.

    Args:
        x: float32.
        random: int32, uniform in [0, 2**16), of x's shape. They are added to the dropped bits, cut or stretched to as
            many: exactly unbiased where 16 or fewer are dropped, within 2**-17 of an ulp where more are.
        dtype: bfloat16 or float16.

    Finite x never pass the largest finite number, where rounding is biased; +-0, +-Inf and exact values stay.
    """
    f = FLOATS[dtype]
    bits = x.view(torch.int32)
    if f.emin == -126:  # float32's exponents
        code = (bits + random) >> 16
        code -= (((code & 0x7FFF) == f.inf_code) & x.isfinite()).to(torch.int32)  # back from Inf
        return code.masked_fill_(x.isnan(), f.nan_code).to(f.storage).view(dtype)
    magnitude = bits & _MAGNITUDE
    code = code_of(magnitude, f.precision, f.emin, random).clamp(max=f.max_code)
    return _pack(code, bits, magnitude, f).view(dtype)


def code_of(magnitude: Tensor, precision: int, emin: int, random: Tensor | None = None) -> Tensor:
    """The code that a magnitude rounds to, in a float of any precision below 24: to nearest even, or up at `random`.

    magnitude: bits of float32, without the sign. Codes have no end: who calls this has to set one, and to mind Inf and
    NaN. random: as in `sr`.
    """
    least = 127 + emin  # exponent field, in float32, of the smallest normal number
    exponent = (magnitude >> 23).clamp(min=1)
    significand = torch.where(magnitude < _HIDDEN, magnitude, (magnitude & (_HIDDEN - 1)) | _HIDDEN)
    dropped = (24 - precision) + (least - exponent).clamp(min=0)
    shift = dropped.clamp(max=30)
    significand = significand >> (dropped - shift).clamp(max=31)  # rounding reaches no further down
    if random is None:
        added = (1 << (shift - 1)) - 1 + ((significand >> shift) & 1)
    else:
        wide = (shift - 16).clamp(min=0)
        stretched = (random << wide) + ((1 << wide) >> 1)
        added = torch.where(wide > 0, stretched, random >> (16 - shift).clamp(min=0))
    return ((significand + added) >> shift) + ((exponent - least).clamp(min=0) << (precision - 1))


def _pack(code: Tensor, bits: Tensor, magnitude: Tensor, f: Float) -> Tensor:
    """Put back what the arithmetic on magnitudes left out: Inf, the sign, and NaN over everything."""
    code = torch.where(magnitude == _INF, f.inf_code, code)
    sign = (bits >> 31) & (1 << (torch.iinfo(f.storage).bits - 1))
    return torch.where(magnitude > _INF, f.nan_code, code | sign).to(f.storage)
