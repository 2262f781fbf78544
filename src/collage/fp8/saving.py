"""Row scales in a state_dict: of a sharded weight they are sharded too, for a rank is sure of those of its rows alone.

Between a step and the next forward pass its module still has the others' old ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from collage.fp8.owning import scale_of
from collage.sharding import is_dtensor, local, placed


def save_scale(module: nn.Module, destination: dict[str, Any], prefix: str) -> None:
    """Put a module's scales in a state_dict, placed as its weight is."""
    weight: Any = module.weight
    scale = scale_of(weight)
    assert scale is not None
    destination[f"{prefix}weight_scale"] = scale.detach()


def has_all(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> bool:
    """Whether a module's codes and scales are those of a state_dict already. False of sharded ones: nobody asks."""
    own = {"weight": module.weight, "weight_scale": module.weight_scale}
    return all(_is_as(tensor, state_dict.get(f"{prefix}{name}")) for name, tensor in own.items())


def _is_as(own: Any, given: Any) -> bool:
    if given is None:
        return True
    if not isinstance(given, Tensor) or is_dtensor(own) or is_dtensor(given) or own.is_meta or given.is_meta:
        return False
    alike = (own.shape, own.dtype) == (given.shape, given.dtype)
    return alike and torch.equal(own.detach().view(torch.uint8), given.detach().to(own.device).view(torch.uint8))


def load_scale(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Have a module load scales that are sharded: those of its own rows. The next forward pass gathers the others'."""
    key = f"{prefix}weight_scale"
    given: Any = state_dict.get(key)
    weight: Any = module.weight
    if is_dtensor(given):
        state_dict[key] = _with_rows(module, placed(given, weight)) if is_dtensor(weight) else given.full_tensor()


def _with_rows(module: nn.Module, rows: Any) -> Tensor:
    weight: Any = module.weight
    local(scale_of(weight)).copy_(local(rows))
    return local(module.weight_scale)
