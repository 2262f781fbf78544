"""What a word of a plane is, and what a format: rows of jit functions and numbers, which kernels take as constants."""

from dataclasses import dataclass, replace
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
    fp16_stochastic_code,
    fp16_value,
    same,
)
from collage.backends.triton.language import Row, static
from collage.backends.triton.numbers import Register


@dataclass(frozen=True, eq=False, repr=False)
class Word(Row):
    """An element of a plane.

    decode: what memory holds, as int32 or float32 -> what formats read. encode, stochastic: back. Of an int32 only the
    bits that memory has room for count. Of an integer, precision is all its bits.
    """

    memory: tl.dtype
    decode: Any
    encode: Any = None
    stochastic: Any = None
    precision: int = 24
    emin: int = -126
    max_code: int = 0
    inf_code: int = 0
    nan_code: int = 0
    overflow: int = 0x7F800000  # bits of the least float32 that becomes Inf


@triton.jit
def int8_value(code):
    return (code << 24) >> 24


@triton.jit
def int16_value(code):
    return (code << 16) >> 16


@triton.jit
def e4m3_value(code):
    """Its bits are a float32's, but for the bias of exponents."""
    x = float_of(((code << 24) >> 4) & -0x78100000) * 2.0**120  # sign, and seven bits from 20 on
    return tl.where(code & 0x7F == 0x7F, float("nan"), x)


@triton.jit
def uint8_value(code):
    return code & 0xFF


@triton.jit
def scale_value(code):
    """2**(code - 127); 0 of the code 0."""
    return float_of(code << 23)


FP32 = static(Word(tl.float32, same, same))
BF16 = static(Word(tl.int16, bf16_value, bf16_code, bf16_stochastic_code, 8))
FP16 = static(
    Word(tl.int16, fp16_value, fp16_code, fp16_stochastic_code, 11, -14, 0x7BFF, 0x7C00, 0x7E00, overflow=0x477FF000)
)
E4M3 = static(Word(tl.int8, e4m3_value, None, None, 4, -6, 0x7E, 0x7F, 0x7F))
INT8 = static(Word(tl.int8, int8_value, precision=8))
INT16 = static(Word(tl.int16, int16_value, precision=16))
UINT8 = static(Word(tl.uint8, uint8_value, precision=8))
E8M0 = static(Word(tl.uint8, scale_value))


PER_ROW = tl.constexpr(0)  # of `shared`: a word for all elements of a row
WHOLE_ROW = 1 << 62  # more elements than any row has


@dataclass(frozen=True, eq=False, repr=False)
class Format(Row):
    """How one number per element lies in memory. Every function is given the format's row, last.

    number: (planes, rounding of the arithmetic) -> number
    encode: (number, random bits, `largest`) -> codes of the new planes
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
    shared: tuple[int, ...] = ()  # elements that share a word, or PER_ROW, plane by plane; none: each has its own

    @property
    def per(self) -> tuple[int, ...]:
        return self.shared or (1,) * len(self.words)

    @property
    def unit(self) -> int:
        """How many elements of a row share words at most."""
        return WHOLE_ROW if self.whole_rows else max(self.per)

    @property
    def whole_rows(self) -> bool:
        """Whether a row's words take all of it: then a launch of its own finds the largest of each."""
        return PER_ROW.value in self.per

    @property
    def nearest(self) -> "Format":
        """The same, rounding to nearest."""
        return replace(self, stochastic=False)


@triton.jit
def decoded_number(planes, ROUND: tl.constexpr, F: tl.constexpr):
    """Of a format whose number is one register."""
    return Register(Real(F.decode(planes, F), ROUND))


@triton.jit
def decoded_components(planes, F: tl.constexpr):
    return (F.decode(planes, F),)


@triton.jit
def largest(number, mask, F: tl.constexpr):
    """For every plane with a word for some elements of a block: the bits of their largest finite magnitudes."""
    found = ()
    for p in tl.static_range(len(F.words)):
        if F.per[p] > 1:
            size = sizes(number.value().x, mask)
            size = tl.max(tl.reshape(size, [size.shape[0] // F.per[p], F.per[p]]), axis=1)
            found = found + (magnitudes(size),)
    return found


@triton.jit
def sizes(x, mask):
    """uint32 that increase with the magnitude: what is not finite wraps around to less than 0 has; what is not of the
    tensor has least."""
    return tl.where(mask, (bits_of(x).to(tl.uint32, bitcast=True) << 1) + 0x1000000, 0)


@triton.jit
def magnitudes(sizes):
    """The bits of `sizes`, of 0 if nothing was finite."""
    return ((tl.maximum(sizes, 0x1000000) - 0x1000000) >> 1).to(tl.int32)


@triton.jit
def spread(words, x):
    """Words that elements of x share -> one for each."""
    n: tl.constexpr = words.shape[0]
    return tl.reshape(tl.broadcast_to(tl.expand_dims(words, 1), [n, x.shape[0] // n]), [x.shape[0]])


@triton.jit
def scale_code(largest, EXPONENT: tl.constexpr, LIMIT: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    """The least power of two (a code of E8M0) that scales a magnitude, in bits, to at most that exponent and LIMIT."""
    code = (largest >> 23) - EXPONENT + ((largest & 0x7FFFFF) > LIMIT).to(tl.int32)
    return tl.minimum(tl.maximum(code, LEAST), MOST)


@triton.jit
def inverse(scale):
    """2**(127 - code), which is subnormal for 254."""
    return float_of(tl.where(scale == 254, 0x00400000, (254 - scale) << 23))
