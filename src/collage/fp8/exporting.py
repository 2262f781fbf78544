"""Converted weights as everyone else has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from collage.fp8.codes import BF16, E4M3, decoded
from collage.sharding import any_dtensor

SUFFIX = "_scale"


def export(model: nn.Module | Mapping[str, Any], dtype: torch.dtype = BF16) -> dict[str, Any]:
    """The state_dict of the model as it was before `convert`: no scales, and weights that are what e4m3 stands for.

    What the optimizer keeps beside them is left out: `collage.high_precision_state_dict` has it.

    Args:
        model: converted; or its state_dict, as a sharded model's is gathered.
        dtype: of the weights. bfloat16 and float32 hold them exactly.

    Returns:
        A dict that the unconverted model loads with ``strict=True``, and a converted one too.

    Raises:
        ValueError: a sharded state_dict.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    for key in [key for key in state if key.endswith(SUFFIX)]:
        name = key.removesuffix(SUFFIX)
        weight = state.get(name)
        if not isinstance(weight, Tensor) or weight.dtype != E4M3:
            continue
        if any_dtensor([weight]):
            raise ValueError(
                f"'{name}': is sharded; gather the state_dict first, torch.distributed.checkpoint.state_dict."
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), and export that"
            )
        state[name] = decoded(weight, state.pop(key), torch.float32).to(dtype)
    return state
