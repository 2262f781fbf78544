"""Exact arithmetic on the numbers that bit patterns stand for, and a comparison of tensors that shows bits.

A number is an integer: how many times it holds its format's smallest subnormal, its *unit*. Python's integers have no
limit, so sums and products of them are exact, and cheap enough for millions of pairs. Nothing here knows a cast of
torch or a line of collage: decoding and rounding are written from the formats' definitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """A binary float format. Codes are bit patterns, unsigned."""

    width: int  # bits
    precision: int  # p, the hidden bit included
    emin: int  # exponent of the smallest normal number
    max_code: int  # the largest finite number, Omega
    has_inf: bool = True  # float8_e4m3fn has none: what overflows becomes Omega

    @property
    def unit(self) -> int:
        """log2 of the smallest subnormal."""
        return self.emin - self.precision + 1

    @property
    def sign(self) -> int:
        return 1 << (self.width - 1)

    @property
    def nan_code(self) -> int:
        """The quiet NaN."""
        return self.max_code + (1 + (1 << (self.precision - 2)) if self.has_inf else 1)


SPECS = {
    torch.float8_e5m2: Spec(8, 3, -14, 0x7B),
    torch.float8_e4m3fn: Spec(8, 4, -6, 0x7E, has_inf=False),
    torch.float16: Spec(16, 11, -14, 0x7BFF),
    torch.bfloat16: Spec(16, 8, -126, 0x7F7F),
    torch.float32: Spec(32, 24, -126, 0x7F7FFFFF),
}
Form = torch.dtype | Spec  # a format: a row of SPECS, or one that no dtype has
_INTEGER = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def codes(x: Tensor) -> Tensor:
    """The bit patterns of floats or integers, unsigned, as int64."""
    width = 8 * x.dtype.itemsize
    bits = x.view(_INTEGER[width]).to(torch.int64)
    return bits if width == 64 else bits & ((1 << width) - 1)


def from_codes(bits: Tensor | list[int], dtype: torch.dtype) -> Tensor:
    """The inverse of `codes`."""
    width = 8 * dtype.itemsize
    bits = torch.as_tensor(bits, dtype=torch.int64)
    return (bits - ((bits >> (width - 1)) << width)).to(_INTEGER[width]).view(dtype)


def decode(code: int, spec: Spec) -> int | None:
    """The number of a bit pattern, in units; None for Inf and NaN."""
    magnitude = code & (spec.sign - 1)
    if magnitude > spec.max_code:
        return None
    exponent, fraction = divmod(magnitude, 1 << (spec.precision - 1))
    number = fraction if exponent == 0 else (fraction + (1 << (spec.precision - 1))) << (exponent - 1)
    return -number if code & spec.sign else number


@cache
def _table(dtype: torch.dtype) -> list[int | None]:
    return [decode(code, SPECS[dtype]) for code in range(1 << SPECS[dtype].width)]


def units(x: Tensor) -> list[int | None]:
    """The exact numbers of a tensor, in units of its format's smallest subnormal; None for Inf and NaN."""
    if x.dtype.itemsize > 2:
        return [decode(code, SPECS[x.dtype]) for code in codes(x).flatten().tolist()]
    table = _table(x.dtype)
    return [table[code] for code in codes(x).flatten().tolist()]


def fractions(x: Tensor) -> list[Fraction | None]:
    """The exact numbers of a tensor; None for Inf and NaN."""
    unit = Fraction(2) ** SPECS[x.dtype].unit
    return [None if number is None else number * unit for number in units(x)]


def spec_of(form: Form) -> Spec:
    """The format itself."""
    return form if isinstance(form, Spec) else SPECS[form]


def nearest(x: Fraction | int, form: Form) -> int:
    """Bit pattern of x rounded once to nearest, ties to even, subnormals kept.

    What rounds beyond Omega in an unbounded exponent range overflows: to Inf, or to Omega where there is no Inf. Zero
    is +0, and what is negative and rounds to zero is -0.
    """
    return _nearest(x.numerator, x.denominator, spec_of(form))


def nearest_units(x: int, dtype: torch.dtype, unit: int | None = None) -> int:
    """`nearest` of x * 2**unit, unit <= 0; by default x is in the format's own units."""
    spec = SPECS[dtype]
    return _nearest(x, 1 << -(spec.unit if unit is None else unit), spec)


def _nearest(numerator: int, denominator: int, spec: Spec) -> int:
    n, d = abs(numerator), denominator
    exponent = n.bit_length() - d.bit_length()  # of n / d, or one more
    if (n << -exponent if exponent < 0 else n) < (d << exponent if exponent > 0 else d):
        exponent -= 1
    quantum = max(exponent - spec.precision + 1, spec.unit)
    n, d = (n << -quantum, d) if quantum < 0 else (n, d << quantum)
    steps, rest = divmod(n, d)
    steps += 2 * rest > d or (2 * rest == d and steps % 2)
    # In a binade above the first, steps carries the hidden bit: it adds one to the exponent field.
    code = ((quantum - spec.unit) << (spec.precision - 1)) + steps if n else 0
    if code > spec.max_code:
        code = spec.max_code + spec.has_inf
    return code | (spec.sign if numerator < 0 else 0)


def half_ulp(x: Fraction, form: Form) -> Fraction:
    """Half the distance between the numbers of the format around x."""
    spec = spec_of(form)
    n, d = abs(x.numerator), x.denominator  # d is a power of two
    exponent = n.bit_length() - d.bit_length() if n else spec.emin
    return Fraction(2) ** (max(exponent, spec.emin) - spec.precision)


def stochastic(x: Fraction, random: int, form: Form) -> Fraction:
    """x rounded stochastically: up in magnitude if the part dropped, in 2**-16 ulps, and the random bits carry.

    Of the 65,536 values of `random` so many carry as the part dropped says, itself rounded to a multiple of 2**-16
    (half up). Never beyond Omega.
    """
    ulp, spec = 2 * half_ulp(x, form), spec_of(form)
    steps = abs(x) // ulp
    part = (abs(x) / ulp - steps) * (1 << 16) + Fraction(1, 2)
    steps += (part.numerator // part.denominator) + random >= 1 << 16
    largest = decode(spec.max_code, spec) or 0
    return (-1 if x < 0 else 1) * min(steps * ulp, largest * Fraction(2) ** spec.unit)


def rounded(numbers: list[Fraction], dtype: torch.dtype) -> Tensor:
    """A tensor of exact numbers, each rounded once."""
    return from_codes([nearest(x, dtype) for x in numbers], dtype)


def every(dtype: torch.dtype) -> Tensor:
    """All bit patterns of a format of at most 16 bits."""
    return from_codes(torch.arange(1 << SPECS[dtype].width), dtype)


def random_patterns(dtype: torch.dtype, size: int, seed: int) -> Tensor:
    """Uniform bit patterns, NaN and Inf among them; one in 16 is a zero or a subnormal."""
    g = torch.Generator().manual_seed(seed)
    spec = SPECS[dtype]
    bits = torch.randint(0, 1 << spec.width, (size,), generator=g)
    tiny = bits & (spec.sign | ((1 << (spec.precision - 1)) - 1))
    return from_codes(torch.where(torch.randint(0, 16, (size,), generator=g) == 0, tiny, bits), dtype)


def ended(x: Tensor, seed: int) -> Tensor:
    """The same float32 cut somewhere, with a last bit set: whatever a format drops of them is often exactly a half."""
    place = torch.randint(0, 23, x.shape, generator=torch.Generator().manual_seed(seed))
    return from_codes(((codes(x) >> place) | 1) << place, torch.float32)


def spread(rows: int, columns: int, seed: int) -> Tensor:
    """float32 [rows, columns]: each row up to 45 octaves below a maximum anywhere in the range, half of them `ended`.

    The first row's is in the last binade.
    """
    g = torch.Generator().manual_seed(seed)
    top = torch.randint(-150, 128, (rows, 1), generator=g)
    top[0] = 127
    below = torch.randint(0, 46, (rows, columns), generator=g) * torch.randint(0, 2, (rows, columns), generator=g)
    sign = torch.randint(0, 2, (rows, columns), generator=g) * 2 - 1
    x = (torch.ldexp(torch.rand(rows, columns, generator=g).double() + 1, top - below) * sign).float()
    return torch.where(torch.arange(rows)[:, None] % 2 == 0, x, ended(x, seed))
