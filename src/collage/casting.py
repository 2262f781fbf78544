"""A model's weights in 16 bits, and nothing else of it: `model.bfloat16()` would round its buffers too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from collage.layout import pieces
from collage.sharding import any_dtensor, local

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def to_bf16(model: nn.Module) -> nn.Module:
    """Cast a model's floating-point parameters to bfloat16, in place, to nearest even. Make the optimizer afterwards.

    Every Parameter stays the object it is, so tied weights stay tied; parameters that are views of one memory stay
    views of one memory. Buffers, integer, quantised (fp8, int8, ..., tensor subclasses) and complex parameters stay as
    they are, and so does ``requires_grad``. A gradient of a cast parameter is dropped. DTensors (tensor parallelism,
    FSDP2 before its first forward) and meta parameters are cast as well.

    torch's BatchNorm wants weights and running statistics of one dtype: ``norm.float()`` afterwards.

    Args:
        model: its float64, float32 and float16 parameters are cast.

    Returns:
        The model.

    Raises:
        ValueError: a finite weight that would become infinite; a parameter that shares its memory with something that
            is not cast, such as a buffer. Both are named, and nothing is changed then.

    >>> model = to_bf16(nn.BatchNorm1d(2))
    >>> model.weight.dtype, model.running_mean.dtype
    (torch.bfloat16, torch.float32)
    """
    casting(model, torch.bfloat16)()
    return model


def to_fp16(model: nn.Module) -> nn.Module:
    """Cast a model's floating-point parameters to float16, in place: as `to_bf16` does, bfloat16 ones included.

    Raises:
        ValueError: as in `to_bf16`; here a weight beyond 65504 would become infinite.

    >>> to_fp16(nn.Linear(2, 1)).weight.dtype
    torch.float16
    """
    casting(model, torch.float16)()
    return model


def casting(model: nn.Module, dtype: torch.dtype, but: Collection[Tensor] = ()) -> Callable[[], None]:
    """What casts a model's parameters, all `but` some, in place. Raises ValueError at once for what cannot be cast."""
    left = set(but)
    params = {name: p for name, p in model.named_parameters() if p.dtype in _FLOATS - {dtype} and _is_plain(p)}
    params = {name: p for name, p in params.items() if p not in left}
    for name, param in params.items():
        if not is_lazy(param):
            require_finite(name, local(param.detach()), dtype)
    views = _views(model, params, dtype)
    return lambda: _cast(model, set(params.values()), views, dtype)


def _cast(model: nn.Module, chosen: set[nn.Parameter], views: dict[Tensor, Tensor], dtype: torch.dtype) -> None:
    for param in chosen:
        param.grad = None

    def cast(tensor: Tensor) -> Tensor:
        return views[tensor] if tensor in views else tensor.to(dtype) if tensor in chosen else tensor

    # torch's own way to cast a module: it swaps what a DTensor holds, where `.data =` would change its outside only,
    # and modules that keep their weights elsewhere too (RNN, FSDP2) take part.
    attributes = [(param, vars(param).copy()) for param in model.parameters()]
    model._apply(cast)  # type: ignore[no-untyped-call]
    for param, own in attributes:
        vars(param).update(
            {name: x for name, x in own.items() if name not in vars(param)}
        )  # swapped away with the rest


def require_finite(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError, naming the parameter, for a finite number that would become infinite in dtype."""
    wide = dtype.itemsize >= values.dtype.itemsize and dtype != torch.float16
    if values.is_meta or wide or dtype.itemsize == 1:  # e4m3 has a scale for as far as float32 goes
        return
    for (part,) in pieces([values]):
        broken = part[part.to(dtype).isinf() & part.isfinite()]
        if broken.numel():
            raise ValueError(
                f"param '{name}': {broken[0].item():.6g} is beyond {torch.finfo(dtype).dtype}'s largest number, "
                f"{torch.finfo(dtype).max:g}" + ("; use bfloat16" if dtype == torch.float16 else "")
            )


def _is_plain(param: nn.Parameter) -> bool:
    """Whether its numbers are its dtype's: a subclass other than DTensor may say bfloat16 and hold int4."""
    return is_lazy(param) or type(param.data) is Tensor or any_dtensor([param])


def _views(model: nn.Module, params: dict[str, nn.Parameter], dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Of parameters that share memory (one flat buffer): what they become, views of that memory, cast once."""
    users: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor.data) is Tensor and not is_lazy(tensor) and tensor.layout == torch.strided:
            users[tensor.untyped_storage()._cdata][name] = tensor
    views: dict[Tensor, Tensor] = {}
    for sharing in users.values():
        ours = {name: tensor for name, tensor in sharing.items() if name in params}
        if not ours or len(sharing) == 1:
            continue
        (first, param), *_ = ours.items()
        for name, tensor in sharing.items():
            if name not in ours or tensor.dtype != param.dtype:
                raise ValueError(
                    f"param '{first}': shares its memory with '{name}', which is not cast with it; give one of them "
                    "memory of its own, tensor.data = tensor.data.clone()"
                )
        whole = torch.empty(0, dtype=param.dtype, device=param.device).set_(param.untyped_storage()).to(dtype)
        for tensor in ours.values():
            views[tensor] = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return views
