"""A weight and an integer remainder: the number is one word, and plane 0 is how it shows.

One for one what formats/words.py says.
"""

from typing import Any

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import SIGN, bits_of, float_of, is_finite, word_code
from collage.backends.triton.format import (
    BF16,
    E8M0,
    PER_ROW,
    Format,
    decoded_components,
    decoded_number,
    inverse,
    scale_code,
    spread,
)


@triton.jit
def cut_decode(planes, F: tl.constexpr):
    return float_of(bits_of(planes[0]) + (planes[1] << (16 - F.words[1].precision)))


@triton.jit
def cut_encode(number, random, largest, F: tl.constexpr):
    x = number.value().x
    b: tl.constexpr = F.words[1].precision
    w = tl.where(x != x, 0x7FC00000, bits_of(x))
    if F.stochastic:
        w = (w + (random >> 8)) >> 8
        w = tl.where(((w & 0x7FFFFF) == 0x7F8000) & is_finite(x), w - 1, w)  # back from Inf
    elif b == 8:
        w = (w + 0x7F + ((w >> 8) & 1)) >> 8
    return (w + (1 << (b - 1))) >> b, w


@triton.jit
def cut_broken(planes, F: tl.constexpr):
    hi, lo = planes[0], planes[1]
    return ((hi == 0.0) & (lo < 0)) | ((tl.abs(hi) == float("inf")) & (lo > 0)) | ((hi != hi) & (lo != 0))


def cut(lo: Any, stochastic: bool = False) -> Format:
    """bf16 and the next 16 or 8 bits of a float32."""
    return Format((BF16, lo), decoded_number, cut_encode, cut_decode, decoded_components, cut_broken, stochastic)


@triton.jit
def extended_decode(planes, F: tl.constexpr):
    """lo counts units of the word's last place: in float32 either bits of the significand, or in the first two binades,
    which have the units of subnormals, a number to be added."""
    hi, lo = planes[0], planes[1]
    wide: tl.constexpr = F.words[0].precision - 1 + F.words[1].precision
    size = tl.abs(hi)
    first = size + lo.to(tl.float32) * 2.0 ** (F.words[0].emin - wide)
    x = tl.where(size < 2.0 ** (F.words[0].emin + 1), first, float_of(bits_of(size) + (lo << (23 - wide))))
    if F.whole_rows:
        x = x * spread(planes[2], x)
    x = tl.where(is_finite(hi), x, size)
    return float_of(bits_of(x) ^ (bits_of(hi) & SIGN))


@triton.jit
def extended_encode(number, random, largest, F: tl.constexpr):
    x = number.value().x
    if F.whole_rows:
        scale = row_scale(largest[0])
        return split(x, scaled_size(x, scale), random, F.words[1].precision, F) + (scale,)
    else:
        return split(x, size_of(x), random, F.words[1].precision, F)


@triton.jit
def split(x, size, random, BITS: tl.constexpr, F: tl.constexpr):
    """(hi, remainder of so many bits) of x. size: of `size_of`, or of `scaled_size`."""
    half: tl.constexpr = 1 << (BITS - 1)
    w = word_code(size, random, F.words[0].precision - 1 + BITS, F.words[0].emin, F.stochastic)
    w = tl.minimum(w, (F.words[0].max_code << BITS) + half - 1)
    hi = (w + half) >> BITS
    beyond = size_of(x) >= F.words[0].overflow
    lo = tl.where(beyond, 0, w - (hi << BITS))
    hi = tl.where(beyond, F.words[0].inf_code, hi) | ((bits_of(x) >> 31) << (F.words[0].memory.primitive_bitwidth - 1))
    return tl.where(size_of(x) > 0x7F800000, F.words[0].nan_code, hi), lo


@triton.jit
def size_of(x):
    """A magnitude, as bits."""
    return bits_of(x) & 0x7FFFFFFF


@triton.jit
def scaled_size(x, scale):
    """Magnitudes over a power of two per row (a code of E8M0), as bits."""
    return bits_of(float_of(size_of(x)) * spread(inverse(scale), x))


@triton.jit
def row_scale(largest):
    """With it 448, which is 1.75 * 2**8, is the largest of a row; all codes are normal numbers."""
    return scale_code(largest, 8, 0x600000, 26, 246)


@triton.jit
def extended_broken(planes, F: tl.constexpr):
    return ((planes[0] == 0.0) & (planes[1] < 0)) | ((is_finite(planes[0]) == 0) & (planes[1] != 0))


def extended(hi: Any, lo: Any, stochastic: bool = False, scaled: bool = False) -> Format:
    """A narrow float followed by more significand bits. scaled: times a power of two per row."""
    words, shared = ((hi, lo, E8M0), (1, 1, PER_ROW.value)) if scaled else ((hi, lo), ())
    return Format(
        words, decoded_number, extended_encode, extended_decode, decoded_components, extended_broken, stochastic, shared
    )
