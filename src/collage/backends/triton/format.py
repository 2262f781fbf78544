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


FP32 = static(Word(tl.float32, same, same))
BF16 = static(Word(tl.int16, bf16_value, bf16_code, bf16_stochastic_code, 8))
FP16 = static(
    Word(tl.int16, fp16_value, fp16_code, fp16_stochastic_code, 11, -14, 0x7BFF, 0x7C00, 0x7E00, overflow=0x477FF000)
)
INT8 = static(Word(tl.int8, int8_value, precision=8))
INT16 = static(Word(tl.int16, int16_value, precision=16))


@dataclass(frozen=True, eq=False, repr=False)
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
    shared: tuple[int, ...] = ()  # elements that share a word, plane by plane; none: a word for every element

    @property
    def per(self) -> tuple[int, ...]:
        return self.shared or (1,) * len(self.words)

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
def largest(x, mask, PER: tl.constexpr):
    """The largest magnitude of every PER elements of a block; what is not of the tensor does not count."""
    size = tl.where(mask, tl.abs(x), 0.0)
    return tl.max(tl.reshape(size, [size.shape[0] // PER, PER]), axis=1)


@triton.jit
def spread(words, PER: tl.constexpr):
    """Words for every PER elements -> one for each."""
    n: tl.constexpr = words.shape[0]
    return tl.reshape(tl.broadcast_to(tl.expand_dims(words, 1), [n, PER]), [n * PER])
