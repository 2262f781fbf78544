"""Converted weights as everyone else has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from collage.fp8.codes import BF16, E4M3, decoded
from collage.sharding import in_rows, local, placed

SUFFIX = "_scale"


def export(model: nn.Module | Mapping[str, Any], dtype: torch.dtype = BF16) -> dict[str, Any]:
    """The state_dict of the model as it was before `convert`: no scales, and weights that are what e4m3 stands for.

    What the optimizer keeps beside them is left out: `collage.high_precision_state_dict` has it.

    Args:
        model: converted; or its state_dict.
        dtype: of the weights. bfloat16 and float32 hold them exactly.

    Returns:
        A dict that the unconverted model loads with ``strict=True``, and a converted one too. Of a sharded model
        weights are sharded as its own are, and ``full_tensor()`` gathers one.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    for key in [key for key in state if key.endswith(SUFFIX)]:
        name = key.removesuffix(SUFFIX)
        weight = state.get(name)
        if not isinstance(weight, Tensor) or weight.dtype != E4M3:
            continue
        scale = placed(state.pop(key), weight)
        own = decoded(local(weight), local(scale), torch.float32).to(dtype)
        state[name] = in_rows(own, weight.shape, weight)
    return state
