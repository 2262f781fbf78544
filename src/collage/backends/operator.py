"""The torch operator that every step goes through: ``torch.ops.collage.step_``.

It reads ``step`` and ``lr`` from tensors and folds the constants itself, so that a compiled step is one opaque call
that neither breaks the graph nor compiles anew when the learning rate moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collage.backends import Batch, Region, Share, choose
from collage.rules.adamw import ADAMW
from collage.strategies import Strategy

RULES = {rule.name: rule for rule in (ADAMW,)}

NAME = "collage::step_"
SCHEMA = (
    "(Tensor(a!)[] planes, Tensor[] grads, Tensor(b!)[] steps, Tensor(c!) sums, Tensor lr, str rule, "
    "str strategy, str backend, int[] keys, int[] regions, float[] hyper, int seed, bool maximize) -> ()"
)


def step_(
    planes: Sequence[Tensor],  # of every parameter in turn: those of theta, then of the rule's other slots
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],  # 0-d int64: how many each parameter has made; counted up
    sums: Tensor,  # [parameters, 5] float64: reference.SUMS are added; [0, 5]: not measured
    lr: Tensor,  # 0-d
    rule: str,
    strategy: str,
    backend: str,
    keys: Sequence[int],  # of the parameters' random bits, as signed 64-bit; or none
    regions: Sequence[int],  # per parameter: dims, sizes, starts, strides; or none, where nothing is sharded
    hyper: Sequence[float],
    seed: int,  # signed 64-bit
    maximize: bool,
) -> None:
    """One step of all parameters of one group and strategy."""
    how = Strategy.parse(strategy)
    counts = [len(fmt.dtypes) for fmt in how.formats]
    assert len(planes) == len(grads) * sum(counts)
    places = _regions(regions) if regions else [None] * len(grads)
    numbers = torch.stack(list(steps)).tolist() if steps else []
    batches: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    shares = []
    rest = iter(planes)
    for k, grad in enumerate(grads):
        slots = tuple(tuple(next(rest) for _ in range(count)) for count in counts)
        key = keys[k] % 2**64 if keys else 0
        shares.append(Share(slots, grad, numbers[k] + 1, key, places[k], sums[k] if len(sums) else None))
        batches.setdefault((grad.device, grad.dtype), []).append(k)
    for (device, _), members in batches.items():
        own = [shares[k] for k in members]
        batch = Batch(RULES[rule], how, float(lr), tuple(hyper), maximize, seed % 2**64, own)
        choose(backend, device).step(batch)
    torch._foreach_add_(list(steps), 1)


def _regions(numbers: Sequence[int]) -> list[Region | None]:
    regions: list[Region | None] = []
    at = 0
    while at < len(numbers):
        dims = numbers[at]
        sizes, starts, strides = (tuple(numbers[at + 1 + k * dims : at + 1 + (k + 1) * dims]) for k in range(3))
        regions.append(Region(sizes, starts, strides))
        at += 1 + 3 * dims
    return regions


torch.library.define(NAME, SCHEMA)
torch.library.impl(NAME, "CompositeExplicitAutograd", step_)
torch.library.register_fake(NAME, lambda *_: None)
