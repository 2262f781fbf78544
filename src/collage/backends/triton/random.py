"""Counter-based random bits for stochastic rounding: the definition is rng.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix64(z):
    """The finaliser of SplitMix64, on uint64."""
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def mix32(x, key0, key1):
    """Three keyed rounds of multiply and xor-shift, on uint32."""
    x = (x ^ key0) * 0xED5AD4BB
    x = ((x ^ (x >> 16)) ^ key1) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 16)


@triton.jit
def words(base, index):
    """32 random bits per element. base: of the parameter and step; index: int64, row-major in the unsharded tensor."""
    keys = mix64(base ^ (index >> 32).to(tl.uint64))
    return mix32(index.to(tl.uint32), keys.to(tl.uint32), (keys >> 32).to(tl.uint32))


@triton.jit
def words_of_run(base, first, lane):
    """`words` of the indices first + lane. Their high halves are two at most, so keys are mixed once for all."""
    high = (first >> 32).to(tl.uint64)
    keys, next_keys = mix64(base ^ high), mix64(base ^ (high + 1))
    low = first.to(tl.uint32)
    index = low + lane.to(tl.uint32)
    carried = index < low
    key0 = tl.where(carried, next_keys.to(tl.uint32), keys.to(tl.uint32))
    key1 = tl.where(carried, (next_keys >> 32).to(tl.uint32), (keys >> 32).to(tl.uint32))
    return mix32(index, key0, key1)


@triton.jit
def salted(base, SALT: tl.constexpr):
    """The base of a slot's own words. base: int64."""
    return mix64(base.to(tl.uint64, bitcast=True) ^ SALT).to(tl.int64, bitcast=True)


@triton.jit
def bits(word, PART: tl.constexpr):
    """16 bits of an element's word: one of three parts."""
    if PART == 0:
        return (word & 0xFFFF).to(tl.int32)
    elif PART == 1:
        return (word >> 16).to(tl.int32)
    else:
        return ((word * 0x9E3779B1) >> 16).to(tl.int32)
