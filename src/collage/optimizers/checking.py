"""Whether a state is one of a parameter: its planes, their shapes, its counter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from collage.layout import Plane
from collage.optimizers.memory import in_memory
from collage.optimizers.parameters import dtype_of, name_of
from collage.optimizers.planes import dtypes, kept
from collage.rules import Rule
from collage.strategies import Strategy


def check(rule: Rule, strategy: Strategy, param: Tensor, state: Mapping[str, Any], name: str, hint: str = "") -> None:
    """Raise ValueError, naming the parameter, if a state has not exactly this strategy's planes."""
    wanted = dtypes(rule, strategy)
    require_tensors(state, name)
    found = {key: value.dtype for key, value in state.items() if key != "step"}
    if "step" not in state or found != wanted:
        raise ValueError(
            f"param '{name}': strategy '{strategy}' keeps step, {_listing(wanted)}; its state has "
            f"{'step, ' if 'step' in state else ''}{_listing(found)}{hint}"
        )
    own = kept(rule, strategy)
    for key, plane in zip(own.keys, own.planes[1:], strict=True):
        require_shape(key, state[key], param, name, plane)


def require_tensors(state: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, naming the parameter, if anything in a saved state is not a tensor."""
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"param '{name}': {key} needs to be a tensor, got {value!r:.50} ({type(value).__name__})")


def require_shape(key: str, tensor: Tensor, param: Tensor, name: str, plane: Plane) -> None:
    """Raise ValueError, naming the parameter, for a plane that is not as its format has it."""
    wanted = plane.shape(param.shape)
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"param '{name}': {key} has shape {tuple(tensor.shape)}, not the parameter's {wanted}. If it "
            "was resized, start its state anew: opt.state.pop(param), or drop its entry from a state_dict's 'state'"
        )


def check_counter(step: object, name: str) -> None:
    """Raise ValueError, naming the parameter, for a step counter that cannot be counted up."""
    if not isinstance(step, Tensor) or step.dtype != torch.int64 or step.dim() or not in_memory(step):
        got = f"{dtype_of(step)} of shape {tuple(step.shape)}" if isinstance(step, Tensor) else repr(step)
        raise ValueError(f"param '{name}': step needs to be a 0-d int64 tensor with memory in its state, got {got:.50}")


def count(step: Tensor, name: str) -> Tensor:
    """A saved step counter as int64. Raises ValueError, naming the parameter, if it is not one whole number >= 0."""
    if step.numel() != 1 or not float(step) >= 0 or not float(step).is_integer():
        raise ValueError(f"param '{name}': step needs one whole number >= 0, got {step!r:.50}")
    return step.detach().to("cpu", torch.int64).reshape(())


def _listing(planes: Mapping[str, torch.dtype]) -> str:
    return ", ".join(f"{key} ({name_of(dtype)})" for key, dtype in planes.items()) or "nothing"
