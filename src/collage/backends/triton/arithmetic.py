"""Rounding, a register of either arithmetic, and error-free transforms.

Blocks are float32 throughout. In bfloat16 arithmetic every operation is computed in float32 and rounded once, which is
the correctly rounded operation. Rounding is done on integer bits: a compiler may fold a cast down and up into nothing.
"""

import triton
import triton.language as tl

from collage.backends.triton.language import aggregate

SIGN = tl.constexpr(-(1 << 31))  # bits


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def negative(x):
    """Triton 3.6 computes -x as 0 - x, which is not -0 for 0."""
    return x * -1.0


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def same(x):
    """Rounding to float32, of a float32."""
    return x


@triton.jit
def bf16_code(x):
    """To nearest, ties to even (mcf.rn): int32 whose low 16 bits are the code."""
    bits = bits_of(x)
    code = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, code)


@triton.jit
def bf16_stochastic_code(x, random):
    """Up in magnitude with the probability of the part dropped; never from finite to Inf (mcf.sr)."""
    code = (bits_of(x) + random) >> 16
    overflown = ((code & 0x7FFF) == 0x7F80) & is_finite(x)
    code = tl.where(overflown, code - 1, code)
    return tl.where(x != x, 0x7FC0, code)


@triton.jit
def bf16_value(code):
    return float_of(code << 16)


@triton.jit
def bf16(x):
    """A float32 rounded to bfloat16."""
    return bf16_value(bf16_code(x))


@triton.jit
def fp16_code(x):
    """To nearest, ties to even, subnormals kept (mcf.rn)."""
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    code = ((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13) - (112 << 10)
    size = float_of(magnitude)
    code = tl.where(size < 2.0**-14, bits_of(size + 0.5) - 0x3F000000, code)  # 0.5: its ulp is the smallest subnormal
    code = tl.where(code > 0x7BFF, 0x7C00, code)
    code = tl.where(magnitude > 0x7F800000, 0x7E00, code | ((bits >> 16) & 0x8000))
    return code


@triton.jit
def word_code(magnitude, random, WIDE: tl.constexpr, EMIN: tl.constexpr, STOCHASTIC: tl.constexpr):
    """A float32's magnitude, as bits, rounded to a word: an exponent, from EMIN on, and WIDE bits of a significand.

    To nearest even, or up with the probability of the part dropped: where that is more than 16 bits, the random ones
    are stretched to as many.
    """
    first: tl.constexpr = 127 + EMIN
    exponent = tl.maximum(magnitude >> 23, 1)
    significand = tl.where(magnitude < 0x800000, magnitude, (magnitude & 0x7FFFFF) | 0x800000)
    dropped = 23 - WIDE + tl.maximum(first - exponent, 0)
    shift = tl.minimum(dropped, 30)
    significand = significand >> tl.minimum(dropped - shift, 31)  # rounding reaches no further down
    if STOCHASTIC:
        stretched = (2 * random + 1) << tl.maximum(shift - 17, 0)
        added = tl.where(shift <= 16, random >> tl.maximum(16 - shift, 0), stretched)
    else:
        added = (1 << (shift - 1)) - 1 + ((significand >> shift) & 1)
    return ((significand + added) >> shift) + (tl.maximum(exponent - first, 0) << WIDE)


@triton.jit
def fp16_stochastic_code(x, random):
    """Up in magnitude with the probability of the part dropped, never past the largest (mcf.sr)."""
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    code = word_code(magnitude, random, 10, -14, True)
    code = tl.where(magnitude == 0x7F800000, 0x7C00, tl.minimum(code, 0x7BFF)) | ((bits >> 16) & 0x8000)
    return tl.where(magnitude > 0x7F800000, 0x7E00, code)


@triton.jit
def fp16_value(code):
    return code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@aggregate
class Real:
    """A number in a register of the arithmetic that ROUND rounds to."""

    x: tl.tensor
    ROUND: tl.constexpr

    @triton.jit
    def __add__(self, other):
        return Real(self.ROUND(self.x + other.x), self.ROUND)

    @triton.jit
    def __sub__(self, other):
        return Real(self.ROUND(self.x - other.x), self.ROUND)

    @triton.jit
    def __mul__(self, other):
        return Real(self.ROUND(self.x * other.x), self.ROUND)

    @triton.jit
    def __truediv__(self, other):
        return Real(self.ROUND(tl.div_rn(self.x, other.x)), self.ROUND)


@triton.jit
def sqrt(a):
    return Real(a.ROUND(tl.sqrt_rn(a.x)), a.ROUND)


@triton.jit
def minus(a):
    return Real(negative(a.x), a.ROUND)


@triton.jit
def sign(a):
    """1, -1, or a itself where it is +-0 or NaN."""
    return Real(tl.where(a.x > 0.0, 1.0, tl.where(a.x < 0.0, -1.0, a.x)), a.ROUND)


@triton.jit
def two_sum(a, b):
    """s + e == a + b exactly (Knuth; mcf.two_sum)."""
    s = a + b
    b_virtual = s - a
    return s, (a - (s - b_virtual)) + (b - b_virtual)


@triton.jit
def two_prod(a, b):
    """p + e == a * b exactly, in bfloat16: the float32 product is exact (mcf.two_prod)."""
    p = a * b
    return p, Real(p.ROUND(a.x * b.x - p.x), p.ROUND)


@triton.jit
def grow(hi, lo, a):
    """Collage, Algorithm 1 (mcf.grow)."""
    head, error = two_sum(hi, a)
    return two_sum(head, lo + error)


@triton.jit
def scale(hi, lo, c):
    """An expansion times a constant, the expansion c (mcf.mul)."""
    head, error = two_prod(hi, c[0])
    return two_sum(head, (hi * c[1] + lo * c[0]) + error)
