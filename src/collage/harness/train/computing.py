"""Forward in a dtype, whatever dtype the weights are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def computed(
    model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None
) -> Any:
    """What the model returns if its parameters are cast. A tied parameter is cast once, and stays tied.

    e4m3 weights are what their layers multiply with, and stay.

    Buffers are never cast: rotary frequencies in bf16 are off by radians. `weights` are used instead of the parameters.
    """
    chosen = model.named_parameters() if weights is None else weights.items()
    parameters = {name: p.to(dtype) for name, p in chosen if p.dtype != torch.float8_e4m3fn}
    return functional_call(model, parameters, args=(), kwargs=dict(inputs), tie_weights=True)


def has_bf16_matrix_units() -> bool:
    """Whether this machine multiplies matrices in bfloat16, on its GPU or its CPU."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))
