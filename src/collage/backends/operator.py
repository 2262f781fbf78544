"""What every step goes through, and the torch operator that a compiled one sees: ``torch.ops.collage.step_``.

It reads ``step``, ``lr`` and the rule's other settings from tensors and folds the constants itself, so that a compiled
step is one opaque call that neither breaks the graph nor compiles anew when a schedule moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from collage.backends import Batch, Region, choose
from collage.rules import RULES
from collage.strategies import Strategy

_device, _dtype = map(attrgetter, ("device", "dtype"))

NAME = "collage::step_"
SCHEMA = (
    "(Tensor(a!)[] planes, Tensor[] grads, Tensor(b!)[] steps, Tensor(c!) sums, Tensor lr, Tensor hyper, str rule, "
    "str strategy, str backend, int[] keys, int[] regions, int seed, bool maximize, bool capturable) -> ()"
)


def step_(
    planes: Sequence[Tensor],  # of every parameter in turn: those of theta, then of the rule's other slots
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],  # 0-d int64: how many each parameter has made; counted up
    sums: Tensor,  # [parameters, 5] float64: reference.SUMS are added; [0, 5]: not measured
    lr: Tensor,  # 0-d
    hyper: Tensor,  # [rule's] float64, on the CPU
    rule: str,
    strategy: str,
    backend: str,
    keys: Sequence[int],  # of the parameters' random bits, as signed 64-bit; or none
    regions: Sequence[int],  # per parameter: dims, sizes, starts, strides; or none, where nothing is sharded
    seed: int,  # signed 64-bit
    maximize: bool,
    capturable: bool,  # read t and lr where they are, if the backend can: nothing waits for the device
) -> None:
    """One step of all parameters of one group and strategy."""
    columns = columns_of(planes, grads, steps, sums, keys, regions)
    carry_out(batch_of(rule, strategy, lr, hyper, maximize, seed, columns), backend, capturable)


def columns_of(
    planes: Sequence[Tensor], grads: Sequence[Tensor], steps: Sequence[Tensor], sums: Tensor, keys: Sequence[int],
    regions: Sequence[int],
) -> tuple[Any, ...]:  # fmt: skip
    """The columns of a batch out of an operator's arguments."""
    return planes, grads, (), [key % 2**64 for key in keys], regions_of(regions), list(sums), steps


def batch_of(
    rule: str, strategy: str, lr: Tensor, hyper: Tensor, maximize: bool, seed: int, columns: tuple[Any, ...]
) -> Batch:
    """The batch of an operator's arguments. Raises for a setting that becomes 0, before anything is counted."""
    known, own = Strategy.parse(strategy), RULES[rule]
    batch = Batch(own, known.formats(own.roles), known.register, lr, hyper.tolist(), maximize, seed % 2**64, *columns)
    if lr.is_cpu:  # reading it elsewhere would wait
        batch.constants(1)
    return batch


def carry_out(batch: Batch, backend: str, capturable: bool = False) -> None:
    """Count every parameter's steps up, and make the step of a batch whose counters are given.

    capturable: whether to read t, lr, scale and skip where they are, if the backends can: nothing waits for the device.
    """
    positions = _by_kind(batch.grads or batch.visible())
    backends = {kind: choose(backend, kind[0]) for kind in positions}
    counted = _counted(batch, capturable and all(chosen.FOLDS_ON_DEVICE for chosen in backends.values()))
    if counted is not None:
        for kind, chosen in backends.items():
            chosen.step(counted.take(positions[kind]))


def begun(batch: Batch, backend: str, capturable: bool = False) -> Batch | None:
    """`carry_out` up to where the backends step: they may be given the batch, or its parts. None: a skipped step."""
    places = set(map(_device, batch.visible()))
    return _counted(batch, capturable and all(choose(backend, place).FOLDS_ON_DEVICE for place in places))


def _counted(batch: Batch, on_device: bool) -> Batch | None:
    """The batch as a backend takes it, its steps counted up; None: it is skipped."""
    if not on_device and batch.skip is not None and bool(batch.skip):
        return None
    numbers = _count_up(batch, on_device)
    if on_device:
        return replace(batch, steps=())
    return replace(batch, lr=float(batch.lr), steps=numbers, counters=(), scale=float(batch.scale), skip=None)


def squares(grads: Sequence[Tensor]) -> Tensor:
    """[grads] float64, on the first one's device: the sum of the squares of each. Finite exactly if all of it is."""
    if not grads:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    result = torch.zeros(len(grads), dtype=torch.float64, device=grads[0].device)
    for (device, dtype), positions in _by_kind(grads).items():
        backend = choose("auto" if dtype.itemsize in (2, 4) else "reference", device)
        found = backend.squares([grads[k] for k in positions]).to(result.device)
        if len(positions) == len(grads):
            return found
        result[list(positions)] = found
    return result


def _by_kind(grads: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], Sequence[int]]:
    """Positions of the parameters of one device and gradient dtype."""
    devices, dtypes = list(map(_device, grads)), list(map(_dtype, grads))
    if len(set(devices)) == len(set(dtypes)) == 1:
        return {(devices[0], dtypes[0]): range(len(grads))}
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for k, kind in enumerate(zip(devices, dtypes, strict=True)):
        kinds.setdefault(kind, []).append(k)
    return dict(kinds)


def _count_up(batch: Batch, on_device: bool) -> list[int]:
    """Every counter plus one; the counts, unless they are to stay on the device.

    Before anything else is written, so that what cannot be counted is not updated either.
    """
    steps, addresses = list(batch.counters), (batch.kept or {}).get("counters")
    if addresses is None and (set(map(_dtype, steps)) - {torch.int64} or any(map(Tensor.dim, steps))):
        raise ValueError("step: needs a 0-d int64 tensor in each parameter's state; it was replaced by hand")
    if batch.skip is not None and on_device:
        torch._foreach_add_(steps, [1 - batch.skip.to(step.device, torch.int64).reshape(()) for step in steps])
        return []
    places = set(map(_device, steps))
    counting = choose("auto", places.pop()) if len(places) == 1 else choose("reference", places.pop())
    return counting.count_up(steps, addresses, read=not on_device)


def regions_of(numbers: Sequence[int]) -> list[Region]:
    regions: list[Region] = []
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
