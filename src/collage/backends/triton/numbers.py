"""Numbers that survive small increments: value, scaled(beta), grown(delta), and raised(other), the larger of two.

One for one what accumulators.py says. `parts` is what a format stores: (c0, representable; what is left for the other
components, unrounded), as float32.
"""

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import Real, grow, same, scale
from collage.backends.triton.language import aggregate


@aggregate
class Register:
    """One register: every format once it is decoded, and what an expansion becomes when it is scaled."""

    x: Real

    @triton.jit
    def value(self):
        return self.x

    @triton.jit
    def scaled(self, beta):
        return Register(self.x * beta[0])

    @triton.jit
    def grown(self, delta):
        return Register(self.x + delta)

    @triton.jit
    def raised(self, other):
        return raised_value(self, other)

    @triton.jit
    def parts(self, WORD: tl.constexpr):
        hi = WORD.decode(WORD.encode(self.x.x))
        return hi, self.x.x - hi


@aggregate
class Expanded:
    """c0 + c1 + ... in float32 arithmetic, all of one WORD. Grows the last one first: in one float32 sum it would see
    nothing."""

    components: tl.tuple
    WORD: tl.constexpr

    @triton.jit
    def value(self):
        return Real(total(self.components), same)

    @triton.jit
    def scaled(self, beta):
        return Register(self.value()).scaled(beta)

    @triton.jit
    def grown(self, delta):
        c = self.components
        r = c[len(c) - 1] + delta.x
        for k in tl.static_range(2, len(c)):
            r = c[len(c) - k] + r
        h = self.WORD.decode(self.WORD.encode(c[0] + r))
        return Expanded((h, (c[0] - h) + r), self.WORD)

    @triton.jit
    def raised(self, other):
        return raised_value(self, other)

    @triton.jit
    def parts(self, WORD: tl.constexpr):
        return self.components[0], total(self.components[1:])


@triton.jit
def raised_value(number, other):
    x, y = number.value(), other.value()
    return Register(chosen((y.x > x.x) | (y.x != y.x), y, x))


@triton.jit
def chosen(condition, a, b):
    return Real(tl.where(condition, a.x, b.x), a.ROUND)


@triton.jit
def total(components):
    """The sum, last component first."""
    x = components[len(components) - 1]
    for k in tl.static_range(2, len(components) + 1):
        x = x + components[len(components) - k]
    return x


@aggregate
class Paper:
    """hi + lo in bfloat16 arithmetic, as in the paper: rules read hi."""

    hi: Real
    lo: Real

    @triton.jit
    def value(self):
        return self.hi

    @triton.jit
    def scaled(self, beta):
        hi, lo = scale(self.hi, self.lo, beta)
        return Paper(hi, lo)

    @triton.jit
    def grown(self, delta):
        hi, lo = grow(self.hi, self.lo, delta)
        return Paper(hi, lo)

    @triton.jit
    def raised(self, other):
        higher = (other.hi.x > self.hi.x) | (other.hi.x != other.hi.x)
        return Paper(chosen(higher, other.hi, self.hi), chosen(higher, other.lo, self.lo))

    @triton.jit
    def parts(self, WORD: tl.constexpr):
        return self.hi.x, self.lo.x


@aggregate
class Kahan:
    """theta and the compensation of its next increment (Kahan 1965), in bfloat16 arithmetic."""

    hi: Real
    compensation: Real

    @triton.jit
    def value(self):
        return self.hi

    @triton.jit
    def scaled(self, beta):
        return Kahan(self.hi * beta[0], self.compensation)

    @triton.jit
    def grown(self, delta):
        y = delta + self.compensation
        s = self.hi + y
        return Kahan(s, (self.hi - s) + y)

    @triton.jit
    def parts(self, WORD: tl.constexpr):
        return self.hi.x, self.compensation.x
