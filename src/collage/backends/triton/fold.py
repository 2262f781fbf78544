"""The constants of a step, folded on the device in float64: what constants.py computes on the host, bit for bit.

For CUDA graphs: a captured step does not run host code again, so step and lr must be read where they live.
"""

from __future__ import annotations

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import bf16_code, bf16_value, bits_of, float_of
from collage.backends.triton.random import mix64


@triton.jit
def power(base, exponent):
    """By square-and-multiply, least significant bit first (constants.power)."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def rounded(x, NARROW: tl.constexpr):
    """A float64 rounded once to the arithmetic's dtype (constants.rounded)."""
    y = x.to(tl.float32)
    if NARROW:
        # First to odd: cut, and where that is not exact set the last bit. Then the second rounding does no harm.
        size = tl.abs(y)
        cut = tl.where(size.to(tl.float64) > tl.abs(x), bits_of(size) - 1, bits_of(size))
        cut = tl.where(float_of(cut).to(tl.float64) == tl.abs(x), cut, cut | 1)
        y = bf16_value(bf16_code(float_of(cut | (bits_of(y) & -0x80000000))))
    return y


@triton.jit
def fold(
    counters, keys, seed, lr, hyper, constants, streams,
    RULE: tl.constexpr, SETTINGS: tl.constexpr, NARROW: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """One program per tensor: its row of constants, and its stream of random bits (Stream.base).

    counters: addresses of the tensors' step counts, already counted up; seed: mixed once; lr, hyper: float64.
    """
    tensor = tl.program_id(0)
    t = tl.load(tl.load(counters + tensor).to(tl.pointer_type(tl.int64)))
    settings = ()
    for k in tl.static_range(SETTINGS):
        settings = settings + (tl.load(hyper + k),)
    values = RULE.fold(tl.load(lr), settings, t)
    c = constants + tensor * RULE.columns
    for k in tl.static_range(len(RULE.widths)):
        hi = rounded(values[k], NARROW)
        tl.store(c, hi)
        if RULE.widths[k] == 2:
            tl.store(c + 1, rounded(values[k] - hi.to(tl.float64), NARROW) if NARROW else 0.0)
        c += RULE.widths[k]
    if RANDOM:
        of_step = mix64(tl.load(seed).to(tl.uint64, bitcast=True) ^ t.to(tl.uint64))
        base = mix64(of_step ^ tl.load(keys + tensor).to(tl.uint64, bitcast=True))
        tl.store(streams + tensor, base.to(tl.int64, bitcast=True))
