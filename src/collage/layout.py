"""How the planes of formats lie: shapes, first values, bytes, and how they are cut into pieces that belong together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Planes = Sequence[Tensor]
PIECE = 1 << 21  # elements


class Plane(NamedTuple):
    """One tensor of a format: what follows the slot's prefix in its state key, its dtype, and elements per word.

    A parameter is seen as [rows, columns] = (shape[0], all the rest); blocks lie along a row and never cross it, so a
    shard by rows holds whole ones.
    """

    suffix: str
    dtype: torch.dtype
    per: int | None = 1  # None: a word per row

    def shape(self, param: Sequence[int]) -> tuple[int, ...]:
        """Of the plane of a parameter (or of its local part) of that shape."""
        if self.per == 1:
            return tuple(param)
        rows, columns = as_rows(param)
        return (rows,) if self.per is None else (rows, -(-columns // self.per))


def as_rows(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) that a parameter is seen as where a format has blocks."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


class Layout(Protocol):
    """What has planes: a format."""

    @property
    def planes(self) -> tuple[Plane, ...]: ...

    @property
    def elementwise(self) -> bool: ...


def zeros(fmt: Layout, param: Tensor) -> list[Tensor]:
    """Planes that hold 0 for every element of a parameter, with its strides and placement where they have its shape."""
    return [
        torch.zeros_like(param, dtype=plane.dtype, requires_grad=False)
        if plane.per == 1
        else param.new_zeros(plane.shape(param.shape), dtype=plane.dtype)
        for plane in fmt.planes
    ]


def sizes_of(fmt: Layout, numel: int) -> tuple[float, ...]:
    """Bytes of each plane for one element, on average; of a plane with a word per row as if rows were that long."""
    return tuple(plane.dtype.itemsize / (numel if plane.per is None else plane.per) for plane in fmt.planes)


def bytes_per_value(fmt: Layout, columns: int = 1024) -> float:
    """Bytes of all planes for one element, in rows of so many columns."""
    whole = sum(sizes_of(fmt, columns))
    return int(whole) if whole == int(whole) else whole


def aligned(formats: Sequence[Layout], planes: Sequence[Planes], others: Planes, size: int) -> Iterator[list[Tensor]]:
    """Views, piece by piece in row-major order, of every plane of every format, then of other tensors of one word each.

    A piece is ``size`` elements or less of contiguous tensors, and all of strided ones, whose operations are
    elementwise. Where a format has blocks it is some whole rows, as [rows, columns]; their planes are cut with them. Of
    planes that cannot be seen so it is a copy, which is written back at the end.
    """
    layouts = [plane for fmt in formats for plane in fmt.planes] + [Plane("", torch.float32)] * len(others)
    tensors = [plane for own in planes for plane in own] + list(others)
    first = next(t for t, plane in zip(tensors, layouts, strict=True) if plane.per == 1)
    if all(fmt.elementwise for fmt in formats):
        if not all(t.is_contiguous() for t in tensors):
            yield tensors
            return
        flat = [t.view(-1) for t in tensors]
        yield from map(list, zip(*(torch.split(t, size) for t in flat), strict=True))
        return
    rows, columns = as_rows(first.shape)
    some = max(1, size // max(columns, 1))
    in_rows = [t.reshape(rows, columns) if plane.per == 1 else t for t, plane in zip(tensors, layouts, strict=True)]
    yield from map(list, zip(*(torch.split(t, some) for t in in_rows), strict=True))
    for tensor, seen in list(zip(tensors, in_rows, strict=True))[: len(tensors) - len(others)]:
        if seen.numel() and seen.data_ptr() != tensor.data_ptr():
            tensor.data.copy_(seen.view(tensor.shape))


def pieces(planes: Planes, size: int = PIECE) -> Iterator[Planes]:
    """Views of so many elements each, so that no temporary is as large as a parameter."""
    if all(plane.is_contiguous() for plane in planes):
        planes = [plane.view(-1) for plane in planes]
    rows = max(1, size * len(planes[0]) // max(1, planes[0].numel()))
    return zip(*(torch.split(plane, rows) for plane in planes), strict=True)
