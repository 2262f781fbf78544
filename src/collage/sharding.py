"""DTensor -> local tensor and its place in the whole. A plain tensor is its own whole."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from collage.backends import Region


def any_dtensor(tensors: Iterable[Any]) -> bool:
    """Whether one is a DTensor. Nobody has one before its module is imported, so nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def local(tensor: Any) -> Tensor:
    """The part of the tensor that this rank holds. Writing to it writes to the DTensor."""
    result: Tensor = tensor.to_local() if any_dtensor([tensor]) else tensor
    return result


def locals_of(tensors: list[Any]) -> list[Tensor]:
    """`local` of each."""
    return list(map(local, tensors)) if any_dtensor(tensors) else tensors


def region(tensor: Any) -> Region:
    """Where the local part lies in the unsharded tensor. Raises ValueError for a partial (not yet reduced) DTensor."""
    shape = tuple(tensor.shape)
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    sizes, starts = shape, (0,) * len(shape)
    if any_dtensor([tensor]):
        if any(p.is_partial() for p in tensor.placements):
            raise ValueError(f"a partial DTensor cannot be updated: {tensor.placements}; reduce it first")
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, starts = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    return Region(tuple(sizes), tuple(starts), tuple(strides[: len(shape)]))
