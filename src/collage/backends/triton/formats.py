"""Planes in memory <-> numbers in registers. One for one what formats.py says. FORMATS is the table.

A format is given its planes' elements as their words decode them: a block of one row each, or one word per `per` of it.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import (
    Real,
    bf16_code,
    bf16_stochastic_code,
    bf16_value,
    bits_of,
    float_of,
    fp16_code,
    fp16_value,
    is_finite,
    same,
)
from collage.backends.triton.language import Row, static
from collage.backends.triton.numbers import Expanded, Kahan, Paper, Register, total


@dataclass(frozen=True, repr=False)
class Word(Row):
    """An element of a plane.

    decode: what memory holds, as int32 or float32 -> what formats read. encode, stochastic: back.
    """

    memory: tl.dtype
    decode: Any
    encode: Any
    stochastic: Any = None
    precision: int = 24
    emin: int = -126


FP32 = static(Word(tl.float32, same, same))
BF16 = static(Word(tl.int16, bf16_value, bf16_code, bf16_stochastic_code, 8))
FP16 = static(Word(tl.int16, fp16_value, fp16_code, None, 11, -14))


@dataclass(frozen=True, repr=False)
class Format(Row):
    """How one number per element lies in memory. Every function is given the format's row, last.

    number: (planes, rounding of the arithmetic) -> number
    encode: (number, random bits, mask) -> codes of the new planes
    decode: planes -> float32
    components: planes -> those whose sum is the number, largest first
    broken: planes -> which no `encode` can have left, because plane 0 was changed alone; planes of zeros are whole.
        None: a single plane cannot disagree
    """

    words: tuple[Any, ...]
    number: Any
    encode: Any
    decode: Any
    components: Any
    broken: Any
    stochastic: bool = False
    per: tuple[int, ...] = (1, 1, 1)  # elements that share a word, plane by plane


@triton.jit
def rounded(x, random, F: tl.constexpr):
    """The code of the last component."""
    if F.stochastic:
        return F.words[len(F.words) - 1].stochastic(x, random)
    else:
        return F.words[len(F.words) - 1].encode(x)


@triton.jit
def first(planes, F: tl.constexpr):
    return planes[0]


@triton.jit
def every(planes, F: tl.constexpr):
    return planes


@triton.jit
def single_number(planes, ROUND: tl.constexpr, F: tl.constexpr):
    return Register(Real(planes[0], ROUND))


@triton.jit
def single_encode(number, random, mask, F: tl.constexpr):
    return (rounded(number.value().x, random, F),)


def single(word: Any, stochastic: bool = False) -> Format:
    return Format((word,), single_number, single_encode, first, every, None, stochastic)


@triton.jit
def expansion_number(planes, ROUND: tl.constexpr, F: tl.constexpr):
    if ROUND is same:
        return Expanded(planes, F.words[0])
    else:
        return Paper(Real(planes[0], ROUND), Real(planes[1], ROUND))


@triton.jit
def expansion_encode(number, random, mask, F: tl.constexpr):
    """c0, then the others peeled off the rest in turn."""
    h, rest = number.parts(F.words[0])
    rest = tl.where(is_finite(h + rest), rest, 0.0)
    codes = (F.words[0].encode(h),)
    for k in tl.static_range(1, len(F.words) - 1):
        code = F.words[k].encode(rest)
        rest = rest - F.words[k].decode(code)
        codes = codes + (code,)
    return codes + (rounded(rest, random, F),)


@triton.jit
def expansion_decode(planes, F: tl.constexpr):
    return total(planes)


@triton.jit
def half_an_ulp(planes, F: tl.constexpr):
    return (alike(planes, 0.5, F)) == 0


@triton.jit
def alike(planes, ULPS: tl.constexpr, F: tl.constexpr):
    """Whether each component is within so many ulps of the one before, and one step (formats._broken)."""
    hi, lo = planes
    step: tl.constexpr = 2.0 ** (1 - F.words[0].precision)
    bound = tl.maximum(float_of(bits_of(hi) & 0x7F800000), 2.0 ** F.words[0].emin) * (ULPS * step)
    limit = bound + tl.maximum(bound * step, 2.0 ** F.words[0].emin * step)
    paired = is_finite(hi)
    if not F.stochastic:
        paired = paired & (hi != 0.0)
    return tl.where(paired, tl.abs(lo) <= limit, lo == 0.0)


def expansion(word: Any, n: int, stochastic: bool = False) -> Format:
    return Format((word,) * n, expansion_number, expansion_encode, expansion_decode, every, half_an_ulp, stochastic)


@triton.jit
def master_number(planes, ROUND: tl.constexpr, F: tl.constexpr):
    return Register(Real(planes[1], ROUND))


@triton.jit
def master_encode(number, random, mask, F: tl.constexpr):
    x = number.value().x
    return F.words[0].encode(x), x


@triton.jit
def master_decode(planes, F: tl.constexpr):
    return planes[1]


@triton.jit
def master_components(planes, F: tl.constexpr):
    return (planes[1],)


@triton.jit
def master_broken(planes, F: tl.constexpr):
    hi = planes[0]
    cast = F.words[0].decode(F.words[0].encode(planes[1]))
    return ((hi == cast) | ((hi != hi) & (cast != cast))) == 0


def master(word: Any) -> Format:
    return Format((word, FP32), master_number, master_encode, master_decode, master_components, master_broken)


@triton.jit
def kahan_number(planes, ROUND: tl.constexpr, F: tl.constexpr):
    return Kahan(Real(planes[0], ROUND), Real(planes[1], ROUND))


@triton.jit
def a_whole_ulp(planes, F: tl.constexpr):
    return (alike(planes, 1.0, F)) == 0


FORMATS = {
    "fp32": single(FP32),
    "bf16": single(BF16),
    "fp16": single(FP16),
    "bf16:sr": single(BF16, stochastic=True),
    "bf16x2": expansion(BF16, 2),
    "bf16x2:sr": expansion(BF16, 2, stochastic=True),
    "bf16+fp32": master(BF16),
    "bf16+kahan": Format((BF16, BF16), kahan_number, expansion_encode, expansion_decode, every, a_whole_ulp),
}
