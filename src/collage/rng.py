"""Counter-based random bits for stochastic rounding: reproducible, and independent of sharding, device and threads.

The bits of an element are a pure function of (seed, step, parameter key, state prefix of the slot, 64-bit row-major
index in the unsharded tensor). A strong 64-bit mix turns everything but the low 32 bits of the index into two 32-bit
keys, once per tensor; each element then costs four 32-bit multiplications in all for a word, of which Adam's three
slots take 16 bits each. It is cheaper than Philox, vectorises everywhere, and its bits pass the tests of bias and
correlation in ``tests/test_rng.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_M32, _M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


@cache
def key_of(name: str | int) -> int:
    """64-bit key of a parameter: a stable hash of its name, or its position where it has none."""
    if isinstance(name, int):
        return name
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def mix64(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (z + 0x9E3779B97F4A7C15) & _M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _M64
    return z ^ (z >> 31)


class Draw(NamedTuple):
    """Which bits a slot draws: the salt of its words (0: the words of the stream itself), and which part of a word."""

    salt: int
    part: int


_SHARED = {"param": Draw(0, 0), "exp_avg": Draw(0, 1), "exp_avg_sq": Draw(0, 2)}  # one word for Adam's three


@cache
def draw_of(prefix: str) -> Draw:
    """What the slot of that state prefix draws: bits that no other slot has, of averages and accumulators too."""
    return _SHARED.get(prefix) or Draw(key_of(prefix), 0)


@lru_cache(maxsize=64)
def _of_step(seed: int, step: int) -> int:
    return mix64(mix64(seed) ^ step)


@dataclass(frozen=True, slots=True)
class Stream:
    """The random bits of one parameter at one step.

    >>> Stream(seed=0, step=1, key=key_of("wte")).bits(torch.arange(3), "param").tolist()
    [39238, 40713, 14651]
    """

    seed: int
    step: int
    key: int

    @property
    def base(self) -> int:
        """Everything but the element's index, mixed to 64 bits."""
        return mix64(_of_step(self.seed, self.step) ^ self.key)

    def keys(self, index_high: int, salt: int = 0) -> tuple[int, int]:
        """Two 32-bit keys for the elements whose index has these high 32 bits."""
        mixed = mix64((mix64(self.base ^ salt) if salt else self.base) ^ index_high)
        return mixed & _M32, mixed >> 32

    def bits(self, index: Tensor, prefix: str) -> Tensor:
        """16 random bits per element.

        Args:
            index: int64, row-major index in the unsharded tensor.
            prefix: of the slot's state keys: "param", "exp_avg", ... Pairwise independent.

        Returns:
            int32 in [0, 2**16), of index's shape.
        """
        salt, part = draw_of(prefix)
        x = torch.empty_like(index)
        high = index >> 32
        for h in range(int(high.min()), int(high.max()) + 1) if index.numel() else ():
            x = torch.where(high == h, _mix32(index & _M32, *self.keys(h, salt)), x)
        word = (x, x >> 16, ((x * 0x9E3779B1) & _M32) >> 16)[part]
        return (word & 0xFFFF).to(torch.int32)


def bases(seed: int, steps: Sequence[int], keys: Sequence[int]) -> list[int]:
    """`Stream.base` of many parameters."""
    return [Stream(seed, step, key).base for step, key in zip(steps, keys, strict=True)]


def signed(number: int) -> int:
    """A number below 2**64 with the bits of a signed one, as tensors and operators take them."""
    return number - 2**64 if number >= 2**63 else number


def _mix32(x: Tensor, key0: int, key1: int) -> Tensor:
    """Three keyed rounds of multiply and xor-shift (multipliers: Wellons' triple32). int64 tensors holding 32 bits."""
    x = ((x ^ key0) * 0xED5AD4BB) & _M32
    x = (((x ^ (x >> 16)) ^ key1) * 0xAC4C1B51) & _M32
    x = ((x ^ (x >> 15)) * 0x31848BAB) & _M32
    return x ^ (x >> 16)
