"""Scales: a byte E for 2**(E - 127) (E8M0), that of the largest finite number among those that share it."""

from __future__ import annotations

import torch
from torch import Tensor

F32 = torch.float32
FRACTION, INF = 0x7FFFFF, 0x7F800000
LEAST, MOST = 26, 246  # scale of a row of e4m3: a word below it is a normal float32 number, and so is what shows
LARGEST = 448 * 2.0 ** (MOST - 127)  # that such a row can show


def factors(scale: Tensor) -> Tensor:
    """float32 2**(E - 127); 0 for E = 0."""
    return (scale.int() << 23).view(F32)


def inverses(scale: Tensor) -> Tensor:
    """float32 2**(127 - E), which is subnormal for E = 254, the largest."""
    return torch.where(scale == 254, 0x00400000, (254 - scale.int()) << 23).view(F32)


def finite_sizes(x: Tensor) -> Tensor:
    """int32, the bits of finite magnitudes, which increase with them; 0 for what is not finite."""
    size = x.abs().view(torch.int32)
    return torch.where(size < INF, size, 0)


def scales(largest: Tensor, exponent: int, limit: int, least: int, most: int) -> Tensor:
    """uint8: the smallest E, from `least` to `most`, that scales a magnitude to at most that exponent and limit.

    largest: of `finite_sizes`. limit: bits below the exponent.
    """
    code = (largest >> 23) - exponent + ((largest & FRACTION) > limit).int()
    return code.clamp(least, most).to(torch.uint8)


def scales_of_rows(largest: Tensor) -> Tensor:
    """uint8: those of e4m3 numbers, of which 448 = 1.75 * 2**8 is the largest. largest: as above."""
    return scales(largest, 8, 0x600000, LEAST, MOST)
