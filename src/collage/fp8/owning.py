"""Whose an e4m3 parameter is: the module that multiplies with it owns its row scales, and a step writes them there.

A parameter is found by identity among the modules that live, so that one that replaces it (``deepcopy``, ``fully_shard``,
``load_state_dict(assign=True)``) is found as well: attributes of a parameter would not follow.
"""

from __future__ import annotations

from weakref import WeakSet

from torch import Tensor, nn

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
