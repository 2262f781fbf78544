"""Numbers that survive small increments: value, scaled(beta), grown(delta). One for one what accumulators.py says.

A number is two blocks (a, b) and its KIND; a register has no b, and passes a twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import add, grow, mul, rn, scale, sub

REGISTER, EXPANDED, PAPER, KAHAN = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def value(a, b, KIND: tl.constexpr):
    if KIND == EXPANDED:
        return b + a
    else:
        return a


@triton.jit
def scaled(a, b, hi, lo, KIND: tl.constexpr, NARROW: tl.constexpr):
    """Times a constant, the expansion (hi, lo). Its kind is `scaled_kind`."""
    if KIND == PAPER:
        return scale(a, b, hi, lo)
    elif KIND == KAHAN:
        return mul(a, hi, NARROW), b
    else:
        x = mul(value(a, b, KIND), hi, NARROW)
        return x, x


@triton.jit
def scaled_kind(KIND: tl.constexpr):
    if KIND == EXPANDED:
        return REGISTER
    else:
        return KIND


@triton.jit
def grown(a, b, delta, KIND: tl.constexpr, NARROW: tl.constexpr):
    if KIND == EXPANDED:
        r = b + delta  # lo first: in one float32 sum the last component would see nothing
        h = rn(a + r, True)
        return h, (a - h) + r
    elif KIND == PAPER:
        return grow(a, b, delta)
    elif KIND == KAHAN:
        y = add(delta, b, NARROW)
        s = add(a, y, NARROW)
        return s, add(sub(a, s, NARROW), y, NARROW)
    else:
        x = add(a, delta, NARROW)
        return x, x


@triton.jit
def parts(a, b, KIND: tl.constexpr):
    """(visible component, what is left for the other, unrounded)."""
    if KIND == REGISTER:
        hi = rn(a, True)
        return hi, a - hi
    else:
        return a, b
