"""Moments in 8 bits: codes companded by a shift of bits, a power of two per block. One for one formats/blocks.py."""

from dataclasses import dataclass

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import SIGN, bits_of, float_of, is_finite
from collage.backends.triton.format import (
    E8M0,
    INT8,
    UINT8,
    Format,
    decoded_components,
    decoded_number,
    inverse,
    scale_code,
    spread,
)


@dataclass(frozen=True, eq=False, repr=False)
class Companded(Format):
    """|x| ~ k**(2**n) of codes k up to top, linear below 2**n, whose value is 2**linear.

    limit: float32 bits, below the exponent, of top's value; least: smallest scale.
    """

    n: int = 2
    linear: int = -19
    top: int = 127
    nan: int = -128
    limit: int = 0x780000
    least: int = 22


@triton.jit
def decode(planes, F: tl.constexpr):
    code, scale = planes[0], planes[1]
    k = code.to(tl.float32)
    x = float_of(((bits_of(k) - ((127 + F.n) << 23)) << F.n) + ((127 + F.linear) << 23))  # its sign is shifted out
    x = tl.where(tl.abs(k) < 2.0**F.n, tl.abs(k) * 2.0 ** (F.linear - F.n), x) * spread(scale, k)
    x = float_of(bits_of(x) | (bits_of(k) & SIGN))
    return tl.where(code == F.nan, float("nan"), x)


@triton.jit
def encode(number, random, largest, F: tl.constexpr):
    x = number.value().x
    scale = scale_code(largest[0], 0, F.limit, F.least, 254)
    y = tl.abs(x) * spread(inverse(scale), x)
    k = code_of(y, random, F)
    if F.nan < 0:
        k = tl.where(is_finite(x), tl.where(x < 0.0, -k, k), F.nan)
    else:  # a positive number never becomes 0
        k = tl.maximum(k, tl.minimum(bits_of(x), 1))
        k = tl.where((x >= 0.0) & (x < float("inf")), k, F.nan)
    return k, scale


@triton.jit
def code_of(y, random, F: tl.constexpr):
    """A magnitude below 2 -> the code as a number with 16 bits of fraction, rounded."""
    least: tl.constexpr = (127 + F.linear) << 23
    shifted = (bits_of(y) - least + (1 << (F.n - 1))) >> F.n
    c = tl.where(bits_of(y) >= least, float_of(shifted + ((127 + F.n) << 23)), y * 2.0 ** (F.n - F.linear))
    fixed = bits_of(c + tl.maximum(c, 128.0)) - 0x43000000  # the nearest integer to c * 65536: 128's ulp is 1 / 65536
    if F.stochastic:
        k = (fixed + random) >> 16
    else:
        k = (fixed + 0x7FFF + ((fixed >> 16) & 1)) >> 16
    return tl.minimum(k, F.top)


def signed(stochastic: bool = False) -> Format:
    """int8: |m| ~ k**4."""
    return Companded(
        (INT8, E8M0), decoded_number, encode, decode, decoded_components, None, stochastic, shared=(1, 128)
    )


def unsigned(stochastic: bool = False) -> Format:
    """uint8: v ~ k**8."""
    return Companded(
        (UINT8, E8M0), decoded_number, encode, decode, decoded_components, None, stochastic, shared=(1, 128),
        n=3, linear=-39, top=254, nan=255, limit=0x700000, least=43,
    )  # fmt: skip
