"""DTensor -> local tensor and its place in the whole. A plain tensor is its own whole."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from collage.backends import Region


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Nobody has one before its module is imported, so nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The part of the tensor that this rank holds. Writing to it writes to the DTensor."""
    result: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return result


def region(tensor: Any) -> Region:
    """Where the local part lies in the unsharded tensor. Raises ValueError for a partial (not yet reduced) DTensor."""
    shape = tuple(tensor.shape)
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    sizes, starts = shape, (0,) * len(shape)
    if is_dtensor(tensor):
        if any(p.is_partial() for p in tensor.placements):
            raise ValueError(f"a partial DTensor cannot be updated: {tensor.placements}; reduce it first")
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, starts = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    return Region(tuple(sizes), tuple(starts), tuple(strides[: len(shape)]))
