"""Row scales in a state_dict: of a sharded weight they are sharded too, for a rank is sure of those of its rows alone.

Between a step and the next forward pass its module still has the others' old ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from collage.fp8.owning import scale_of
from collage.sharding import is_dtensor, local, placed


def save_scale(module: nn.Module, destination: dict[str, Any], prefix: str) -> None:
    """Put a module's scales in a state_dict, placed as its weight is."""
    weight: Any = module.weight
    scale = scale_of(weight)
    assert scale is not None
    destination[f"{prefix}weight_scale"] = scale.detach()


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
