"""Planes in memory <-> numbers in registers. One for one what formats.py says.

A format is an integer that a compiler reads as a constant: its kind, the dtype of plane 0, and whether it rounds
stochastically. `CODES` is the table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import (
    bf16_code,
    bf16_stochastic_code,
    bf16_value,
    bits_of,
    float_of,
    fp16_code,
    is_finite,
    rn,
)
from collage.backends.triton.numbers import EXPANDED, KAHAN, PAPER, REGISTER, parts

SINGLE, PAIR, MASTER, COMPENSATED = (tl.constexpr(kind) for kind in range(4))
FP32, BF16, FP16 = (tl.constexpr(4 * component) for component in range(3))
STOCHASTIC = tl.constexpr(16)

# Ways to the elements of a block: all there, in order, aligned to 16 bytes (so a thread moves 16 bytes at once); in
# order under a mask; by sizes and strides.
WHOLE, MASKED, STRIDED = (tl.constexpr(way) for way in range(3))

CODES = {
    "fp32": SINGLE.value + FP32.value,
    "bf16": SINGLE.value + BF16.value,
    "fp16": SINGLE.value + FP16.value,
    "bf16x2": PAIR.value + BF16.value,
    "bf16+fp32": MASTER.value + BF16.value,
    "bf16+kahan": COMPENSATED.value + BF16.value,
    "bf16:sr": SINGLE.value + BF16.value + STOCHASTIC.value,
    "bf16x2:sr": PAIR.value + BF16.value + STOCHASTIC.value,
}


@triton.jit
def read(plane, offsets, mask, COMPONENT: tl.constexpr, WAY: tl.constexpr):
    """A plane's elements as float32."""
    if COMPONENT == FP32:
        pointer = plane.to(tl.pointer_type(tl.float32))
    elif COMPONENT == FP16:
        pointer = plane.to(tl.pointer_type(tl.float16))
    else:
        pointer = plane.to(tl.pointer_type(tl.int16))
    if WAY == WHOLE:
        x = tl.load(tl.multiple_of(pointer, 16) + offsets)
    else:
        x = tl.load(pointer + offsets, mask=mask, other=0)
    if COMPONENT == BF16:
        return bf16_value(x.to(tl.int32))
    else:
        return x.to(tl.float32)


@triton.jit
def write(plane, offsets, mask, code, COMPONENT: tl.constexpr, WAY: tl.constexpr):
    if COMPONENT == FP32:
        pointer = plane.to(tl.pointer_type(tl.float32))
        x = code
    else:
        pointer = plane.to(tl.pointer_type(tl.int16))
        x = code.to(tl.int16)
    if WAY == WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + offsets, x)
    else:
        tl.store(pointer + offsets, x, mask=mask)


@triton.jit
def load(planes, first, other, mask, FORMAT: tl.constexpr, WAY: tl.constexpr):
    """Both planes; a format with one has it twice. planes: their addresses; first, other: offsets into them."""
    hi = read(tl.load(planes), first, mask, FORMAT % 16 // 4 * 4, WAY)
    if FORMAT % 4 == SINGLE:
        return hi, hi
    elif FORMAT % 4 == MASTER:
        return hi, read(tl.load(planes + 1), other, mask, FP32, WAY)
    else:
        return hi, read(tl.load(planes + 1), other, mask, BF16, WAY)


@triton.jit
def kind_of(FORMAT: tl.constexpr, NARROW: tl.constexpr):
    """The kind of number that a format is in the registers of an arithmetic."""
    if FORMAT % 4 == COMPENSATED:
        return KAHAN
    elif FORMAT % 4 != PAIR:
        return REGISTER
    elif NARROW:
        return PAPER
    else:
        return EXPANDED


@triton.jit
def rounded(x, random, COMPONENT: tl.constexpr, FORMAT: tl.constexpr):
    if COMPONENT == FP32:
        return x
    elif COMPONENT == FP16:
        return fp16_code(x)
    elif FORMAT >= STOCHASTIC:
        return bf16_stochastic_code(x, random)
    else:
        return bf16_code(x)


@triton.jit
def encode(a, b, random, KIND: tl.constexpr, FORMAT: tl.constexpr):
    """Codes of the new planes of a number. A format with one plane has its code twice."""
    if FORMAT % 4 == SINGLE:
        code = rounded(a, random, FORMAT % 16 // 4 * 4, FORMAT)
        return code, code
    elif FORMAT % 4 == MASTER:
        return bf16_code(a), a
    else:
        hi, rest = parts(a, b, KIND)
        rest = tl.where(is_finite(hi + rest), rest, 0.0)
        return bf16_code(hi), rounded(rest, random, BF16, FORMAT)


@triton.jit
def value_of(code, COMPONENT: tl.constexpr):
    """The float32 of a code that `encode` made."""
    if COMPONENT == BF16:
        return bf16_value(code)
    elif COMPONENT == FP16:
        return code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return code


@triton.jit
def is_broken(hi, lo, FORMAT: tl.constexpr):
    """Whether no `encode` could have left these two planes: plane 0 was changed alone. 0 and 0, padding, is whole."""
    if FORMAT % 4 == MASTER:
        cast = rn(lo, True)
        return ((hi == cast) | ((hi != hi) & (cast != cast))) == 0
    else:
        binade = float_of(bits_of(hi) & 0x7F800000)
        ulps = 1.0 if FORMAT % 4 == COMPENSATED else 0.5
        bound = tl.maximum(binade, 2.0**-126) * (ulps * 2.0**-7)
        limit = bound + tl.maximum(bound * 2.0**-7, 2.0**-133)
        paired = is_finite(hi)
        if FORMAT < STOCHASTIC:
            paired = paired & (hi != 0.0)
        return tl.where(paired, tl.abs(lo) <= limit, lo == 0.0) == 0
