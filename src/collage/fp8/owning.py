"""Whose an e4m3 parameter is: the module that multiplies with it owns its row scales, and a step writes them there.

A parameter is found by identity among the modules that live, so that one that replaces it (``deepcopy``,
``fully_shard``, ``load_state_dict(assign=True)``) is found as well: attributes of a parameter would not follow.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from collage.sharding import is_dtensor, region

_LIVE: WeakSet[nn.Module] = WeakSet()
_FOUND: MutableMapping[Tensor, ref[nn.Module]] = WeakIdKeyDictionary()


def register(module: nn.Module) -> None:
    """Let a module's weight be found. It has an e4m3 ``weight`` and its ``weight_scale``."""
    _LIVE.add(module)


def module_of(param: Tensor) -> nn.Module | None:
    """The live module whose weight this very parameter is, or was when it was first asked."""
    known = _FOUND.get(param)
    module = None if known is None else known()
    if module is None:
        module = next((live for live in _LIVE if live._parameters.get("weight") is param), None)
        if module is not None:
            _FOUND[param] = ref(module)
    return module


def scales_in(model: nn.Module) -> set[int]:
    """The id of every row scale of a model: what their weights are without a number of their own."""
    return {id(module._buffers["weight_scale"]) for module in model.modules() if module in _LIVE}


def scale_of(param: Tensor) -> Tensor | None:
    """The row scales of an e4m3 parameter, uint8 [rows], in the memory of its module; None: it has none."""
    module = module_of(param)
    return None if module is None else module._buffers["weight_scale"]


def taken_remainder(param: Tensor, bits: int) -> Tensor | None:
    """What e4m3 cut off of a weight when it was converted, int16 or int8 like its local part; the module lets go of it.

    None: nothing is known of it. It was taken before, or the weight was written to since, so that it may be another's.
    """
    module = module_of(param)
    whole: Tensor | None = None if module is None else module.__dict__.get("remainder")
    if module is None or whole is None:
        return None
    module.__dict__["remainder"] = None
    if is_dtensor(param):
        place = region(param)
        whole = whole.narrow(0, place.starts[0], place.sizes[0])
    elif param._version:
        return None
    return narrowed(whole, bits).to(param.device)


def narrowed(remainder: Tensor, bits: int) -> Tensor:
    """A remainder of 16 bits in so many, to nearest; what shows stays as it is, so that the largest is 127 at most."""
    if bits == 16:
        return remainder
    return ((remainder.int() + 128) >> 8).clamp_(max=127).to(torch.int8)
