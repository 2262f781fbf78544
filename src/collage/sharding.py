"""DTensor -> local tensor and its place in the whole. A plain tensor is its own whole."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from collage.backends import Region


def any_dtensor(tensors: Iterable[Any]) -> bool:
    """Whether one is a DTensor. Nobody has one before its module is imported, so nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def is_dtensor(tensor: Any) -> bool:
    """`any_dtensor` of one tensor: thousands of them are asked at every step."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The part of the tensor that this rank holds. Writing to it writes to the DTensor."""
    part = tensor.to_local() if is_dtensor(tensor) else tensor
    result: Tensor = part.wait() if hasattr(type(part), "wait") else part  # a collective still under way
    return result


def locals_of(tensors: list[Any]) -> list[Tensor]:
    """`local` of each."""
    return list(map(local, tensors)) if any_dtensor(tensors) else tensors


def versions_of(tensors: Sequence[Any], parts: Sequence[Tensor]) -> list[int]:
    """How often each was written to; parts: their local ones.

    A DTensor counts what is written through it, its local part what is written to that: neither moves the other's.
    """
    pairs = zip(tensors, parts, strict=True)
    return [part._version if part is whole else part._version + whole._version for whole, part in pairs]


def local_gradients(params: Sequence[Any], grads: list[Any]) -> list[Tensor]:
    """The local part of each gradient, placed as its parameter is: a partial one is reduced, another redistributed.

    A collective where placements differ (the norms under sequence parallelism), so every rank must come here, and does
    before it looks at its own parts: what is wrong with those of one rank alone must not leave the others waiting.
    """
    if not any_dtensor(grads) and not any_dtensor(params):
        return grads
    return [local(placed(grad, param)) for param, grad in zip(params, grads, strict=True)]


def placed(tensor: Any, param: Any) -> Any:
    """A gradient or state of a parameter, placed as the parameter is. A plain one is taken for the whole, if it is."""
    if not is_dtensor(param):
        return tensor.full_tensor() if is_dtensor(tensor) else tensor
    mesh = param.device_mesh
    if is_dtensor(tensor) and tensor.placements == param.placements and tensor.device_mesh == mesh:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    placements = _placements_of(tensor, param)
    if not isinstance(tensor, DTensor):
        if not placements:
            return tensor  # whoever reads it compares shapes
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tensor.device_mesh != mesh:
        raise ValueError(
            f"params: a gradient or state of shape {tuple(tensor.shape)} lies on {tensor.device_mesh}, its parameter "
            f"on {mesh}; redistribute it to its parameter's mesh"
        )
    return tensor if tensor.placements == placements or not placements else tensor.redistribute(mesh, placements)


def whole(part: Tensor, param: Any) -> Tensor:
    """All of a tensor of which this rank has a part, placed as the parameter is. A collective if that is sharded."""
    if not is_dtensor(param):
        return part
    words = part.view(torch.uint8) if part.dtype.itemsize == 1 else part  # gloo has no float8
    result: Tensor = _of_parts(words, param.shape, param.device_mesh, param.placements).full_tensor()
    return result.view(part.dtype)


def from_whole(tensor: Tensor, param: Any) -> Tensor:
    """This rank's part of a tensor of the parameter's shape, all of which it has."""
    return local(placed(tensor, param))


def _placements_of(tensor: Any, param: Any) -> tuple[Any, ...]:
    """Where the parts of a parameter's gradient or state lie; of a plane with words for blocks of its rows, likewise.

    () for what is neither, by its shape.
    """
    from torch.distributed.tensor import Shard

    if tensor.shape[: param.dim()] == param.shape:
        return tuple(param.placements)
    if not 1 <= tensor.dim() <= 2 or tensor.shape[0] != param.shape[0]:
        return ()
    return tuple(Shard(1) if p.is_shard() and p.dim > 0 else p for p in param.placements)


def in_rows(plane: Tensor, shape: Sequence[int], param: Any) -> Any:
    """This rank's part of a plane with words for blocks of rows, placed as its parameter is. shape: of the whole."""
    if not is_dtensor(param):
        return plane
    return _of_parts(plane, shape, param.device_mesh, _placements_of(plane.new_empty(shape, device="meta"), param))


def _of_parts(part: Tensor, shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> Any:
    from torch.distributed.tensor import DTensor

    whole = part.new_empty(shape, device="meta")
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def as_bytes(plane: Any) -> Any:
    """A plane of 16-bit integers as bytes [..., 2] in the same memory: neither NCCL nor gloo gathers the former.

    Sharded or not, so that what was saved from many ranks is loaded on one. Others as is.
    """
    if plane.dtype != torch.int16:
        return plane
    part = local(plane).unsqueeze(-1).view(torch.int8)
    return _of_parts(part, (*plane.shape, 2), plane.device_mesh, plane.placements) if is_dtensor(plane) else part


def from_bytes(plane: Any) -> Any:
    """Bytes [..., 2], sharded or not, as 16-bit integers again; in the same memory if that can be read so."""
    part = local(plane)
    if part.stride(-1) != 1 or any(step % 2 for step in (*part.stride()[:-1], part.storage_offset())):
        part = part.contiguous()
    part = part.view(torch.int16).squeeze(-1)
    return _of_parts(part, plane.shape[:-1], plane.device_mesh, plane.placements) if is_dtensor(plane) else part


def cut_rows(param: Any, block: int | None) -> int | None:
    """The dimension along which a parameter is sharded so that blocks of its rows are cut; None: along none.

    block: elements, of a row flattened; None: the whole row. The same on every rank.
    """
    if not is_dtensor(param):
        return None
    parts = dict.fromkeys(range(param.dim()), 1)
    for placement, ranks in zip(param.placements, param.device_mesh.shape, strict=True):
        if placement.is_shard():
            parts[placement.dim] *= ranks
    for dim in range(1, param.dim()):
        run = -(-param.shape[dim] // parts[dim]) * param.shape[dim + 1 :].numel()
        if parts[dim] > 1 and (dim > 1 or block is None or run % block):
            return dim
    return None


def layouts_of(tensors: Sequence[Any]) -> list[tuple[Any, tuple[Any, ...]] | None]:
    """(mesh, placements) of each, by which two layouts are told apart; None: a plain tensor."""
    if not any_dtensor(tensors):
        return [None] * len(tensors)
    return [(t.device_mesh, t.placements) if is_dtensor(t) else None for t in tensors]


def is_flat_shard(tensor: Tensor) -> bool:
    """Whether it is a part of a flattened module (FSDP1), which does not know its place in the whole."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def reshard(model: nn.Module) -> None:
    """Give every FSDP2 module its sharded parameters back: after a forward pass, a root still has the gathered ones.

    Until then its next forward pass would not see what was written to the shards.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


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
        if tuple(sizes) != tuple(local(tensor).shape):
            raise ValueError(
                f"a DTensor of shape {shape} placed as {tensor.placements} has a local part of shape "
                f"{tuple(local(tensor).shape)} instead of {tuple(sizes)} on this rank; make it with distribute_tensor"
            )
    return Region(tuple(sizes), tuple(starts), tuple(strides[: len(shape)]))
