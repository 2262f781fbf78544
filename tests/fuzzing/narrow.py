"""Words of two planes and 8-bit codes with scales, as float64: written from the formats' definitions."""

import struct
from itertools import pairwise

import torch
from torch import Tensor


def word(hi: Tensor, lo: Tensor) -> Tensor:
    """The number of a bfloat16 and the integer that continues it."""
    bits = (hi.view(torch.int16).int() << 16) + (lo.int() << (16 - 8 * lo.dtype.itemsize))
    return bits.view(torch.float32).double()


def word_ulp(hi: Tensor, lo: Tensor) -> Tensor:
    """Distance to the next word above it in magnitude."""
    x = word(hi, lo).abs()
    exponent = torch.where(x == 0, -126, torch.frexp(x)[1] - 1).clamp(min=-126)
    return torch.ldexp(torch.ones_like(x), exponent - 7 - 8 * lo.dtype.itemsize)


def word_is_broken(hi: Tensor, lo: Tensor) -> Tensor:
    """What is no word: below zero, or beyond Inf."""
    return ((hi == 0) & (lo < 0)) | (hi.isinf() & (lo > 0)) | (hi.isnan() & (lo != 0))


def _bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def _table(n: int, top: int, one: float) -> list[float]:
    """Values of the codes 0 to top: linear below 2**n, whose value is ``one``, companded above."""
    table = [k * one / 2**n for k in range(2**n)]
    shifted = (((_bits(float(k)) - _bits(2.0**n)) << n) + _bits(one) for k in range(2**n, top + 1))
    return table + [struct.unpack("<f", struct.pack("<I", bits))[0] for bits in shifted]


TABLES = {torch.int8: _table(2, 127, 2.0**-19), torch.uint8: _table(3, 254, 2.0**-39)}


def _scales(codes: Tensor, scale: Tensor) -> Tensor:
    rows = codes.reshape(len(codes), -1)
    wide = scale.double().repeat_interleave(128, 1)[:, : rows.shape[1]]
    return torch.exp2(wide - 127).reshape(codes.shape)


def _looked_up(table: list[float], codes: Tensor) -> Tensor:
    padded = torch.tensor(table + [torch.nan] * 2, dtype=torch.float64)
    return padded[codes.int().abs().clamp(max=len(table))]


def coded(codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers that codes stand for."""
    return _looked_up(TABLES[codes.dtype], codes) * _scales(codes, scale) * torch.where(codes < 0, -1.0, 1.0)


def code_step(codes: Tensor, scale: Tensor) -> Tensor:
    """The larger distance to a neighbouring code."""
    table = TABLES[codes.dtype]
    up = [b - a for a, b in pairwise(table)]
    steps = [max(pair) for pair in zip([*up, up[-1]], [up[0], *up], strict=True)]
    return _looked_up(steps, codes) * _scales(codes, scale)
