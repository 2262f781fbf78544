"""The torch operator that every step goes through: ``torch.ops.collage.step_``.

It reads ``step`` and ``lr`` from tensors and folds the constants itself, so that a compiled step is one opaque call
that neither breaks the graph nor, with a tensor ``lr``, compiles anew when the learning rate moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

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
    ends = list(accumulate((len(fmt.dtypes) for fmt in how.formats), initial=0))
    assert len(planes) == len(grads) * ends[-1]
    numbers = _count_up(steps)
    places = _regions(regions) if regions else [None] * len(grads)
    rows = list(sums) if len(sums) else [None] * len(grads)
    batches: dict[tuple[torch.device, torch.dtype], list[Share]] = {}
    for k, grad in enumerate(grads):
        own = planes[k * ends[-1] : (k + 1) * ends[-1]]
        slots = tuple([own[i:j] for i, j in pairwise(ends)])
        share = Share(slots, grad, numbers[k], keys[k] % 2**64 if keys else 0, places[k], rows[k])
        batches.setdefault((grad.device, grad.dtype), []).append(share)
    for (device, _), shares in batches.items():
        batch = Batch(RULES[rule], how, float(lr), tuple(hyper), maximize, seed % 2**64, shares)
        choose(backend, device).step(batch)


def _count_up(steps: Sequence[Tensor]) -> list[int]:
    """Every counter plus one. Before anything else is written, so that what cannot be counted is not updated either."""
    counters = list(steps)
    if any(step.dtype != torch.int64 or step.dim() for step in counters):
        raise ValueError("step: needs a 0-d int64 tensor in each parameter's state; it was replaced by hand")
    torch._foreach_add_(counters, 1)
    numbers: list[int] = torch.stack(counters).tolist() if counters else []
    return numbers


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
