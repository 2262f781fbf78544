"""Whose an e4m3 parameter is: the module that multiplies with it owns its row scales, and a step writes them there.

A parameter is found by identity among the modules that live, so that one that replaces it (``deepcopy``,
``fully_shard``, ``load_state_dict(assign=True)``) is found as well: attributes of a parameter would not follow.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from collage.sharding import in_rows, is_dtensor, local, region

_LIVE: WeakSet[nn.Module] = WeakSet()
_FOUND: MutableMapping[Tensor, ref[nn.Module]] = WeakIdKeyDictionary()


def register(module: nn.Module) -> None:
    """Let a module's weight be found. It has an e4m3 ``weight`` and its ``weight_scale``."""
    _LIVE.add(module)


def adopt(module: nn.Module, param: Tensor) -> None:
    """Let a parameter be found that is the module's weight at times: FSDP2 puts the whole in place of a shard."""
    _FOUND[param] = ref(module)


def forget(module: nn.Module) -> None:
    """Let go of a module's weight until it is asked for again: torch moves no DTensor that anything refers to."""
    weight = module._parameters["weight"]
    if weight is not None:
        _FOUND.pop(weight, None)


def module_of(param: Tensor) -> nn.Module | None:
    """The live module whose weight this very parameter is, or was when it was first asked."""
    known = _FOUND.get(param)
    module = None if known is None else known()
    if module is None:
        module = next((live for live in _LIVE if live._parameters.get("weight") is param), None)
        if module is not None:
            adopt(module, param)
    return module


def is_scale(key: str, shown: Mapping[str, Any]) -> bool:
    """Whether an entry of a state_dict (``keep_vars=True``) has row scales: a part of their weight's number."""
    weight, _, part = key.rpartition("_")
    return part == "scale" and isinstance(shown.get(weight), Tensor) and module_of(shown[weight]) is not None


def scales_in(model: nn.Module) -> set[int]:
    """The id of every row scale of a model."""
    return {id(module._buffers["weight_scale"]) for module in model.modules() if module in _LIVE}


def scale_of(param: Tensor) -> Tensor | None:
    """The row scales of an e4m3 parameter, uint8 [rows], in the memory of its module; None: it has none.

    Of a sharded one they are placed as it is: each rank has those of its rows, in the memory of its own module, where
    there is room for all.
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


def taken_remainder(param: Tensor) -> Tensor | None:
    """What e4m3 cut off of a weight when it was converted, int16 like its local part; the module lets go of it.

    None: nothing is known of it. It was taken before, or the weight was written to since, so that it may be another's.
    """
    found = remainder_of(param)
    module = module_of(param)
    if module is not None:
        module.__dict__["remainder"] = None
    return found


def keep_remainder(module: nn.Module, low: Tensor | None) -> None:
    """Have a module keep what e4m3 cut off of the weight that it has now, until that is written to. None: forget it."""
    module.__dict__.update(remainder=low, remainder_at=_version(module._parameters["weight"]))


def _version(weight: Any) -> int:
    return 0 if weight.is_inference() else weight._version  # of inference tensors nobody counts writes


def remainder_of(param: Tensor) -> Tensor | None:
    """The same, int16; the module keeps it."""
    module = module_of(param)
    whole: Tensor | None = None if module is None else module.__dict__.get("remainder")
    if module is None or whole is None:
        return None
    if not is_dtensor(param) and _version(param) != module.__dict__["remainder_at"]:
        return None
    if is_dtensor(param):
        place = region(param)
        whole = whole.narrow(0, place.starts[0], place.sizes[0])
    return whole.to(param.device)
