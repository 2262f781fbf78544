"""Whose an e4m3 parameter is: the module that multiplies with it owns its row scales, and a step writes them there.

A parameter is found by identity among the modules that live, so that one that replaces it (``deepcopy``,
``load_state_dict(assign=True)``) is found as well: attributes of a parameter would not follow.
"""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from collage.sharding import in_rows, is_dtensor, local, region

_LIVE: WeakSet[nn.Module] = WeakSet()
_ADOPTED: Any = WeakTensorKeyDictionary()  # parameter -> its module


def register(module: nn.Module) -> None:
    """Let a module's weight be found. It has an e4m3 ``weight`` and its ``weight_scale``."""
    _LIVE.add(module)


def adopt(module: nn.Module, param: Tensor) -> None:
    """Let a parameter be found that is the module's weight at times: FSDP2 puts the whole in a shard's place."""
    _ADOPTED[param] = ref(module)


def module_of(param: Tensor) -> nn.Module | None:
    """The live module whose weight this very parameter is."""
    adopted: ReferenceType[nn.Module] | None = _ADOPTED.get(param)
    if adopted is not None:
        return adopted()
    return next((module for module in _LIVE if module._parameters.get("weight") is param), None)


def scale_of(param: Tensor) -> Tensor | None:
    """The row scales of an e4m3 parameter, uint8 [rows], in the memory of its module; None: it has none.

    Of a sharded one they are placed likewise: a rank has those of its rows, in the memory of its own module, which has
    room for all.
    """
    module = module_of(param)
    return None if module is None else _placed(module._buffers["weight_scale"], param)


def _placed(scale: Any, param: Any) -> Any:
    if not is_dtensor(param):
        return scale
    where = region(param)
    first = where.starts[0]
    return in_rows(local(scale)[first : first + where.sizes[0]], (param.shape[0],), param)


def gradient_dtype(param: Tensor) -> torch.dtype:
    """The dtype of an e4m3 parameter's gradient: bfloat16, if nobody says float32."""
    return torch.float32 if param.grad_dtype == torch.float32 else torch.bfloat16
