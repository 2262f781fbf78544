"""Weights in full precision: out of an optimizer's components, and into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from collage import state
from collage.formats import fitted, split
from collage.optim import PrecisionOptimizer
from collage.sharding import any_dtensor, local
from collage.state import Entry


def _entries(model: nn.Module, optimizer: PrecisionOptimizer) -> dict[Tensor, Entry]:
    """The optimizer's parameters. Raises ValueError if none is this model's."""
    entries = {entry.param: entry for entry in optimizer.entries()}
    own = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if own and not any(p in entries for p in own.values()):
        raise ValueError(
            f"optimizer: has none of the model's parameters, not even '{next(iter(own))}'; was it made for another "
            "model, or before this one's parameters were replaced?"
        )
    return entries


@torch.no_grad()
def high_precision_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every key of ``model.state_dict()``; low-precision weights as float32 with all that their components hold.

    Args:
        model: whose weights the optimizer trains.
        optimizer: of this package; also as Accelerate, Lightning or Fabric have wrapped it.

    Returns:
        A dict that ``load_state_dict(strict=True)`` takes, of a float32 model or of this one. Buffers and other
        entries are as they are. Tied parameters appear under each of their names.

    Raises:
        TypeError: an optimizer of somewhere else.
        ValueError: weights that do not match their other components, an optimizer of another model.

    >>> import collage
    >>> model = torch.nn.Linear(2, 1).bfloat16()
    >>> opt = collage.AdamW(model.named_parameters())
    >>> high_precision_state_dict(model, opt)["weight"].dtype
    torch.float32
    """
    optimizer = state.unwrapped(optimizer, PrecisionOptimizer)
    entries = _entries(model, optimizer)
    result: dict[str, Any] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        entry = entries.get(tensor) if isinstance(tensor, Tensor) else None
        if entry is not None and optimizer.state.get(entry.param):
            planes, fmt = optimizer.planes(entry)[0], optimizer.strategy_of(entry).formats[0]
            value = torch.empty_like(tensor, dtype=torch.float32, requires_grad=False)
            local(value).copy_(fmt.value(fitted(fmt, planes)[0]))
            result[key] = value
        elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            result[key] = tensor.detach().to(torch.float32, copy=True)
        else:
            result[key] = tensor.detach().clone() if isinstance(tensor, Tensor) else tensor
    return result


@torch.no_grad()
def load_high_precision_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> None:
    """Split float32 weights into the components the optimizer keeps; load everything else as torch does.

    The way to start from a float32 checkpoint: ``model.bfloat16()`` alone throws the low 16 bits away. Tied weights
    may be there under one of their names, as Hugging Face's ``save_pretrained`` stores them.

    Raises:
        ValueError: a missing, an unexpected or a misshapen key, an optimizer of another model; before anything is
            changed.
    """
    optimizer = state.unwrapped(optimizer, PrecisionOptimizer)
    entries = _entries(model, optimizer)
    own = model.state_dict(keep_vars=True)
    state_dict = _with_tied(own, state_dict)
    missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"state_dict: missing keys {missing or 'none'}, unexpected keys {unexpected or 'none'}")
    for key, tensor in own.items():
        if isinstance(tensor, Tensor) and tensor.shape != state_dict[key].shape:
            raise ValueError(
                f"state_dict['{key}']: has shape {tuple(state_dict[key].shape)}, the model's is {tuple(tensor.shape)}"
            )
    model.load_state_dict(state_dict, strict=True)
    for key, tensor in own.items():
        if isinstance(tensor, Tensor) and tensor in entries:
            entry = entries[tensor]
            value = _local_part(state_dict[key], tensor).to(tensor.device, torch.float32)
            state.write(optimizer.planes(entry)[0], split(optimizer.strategy_of(entry).formats[0], value))


def _with_tied(own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict, each weight under all the names that the model has for the very same tensor."""
    places = {key: _place(tensor) for key, tensor in own.items() if isinstance(tensor, Tensor)}
    there = {place: state_dict[key] for key, place in places.items() if key in state_dict}
    return {**{key: there[place] for key, place in places.items() if place in there}, **state_dict}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where its numbers lie: equal for tied tensors. A tensor without memory is tied to itself alone."""
    part = local(tensor)
    return part.data_ptr() or id(tensor), part.dtype, part.shape, part.stride()


def _local_part(value: Any, param: Any) -> Tensor:
    """This rank's part of a full or already distributed value."""
    if any_dtensor([param]) and not any_dtensor([value]):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, param.device_mesh, param.placements)
    return local(value)
