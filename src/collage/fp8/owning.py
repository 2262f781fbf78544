"""Whose an e4m3 parameter is: the module that multiplies with it owns its row scales, and a step writes them there.

A parameter is found by identity among the modules that live, so that one that replaces it (``deepcopy``,
``fully_shard``, ``load_state_dict(assign=True)``) is found as well: attributes of a parameter would not follow.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from weakref import WeakSet, ref

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

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
