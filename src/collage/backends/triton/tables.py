"""What a launch is told of its tensors: a table with a row for each, which block is of which, sizes and strides.

Most of it does not change between steps: it is made anew only if addresses, sizes, strides or regions have.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from collage.backends.batch import Region
from collage.backends.triton import memory
from collage.layout import as_rows
from collage.rng import mix64, signed

BLOCK: int = memory.BLOCK.value
VECTOR: int = memory.VECTOR.value
NUMEL, FIRST, ROW, OFFSET, ALIGNED, LAYOUT, DIMS, REGION, REGION_DIMS, WIDTH, ADDRESSES = range(
    memory.ADDRESSES.value + 1
)
KEPT = 32  # layouts: one for every set of parameters that steps together


@dataclass(eq=False)
class Layout:
    """Everything but what changes with every step."""

    facts: tuple[Any, ...]
    rows: Tensor  # on the host, as memory.py describes them
    shapes: Tensor  # on the host: sizes and strides that rows point into
    first: list[int]  # number of each tensor's first block, and of all blocks
    owners: Tensor | None = None  # on the device


_layouts: OrderedDict[tuple[int, ...], Layout] = OrderedDict()


def layout_of(
    planes: Sequence[Tensor], fronts: Sequence[Tensor], width: int, regions: Sequence[Region], unit: int,
    kept: dict[str, Any] | None = None,
) -> Layout:  # fmt: skip
    """Of tensors with so many planes each. fronts: their gradients, say; or none. kept: of planes that are the same.

    unit: how many elements of a row must not be parted; 1: rows do not matter.
    """
    fronts_in_order, name = all(map(Tensor.is_contiguous, fronts)), f"layout by {unit}"
    if kept and name in kept and fronts_in_order:
        known: Layout = kept[name]
        return known
    found = _found(planes, fronts, width, regions, unit)
    if kept is not None and not found.facts[3]:
        kept[name] = found
    return found


def _found(
    planes: Sequence[Tensor], fronts: Sequence[Tensor], width: int, regions: Sequence[Region], unit: int
) -> Layout:
    visible = planes[::width]
    in_order = all(map(Tensor.is_contiguous, planes)) and all(map(Tensor.is_contiguous, fronts))
    everything = [] if in_order else [*planes, *fronts]
    shaped = visible if unit > 1 else everything
    facts = (
        list(map(Tensor.data_ptr, planes)), list(map(Tensor.numel, visible)), list(regions),
        [tensor.stride() for tensor in everything], [tensor.shape for tensor in shaped],
    )  # fmt: skip
    key = (facts[0][0], len(planes), width, unit)
    known = _layouts.pop(key, None)
    if known is None or known.facts != facts:
        known = _lay_out(facts, planes, [] if in_order else fronts, width, unit)
    _layouts[key] = known
    if len(_layouts) > KEPT:
        _layouts.popitem(last=False)
    return known


def _lay_out(
    facts: tuple[Any, ...], planes: Sequence[Tensor], strided: Sequence[Tensor], width: int, unit: int
) -> Layout:
    addresses, numels, regions, strides, _ = facts
    n = len(numels)
    widths = [_run(plane, unit) for plane in planes[::width]]
    blocks = [numel // max(1, columns) * -(-columns // BLOCK) for numel, columns in zip(numels, widths, strict=True)]
    first = list(accumulate(blocks, initial=0))
    rows = torch.zeros(n, ADDRESSES + 1 + width, dtype=torch.int64, device="cpu")
    rows[:, ADDRESSES + 1 :] = table_of(addresses).view(n, width)
    rows[:, NUMEL], rows[:, FIRST], rows[:, WIDTH] = table_of(numels), table_of(first[:-1]), table_of(widths)
    in_order = (rows[:, WIDTH] == rows[:, NUMEL]) | (rows[:, WIDTH] % VECTOR == 0)
    rows[:, ALIGNED] = ((rows[:, ADDRESSES + 1 :] % 16 == 0).all(1) & in_order).long()
    shapes = [0]
    if regions or strides:
        for k, row in enumerate(rows):
            own = [strided[k]] if strided else [planes[k * width]]
            in_memory = _in_memory([*own, *planes[k * width : (k + 1) * width]]) if strides else []
            _describe(row, in_memory, *(_place(regions[k]) if regions else (0, [])), shapes)
    return Layout(facts, rows, table_of(shapes), first)


def _run(plane: Tensor, unit: int) -> int:
    """How many elements blocks of the walk are cut out of: a row's, if it is no multiple of the unit; or all."""
    columns = as_rows(plane.shape)[1] if unit > 1 else 1
    return columns if columns % unit else plane.numel()


def _in_memory(tensors: Sequence[Tensor]) -> list[int]:
    """Sizes, then the strides of every tensor; nothing if all are contiguous."""
    if all(map(Tensor.is_contiguous, tensors)):
        return []
    shape = tensors[0].shape
    strides = [tensor.stride() if tensor.shape == shape else [0] * len(shape) for tensor in tensors]
    return [*shape, *chain.from_iterable(strides)]


def _describe(row: Tensor, layout: list[int], offset: int, place: list[int], shapes: list[int]) -> None:
    """Where a tensor's elements lie in memory, and from which index on in the unsharded tensor, if not in order."""
    row[OFFSET] = offset
    row[LAYOUT], row[DIMS] = len(shapes), len(layout) // (len(row) - ADDRESSES + 1)
    shapes += layout
    row[REGION], row[REGION_DIMS] = len(shapes), len(place) // 2
    shapes += place
    if layout or place:
        _require_small(int(row[NUMEL]))
        row[ALIGNED] = 0


def _place(region: Region) -> tuple[int, list[int]]:
    """(index of the first element in the unsharded tensor, sizes and strides there; none if it is one run)."""
    offset = sum(start * stride for start, stride in zip(region.starts, region.strides, strict=True))
    run = 1
    for size, stride in reversed(list(zip(region.sizes, region.strides, strict=True))):
        if size != 1 and stride != run:
            return offset, [*region.sizes, *region.strides]
        run *= size
    return offset, []


def _require_small(numel: int) -> None:
    if numel >= 2**31:
        raise ValueError(
            f"params: a tensor of {numel} elements that is not contiguous, or sharded by columns; from 2**31 on the "
            "Triton backend needs contiguous ones (p.data = p.data.contiguous()), or use backend='reference'"
        )


def rows_of(layout: Layout, fronts: Sequence[Tensor], which: Sequence[int] = ()) -> Tensor:
    """The table of this step. which: row of constants that each tensor takes; none: the first."""
    rows = layout.rows.clone()
    if fronts:
        addresses = table_of(list(map(Tensor.data_ptr, fronts)))
        rows[:, ADDRESSES] = addresses
        rows[:, ALIGNED] &= addresses % 16 == 0
    if which:
        rows[:, ROW] = table_of(which)
    return rows


def owners_of(layout: Layout) -> Tensor:
    """Which tensor each block is of."""
    return torch.repeat_interleave(table_of(layout.first).diff()).to(torch.int32)


def bases_of(seed: int, steps: Sequence[int], keys: Sequence[int]) -> Tensor:
    """`Stream.base` of many parameters, int64."""
    of_step = {step: signed(mix64(mix64(seed) ^ step)) for step in set(steps)}
    return _mix64(table_of([of_step[step] for step in steps]) ^ table_of(list(map(signed, keys))))


def _mix64(z: Tensor) -> Tensor:
    """rng.mix64 of many numbers, held in int64."""
    z = z + signed(0x9E3779B97F4A7C15)
    z = (z ^ _right(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ _right(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ _right(z, 31)


def _right(z: Tensor, by: int) -> Tensor:
    """A shift that brings in zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)


table_of = partial(torch.tensor, dtype=torch.int64, device="cpu")  # whatever torch's default device and dtype are
