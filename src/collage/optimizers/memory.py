"""Tensors that a kernel may be given the address of: in memory, of the right dtype and shape, every element its own."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, ge

import torch
from torch import Tensor
from torch.nn import Parameter as TorchParameter

from collage.optimizers.parameters import Parameter, dtype_of, name_of
from collage.sharding import local

_layout, _dtype, _shape, _device, _nbytes = map(attrgetter, ("layout", "dtype", "shape", "device", "nbytes"))


def accept(params: Sequence[Tensor], grads: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether a step can read these gradients of parameters of one dtype: what `check_gradient` explains, for all.

    Both are local parts. What is no plain tensor has no memory of its own to read.
    """
    return (
        set(map(type, grads)) <= {Tensor, TorchParameter}
        and set(map(_layout, grads)) <= {torch.strided}
        and set(map(_dtype, grads)) <= set(readable(dtype))
        and list(map(_shape, grads)) == list(map(_shape, params))
        and list(map(_device, grads)) == list(map(_device, params))
        and _all_in_memory(grads)
    )


def readable(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """dtypes of the gradients that parameters of a dtype can have: their own, of e4m3 ones bfloat16, or float32."""
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype, torch.float32


def _all_in_memory(grads: Sequence[Tensor]) -> bool:
    if any(map(Tensor.storage_offset, grads)) or not all(map(Tensor.is_contiguous, grads)):
        return all(map(in_memory, grads))
    return all(map(ge, map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, grads)), map(_nbytes, grads)))


def in_memory(tensor: Tensor) -> bool:
    """Whether its last element lies inside its storage: it was not freed or shrunk."""
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or (last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def check_gradient(parameter: Parameter, grad: Tensor) -> None:
    """Raise, naming the parameter, for a gradient, or this rank's part of it, that the step cannot read."""
    if grad.layout != torch.strided:
        raise TypeError(
            f"param '{parameter.name}': its gradient is sparse ({grad.layout}); use a dense one "
            "(Embedding(sparse=False))"
        )
    if grad.dtype not in readable(parameter.tensor.dtype):
        wanted = dict.fromkeys(map(name_of, readable(parameter.tensor.dtype)))
        raise TypeError(
            f"param '{parameter.name}': it is {dtype_of(parameter.tensor)} and its gradient {dtype_of(grad)}; use "
            f"{' or '.join(wanted)} for the gradient (param.grad_dtype, or cast it before the step)"
        )
    if type(grad) not in (Tensor, TorchParameter):
        raise TypeError(f"param '{parameter.name}': its gradient is a {type(grad).__name__}; use a plain tensor")
    param = local(parameter.tensor)
    if not accept([param], [grad], param.dtype):
        raise ValueError(
            f"param '{parameter.name}': its gradient has shape {tuple(grad.shape)} on {grad.device} and "
            f"{grad.untyped_storage().nbytes()} bytes of memory, the parameter shape {tuple(param.shape)} on "
            f"{param.device}; call zero_grad() after changing p.data"
        )


def has_memory(tensor: Tensor) -> bool:
    """Whether every element lies in memory of its own: no storage freed or shrunk (FSDP does), no element twice."""
    return in_memory(tensor) and (tensor.is_contiguous() or not _overlaps(tensor))


def _overlaps(tensor: Tensor) -> bool:
    """Whether a strided tensor may have two elements in one place, as one that was expanded."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
