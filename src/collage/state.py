"""What an optimizer keeps for one parameter: a step counter and, per slot, the planes of its format.

Plane 0 of the first slot is the parameter itself; every other plane is a tensor of its shape, strides and placement
under a key of the optimizer's state (``param_lo``, ``exp_avg``, ``exp_avg_sq_lo``, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.formats import Format, Planes, format_of, split
from collage.rules import Rule
from collage.sharding import local
from collage.strategies import Strategy

State = dict[str, Any]
Group = dict[str, Any]


class Entry(NamedTuple):
    """One parameter and where it stands."""

    name: str
    key: int  # of its random stream
    group_index: int
    group: Group
    param: Tensor


def formats(rule: Rule, strategy: Strategy) -> list[tuple[str, Format]]:
    """(state prefix, format) of each slot of the rule."""
    return [(prefix, format_of(getattr(strategy, slot))) for prefix, slot in rule.slots]


def dtypes(rule: Rule, strategy: Strategy) -> dict[str, torch.dtype]:
    """State key -> dtype of every plane but the parameter itself."""
    keyed = {
        prefix + suffix: dtype
        for prefix, fmt in formats(rule, strategy)
        for suffix, dtype in zip(fmt.suffixes, fmt.dtypes, strict=True)
    }
    del keyed["param"]
    return keyed


def slots(rule: Rule, strategy: Strategy, param: Tensor, state: Mapping[str, Tensor]) -> tuple[Planes, ...]:
    """The local planes of every slot, theta first."""
    tensors = {**state, "param": param.detach()}
    return tuple(
        tuple(local(tensors[prefix + suffix]) for suffix in fmt.suffixes) for prefix, fmt in formats(rule, strategy)
    )


def initialise(rule: Rule, strategy: Strategy, param: Tensor, state: State) -> None:
    """Fill an empty state: step 0, theta as it is, every other number 0."""
    state["step"] = torch.zeros((), dtype=torch.int64)
    for key, dtype in dtypes(rule, strategy).items():
        state[key] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    resync(rule, strategy, param, state)


def resync(rule: Rule, strategy: Strategy, param: Tensor, state: State) -> None:
    """Derive theta's other planes from the parameter as it is now."""
    planes = slots(rule, strategy, param, state)[0]
    write(planes[1:], split(strategy.formats[0], planes[0].float())[1:])


def write(planes: Planes, values: Planes) -> None:
    """Copy values into planes, one by one."""
    for plane, value in zip(planes, values, strict=True):
        plane.copy_(value)


def check(rule: Rule, strategy: Strategy, param: Tensor, state: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, naming the parameter, if a saved state has not exactly this strategy's planes."""
    wanted = dtypes(rule, strategy)
    found = {key: value.dtype for key, value in state.items() if key != "step"}
    if "step" not in state or found != wanted:
        raise ValueError(
            f"param '{name}': strategy '{strategy}' keeps step, {_listing(wanted)}; the saved state has "
            f"{'step, ' if 'step' in state else ''}{_listing(found)}"
        )
    for key in wanted:
        if state[key].shape != param.shape:
            raise ValueError(
                f"param '{name}': {key} has shape {tuple(state[key].shape)}, not the parameter's {tuple(param.shape)}"
            )


def _listing(planes: Mapping[str, torch.dtype]) -> str:
    return ", ".join(f"{key} ({str(dtype).removeprefix('torch.')})" for key, dtype in planes.items()) or "nothing"


def from_torch(rule: Rule, strategy: Strategy, param: Tensor, saved: Mapping[str, Any]) -> State:
    """A torch.optim state, its moments split into this strategy's planes."""
    state: State = {}
    initialise(rule, strategy, param, state)
    state["step"] = torch.as_tensor(saved["step"]).detach().to("cpu", torch.int64).reshape(())
    for planes, (prefix, fmt) in zip(slots(rule, strategy, param, state), formats(rule, strategy), strict=True):
        if prefix != "param":
            write(planes, split(fmt, local(saved[prefix]).to(planes[0].device, torch.float32)))
    return state


def dtype_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_gradient(entry: Entry) -> None:
    """Raise TypeError, naming the parameter, for a gradient that the step cannot read."""
    grad = entry.param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise TypeError(
            f"param '{entry.name}': its gradient is sparse ({grad.layout}); use a dense one (Embedding(sparse=False))"
        )
    if grad.dtype not in (entry.param.dtype, torch.float32):
        raise TypeError(
            f"param '{entry.name}': its gradient is {dtype_of(grad)}; use {dtype_of(entry.param)}, as the parameter, "
            "or float32"
        )
