"""Whose an e4m3 parameter is: the module that multiplies with it owns its row scales, and a step writes them there.

A parameter is found by identity among the modules that live, so that one that replaces it (``deepcopy``,
``fully_shard``, ``load_state_dict(assign=True)``) is found as well: attributes of a parameter would not follow.
"""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor, nn

from collage.sharding import is_dtensor, region

_LIVE: WeakSet[nn.Module] = WeakSet()


def register(module: nn.Module) -> None:
    """Let a module's weight be found. It has an e4m3 ``weight`` and its ``weight_scale``."""
    _LIVE.add(module)


def module_of(param: Tensor) -> nn.Module | None:
    """The live module whose weight this very parameter is."""
    return next((module for module in _LIVE if module._parameters.get("weight") is param), None)


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
