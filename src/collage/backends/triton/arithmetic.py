"""The two arithmetics and error-free transforms, on blocks of float32 that hold float32 or bfloat16 numbers.

NARROW: every operation is computed in float32 and rounded once to bfloat16, which is the correctly rounded operation.
Rounding is done on integer bits: a compiler may fold a cast down and up into nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    return x - x == 0.0


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
def bf16_value(code):
    return float_of(code << 16)


@triton.jit
def rn(x, NARROW: tl.constexpr):
    """A float32 in a register of the arithmetic."""
    if NARROW:
        return bf16_value(bf16_code(x))
    else:
        return x


@triton.jit
def add(a, b, NARROW: tl.constexpr):
    return rn(a + b, NARROW)


@triton.jit
def sub(a, b, NARROW: tl.constexpr):
    return rn(a - b, NARROW)


@triton.jit
def mul(a, b, NARROW: tl.constexpr):
    return rn(a * b, NARROW)


@triton.jit
def div(a, b, NARROW: tl.constexpr):
    return rn(tl.div_rn(a, b), NARROW)


@triton.jit
def sqrt(a, NARROW: tl.constexpr):
    return rn(tl.sqrt_rn(a), NARROW)


@triton.jit
def two_sum(a, b):
    """s + e == a + b exactly, in bfloat16 (Knuth; mcf.two_sum)."""
    s = add(a, b, True)
    b_virtual = sub(s, a, True)
    return s, add(sub(a, sub(s, b_virtual, True), True), sub(b, b_virtual, True), True)


@triton.jit
def two_prod(a, b):
    """p + e == a * b exactly, in bfloat16; the float32 product is exact (mcf.two_prod)."""
    p = mul(a, b, True)
    return p, rn(a * b - p, True)


@triton.jit
def grow(hi, lo, a):
    """Collage, Algorithm 1 (mcf.grow)."""
    head, error = two_sum(hi, a)
    return two_sum(head, add(lo, error, True))


@triton.jit
def scale(hi, lo, c_hi, c_lo):
    """An expansion times a constant (mcf.mul)."""
    head, error = two_prod(hi, c_hi)
    return two_sum(head, add(add(mul(hi, c_lo, True), mul(lo, c_hi, True), True), error, True))
