"""Formats with planes of integers, from their definitions in exact arithmetic: words with a remainder, codes in blocks.

Written from the formats' contract. As in oracle.py, nothing here knows a line of collage: a word is a float of more
significand bits, rounded as any float; a code is a position on a logarithmic scale. A scale is a byte E: 2**(E - 127).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from oracle import SPECS, Spec, codes, decode, fractions, from_codes, nearest, stochastic
from torch import Tensor

BF16, FP16, E4M3, FP32 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32
INF, NAN = 0x7F800000, 0x7FC00000  # float32
TWO = Fraction(2)


def exact(x: Fraction) -> int:
    """Bit pattern of x, which must be a float32."""
    code = nearest(x, FP32)
    number = decode(code, SPECS[FP32])
    assert number is not None
    assert number * TWO ** SPECS[FP32].unit == x, f"{x} is no float32"
    return code


def scale_of(numbers: Iterable[Fraction | None], top: Fraction, least: int, most: int) -> int:
    """The smallest E with every finite number at most top * 2**(E - 127) in magnitude, within the bounds."""
    ratio = max((abs(x) for x in numbers if x is not None), default=Fraction(0)) / top
    if not ratio:
        return least
    power = ratio.numerator.bit_length() - ratio.denominator.bit_length()  # it is above 2**(power - 1)
    return min(max(127 + power + (ratio > TWO**power), least), most)


@dataclass(frozen=True)
class Remainder:
    """A float with ``bits`` more significand bits than the plane that shows it, and perhaps a power of two per row.

    What shows is its magnitude rounded half up; the rest, below 0 where that went up, is the other plane.
    """

    shown: torch.dtype
    bits: int
    scaled: bool = False

    @property
    def word(self) -> Spec:
        """bfloat16's goes up to what shows as Inf, and has an Inf of its own; others end where the largest shows."""
        own, half = SPECS[self.shown], 1 << (self.bits - 1)
        if self.shown == BF16:
            return Spec(
                own.width + self.bits, own.precision + self.bits, own.emin, ((own.max_code + 1) << self.bits) - 1
            )
        largest = (own.max_code << self.bits) + half - 1
        return Spec(own.width + self.bits, own.precision + self.bits, own.emin, largest, has_inf=False)

    def split(self, word: int) -> tuple[int, int]:
        """(bit pattern that shows, remainder) of a word with its sign."""
        own = SPECS[self.shown]
        magnitude = word & (self.word.sign - 1)
        shown = (magnitude + (1 << (self.bits - 1))) >> self.bits
        return shown | (own.sign if word & self.word.sign else 0), magnitude - (shown << self.bits)

    def planes_of(self, x: int, power: int, random: int | None) -> tuple[int, int]:
        """Of the bit pattern of a float32, under a scale of 2**power."""
        own, spec = SPECS[self.shown], SPECS[FP32]
        sign, number = (own.sign if x & spec.sign else 0), decode(x, spec)
        if x & (spec.sign - 1) > INF or (number is None and not own.has_inf):
            return own.nan_code, 0
        if number is None or (self.shown == FP16 and abs(number) * TWO**spec.unit >= 65520):
            return sign | (own.max_code + 1), 0
        y = number * TWO ** (spec.unit - power)
        word = nearest(y if random is None else stochastic(y, random, self.word), self.word)
        shown, rest = self.split(word & (self.word.sign - 1))
        return shown | sign, rest  # the sign of what rounds to 0 too

    def encode(self, x: Tensor, random: Tensor | None) -> tuple[Tensor, ...]:
        rows = x if self.scaled else x.reshape(1, -1)
        drawn = [None] * x.numel() if random is None else random.flatten().tolist()
        top = decode(SPECS[self.shown].max_code, SPECS[self.shown]) * TWO ** SPECS[self.shown].unit
        scales = [scale_of(fractions(row), top, 26, 246) if self.scaled else 127 for row in rows]
        powers = [scale - 127 for scale in scales for _ in range(rows.shape[1])]
        pairs = [self.planes_of(*each) for each in zip(codes(x).flatten().tolist(), powers, drawn, strict=True)]
        shown = from_codes([a for a, _ in pairs], self.shown).view(x.shape)
        rest = torch.tensor([b for _, b in pairs], dtype={8: torch.int8, 16: torch.int16}[self.bits]).view(x.shape)
        return (shown, rest, torch.tensor(scales, dtype=torch.uint8)) if self.scaled else (shown, rest)

    def value_of(self, shown: int, rest: int, power: int) -> int:
        """Bit pattern of the float32 that two planes stand for."""
        own = SPECS[self.shown]
        sign, magnitude = (1 << 31 if shown & own.sign else 0), shown & (own.sign - 1)
        if magnitude > own.max_code + own.has_inf:
            return NAN
        if magnitude == own.max_code + 1 and rest == 0:
            return INF | sign
        number = decode((magnitude << self.bits) + rest, self.word)
        assert number is not None, "no word"
        return exact(number * TWO ** (self.word.unit + power)) | sign

    def decode(self, planes: Sequence[Tensor]) -> Tensor:
        shown, rest, *scales = planes
        columns = shown.shape[-1] if self.scaled else 1
        powers = (
            [scale - 127 for scale in scales[0].tolist() for _ in range(columns)] if scales else [0] * shown.numel()
        )
        numbers = zip(codes(shown).flatten().tolist(), rest.flatten().tolist(), powers, strict=True)
        return from_codes([self.value_of(*each) for each in numbers], FP32).view(shown.shape)


@dataclass(frozen=True)
class Codes:
    """Codes whose logarithms are spaced as those of a piecewise linear k**(2**n), and a power of two per block of 128.

    From 2**n on a code is a position: 2**n octaves of numbers for every octave of codes, linear inside each. Below,
    numbers are multiples of a quantum. value(2**n) = 2**first.
    """

    dtype: torch.dtype
    n: int
    first: int
    top: int  # the largest code
    nan: int
    least: int  # scale

    @property
    def quantum(self) -> Fraction:
        """value(1)."""
        return TWO ** (self.first - self.n)

    def value(self, code: int) -> Fraction:
        """The number of a code from 0 to `top`, in units of the scale."""
        if code < 1 << self.n:
            return code * self.quantum
        octave = code.bit_length() - 1
        position = (octave - self.n + Fraction(code, 1 << octave) - 1) * (1 << self.n)
        whole = position.numerator // position.denominator
        return TWO ** (self.first + whole) * (1 + position - whole)

    def code(self, y: Fraction) -> Fraction:
        """The inverse, for any y >= 0: what lies between two codes is a code with a fraction.

        As accurate as float32: from 2**n on the position is rounded half up to 23 bits after the point of its octave.
        """
        if y < TWO**self.first:
            return y / self.quantum
        power = y.numerator.bit_length() - y.denominator.bit_length()
        power -= TWO**power > y
        position = (power - self.first + y / TWO**power - 1) / (1 << self.n)
        position = Fraction((position * (1 << 24) + 1) // 2, 1 << 23)
        octave = position.numerator // position.denominator
        return (1 << (self.n + octave)) * (1 + position - octave)

    def code_of(self, x: int, power: int, random: int | None) -> int:
        """Of the bit pattern of a float32, under a scale of 2**power."""
        number = decode(x, SPECS[FP32])
        if number is None or (number < 0 and self.dtype == torch.uint8):
            return self.nan
        fixed = round(self.code(abs(number) * TWO ** (SPECS[FP32].unit - power)) * (1 << 16))  # to even
        code = round(Fraction(fixed, 1 << 16)) if random is None else (fixed + random) >> 16
        code = min(code, self.top)
        if self.dtype == torch.uint8:
            return max(code, 1) if number else 0
        return -code if number < 0 else code

    def encode(self, x: Tensor, random: Tensor | None) -> tuple[Tensor, ...]:
        """x: [rows, columns]."""
        found, scales = [], []
        for k, row in enumerate(x):
            blocks = [fractions(block) for block in row.split(128)] if len(row) else []
            scales.append([scale_of(block, self.value(self.top), self.least, 254) for block in blocks])
            drawn = [None] * len(row) if random is None else random[k].tolist()
            powers = [scale - 127 for scale in scales[-1] for _ in range(128)]
            found.append([self.code_of(*each) for each in zip(codes(row).tolist(), powers, drawn, strict=False)])
        return torch.tensor(found, dtype=self.dtype).view(x.shape), torch.tensor(scales, dtype=torch.uint8)

    def value_of(self, code: int, scale: int) -> int:
        """Bit pattern of the float32. Scale 0 is that of new planes, whose codes are 0."""
        if code == self.nan:
            return NAN
        return exact(self.value(abs(code)) * TWO ** (scale - 127) if scale else Fraction(0)) | (code < 0) << 31

    def decode(self, planes: Sequence[Tensor]) -> Tensor:
        rows = zip(*(plane.tolist() for plane in planes), strict=True)
        found = [[self.value_of(code, scales[k // 128]) for k, code in enumerate(row)] for row, scales in rows]
        return from_codes(torch.tensor(found, dtype=torch.int64), FP32).view(planes[0].shape)


FORMS: dict[str, Remainder | Codes] = {
    "bf16+int16": Remainder(BF16, 16),
    "bf16+int8": Remainder(BF16, 8),
    "fp16+int8": Remainder(FP16, 8),
    "e4m3+int16": Remainder(E4M3, 16, scaled=True),
    "e4m3+int8": Remainder(E4M3, 8, scaled=True),
    "int8/128": Codes(torch.int8, 2, -19, 127, -128, 22),
    "uint8/128": Codes(torch.uint8, 3, -39, 254, 255, 43),
}


def form_of(name: str) -> Remainder | Codes:
    """The definition of a format; ``:sr`` only says that it is given random bits."""
    return FORMS[name.removesuffix(":sr")]
