"""Planes in memory <-> numbers in registers. One for one what formats/ says. FORMATS is the table.

A format is given its planes as their words decode them: the elements of a block, which lies in one row; of a plane with
a word for several elements, the words of that block.
"""

from typing import Any

import triton
import triton.language as tl

from collage.backends.triton import blocks
from collage.backends.triton.arithmetic import Real, bits_of, float_of, is_finite, same
from collage.backends.triton.format import (
    BF16,
    E4M3,
    E8M0,
    FP16,
    FP32,
    INT8,
    INT16,
    PER_ROW,
    Format,
    decoded_components,
    decoded_number,
)
from collage.backends.triton.numbers import Expanded, Kahan, Paper, Register, total
from collage.backends.triton.words import cut, extended, row_scale, scaled_size, split


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
def single_encode(number, random, largest, F: tl.constexpr):
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
def expansion_encode(number, random, largest, F: tl.constexpr):
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
def expansion_broken(planes, F: tl.constexpr):
    n: tl.constexpr = len(F.words)
    fits = within(planes[n - 2], planes[n - 1], 0.5, F.stochastic, F.words[0])
    for k in tl.static_range(n - 2):
        fits = fits & within(planes[k], planes[k + 1], 0.5, False, F.words[0])
    return fits == 0


@triton.jit
def within(hi, lo, ULPS: tl.constexpr, STOCHASTIC: tl.constexpr, WORD: tl.constexpr):
    """Whether lo is within so many ulps of hi, and one step: stochastic rounding of a tail just above may go there.

    To nearest, hi is 0 only for what lo, too, rounds to 0.
    """
    ulp: tl.constexpr = 2.0 ** (1 - WORD.precision)
    least: tl.constexpr = 2.0**WORD.emin
    bound = tl.maximum(float_of(bits_of(hi) & 0x7F800000), least) * (ULPS * ulp)
    limit = bound + tl.maximum(bound * ulp, least * ulp)
    paired = is_finite(hi)
    if not STOCHASTIC:
        paired = paired & (hi != 0.0)
    return tl.where(paired, tl.abs(lo) <= limit, lo == 0.0)


def expansion(word: Any, n: int, stochastic: bool = False) -> Format:
    return Format(
        (word,) * n, expansion_number, expansion_encode, expansion_decode, every, expansion_broken, stochastic
    )


@triton.jit
def master_encode(number, random, largest, F: tl.constexpr):
    x = number.value().x
    return F.words[0].encode(x), x


@triton.jit
def master_decode(planes, F: tl.constexpr):
    return planes[1]


@triton.jit
def master_broken(planes, F: tl.constexpr):
    return alike(planes[0], F.words[0].decode(F.words[0].encode(planes[1]))) == 0


@triton.jit
def alike(a, b):
    """Whether they are one number, or both none."""
    return (a == b) | ((a != a) & (b != b))


def master(word: Any) -> Format:
    return Format((word, FP32), decoded_number, master_encode, master_decode, decoded_components, master_broken)


@triton.jit
def scaled_master_encode(number, random, largest, F: tl.constexpr):
    x, scale = number.value().x, row_scale(largest[0])
    return shown(x, scale, F), x, scale


@triton.jit
def scaled_master_broken(planes, F: tl.constexpr):
    code = shown(planes[1], bits_of(planes[2]) >> 23, F)
    return alike(planes[0], F.words[0].decode(code)) == 0


@triton.jit
def shown(x, scale, F: tl.constexpr):
    """The visible plane of a word with 16 bits more, under these scales."""
    hi, _ = split(x, scaled_size(x, scale), x, 16, F)
    return hi


def scaled_master(word: Any) -> Format:
    """Under a power of two per row."""
    return Format(
        (word, FP32, E8M0), decoded_number, scaled_master_encode, master_decode, decoded_components,
        scaled_master_broken, shared=(1, 1, PER_ROW.value),
    )  # fmt: skip


@triton.jit
def kahan_number(planes, ROUND: tl.constexpr, F: tl.constexpr):
    if ROUND is same:  # it is only looked at: the recurrence is one in bfloat16
        return Register(Real(total(planes), same))
    else:
        return Kahan(Real(planes[0], ROUND), Real(planes[1], ROUND))


@triton.jit
def kahan_broken(planes, F: tl.constexpr):
    return within(planes[0], planes[1], 1.0, False, F.words[0]) == 0  # where |delta| > |theta| it reaches an ulp


FORMATS = {
    "fp32": single(FP32),
    "bf16": single(BF16),
    "fp16": single(FP16),
    "bf16x2": expansion(BF16, 2),
    "bf16x3": expansion(BF16, 3),
    "fp16x2": expansion(FP16, 2),
    "bf16+int16": cut(INT16),
    "bf16+int8": cut(INT8),
    "fp16+int8": extended(FP16, INT8),
    "e4m3+int16": extended(E4M3, INT16, scaled=True),
    "e4m3+int8": extended(E4M3, INT8, scaled=True),
    "int8/128": blocks.signed(),
    "uint8/128": blocks.unsigned(),
    "bf16+fp32": master(BF16),
    "fp16+fp32": master(FP16),
    "e4m3+fp32": scaled_master(E4M3),
    "bf16+kahan": Format((BF16, BF16), kahan_number, expansion_encode, expansion_decode, every, kahan_broken),
    "bf16:sr": single(BF16, stochastic=True),
    "fp16:sr": single(FP16, stochastic=True),
    "bf16x2:sr": expansion(BF16, 2, stochastic=True),
    "bf16x3:sr": expansion(BF16, 3, stochastic=True),
    "fp16x2:sr": expansion(FP16, 2, stochastic=True),
    "bf16+int8:sr": cut(INT8, stochastic=True),
    "fp16+int8:sr": extended(FP16, INT8, stochastic=True),
    "e4m3+int16:sr": extended(E4M3, INT16, stochastic=True, scaled=True),
    "e4m3+int8:sr": extended(E4M3, INT8, stochastic=True, scaled=True),
    "int8/128:sr": blocks.signed(stochastic=True),
    "uint8/128:sr": blocks.unsigned(stochastic=True),
}
