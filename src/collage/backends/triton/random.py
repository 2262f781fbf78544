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
def words(base, index):
    """32 random bits per element. base: of the parameter and step; index: int64, row-major in the unsharded tensor."""
    keys = mix64(base ^ (index >> 32).to(tl.uint64))
    x = index.to(tl.uint32)
    x = (x ^ keys.to(tl.uint32)) * 0xED5AD4BB
    x = ((x ^ (x >> 16)) ^ (keys >> 32).to(tl.uint32)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 16)


@triton.jit
def bits(word, SLOT: tl.constexpr):
    """16 bits for one of the slots out of an element's word."""
    if SLOT == 0:
        return (word & 0xFFFF).to(tl.int32)
    elif SLOT == 1:
        return (word >> 16).to(tl.int32)
    else:
        return ((word * 0x9E3779B1) >> 16).to(tl.int32)
