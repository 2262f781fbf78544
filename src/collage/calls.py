"""What the step's operator needs of a group: its parameters of one strategy, as lists of tensors and plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage import state
from collage.backends import Update
from collage.monitor import Item
from collage.rng import Stream
from collage.rules import Rule
from collage.sharding import is_dtensor, local, region
from collage.state import Entry, Group, State
from collage.strategies import STRATEGIES, Strategy


class Call(NamedTuple):
    """One call of ``torch.ops.collage.step_``; the lists are its arguments."""

    group: Group
    strategy: str
    planes: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    keys: list[int]
    regions: list[int]


def strategy_of(group: Group, in_float32: bool) -> Strategy | None:
    """The group's own strategy, or that of the float32 parameters among its narrower ones; None if it has no such."""
    own = Strategy.parse(group["strategy"])
    if not in_float32:
        return own
    return None if own.dtype == torch.float32 else STRATEGIES["fp32"]


def chosen(group: Group, in_float32: bool) -> list[int]:
    """Positions of the group's parameters that have a gradient and that strategy."""
    own = Strategy.parse(group["strategy"]).dtype
    return [
        i
        for i, param in enumerate(group["params"])
        if param.grad is not None and (own == torch.float32 or (param.dtype == torch.float32) == in_float32)
    ]


def planes(rule: Rule, strategy: Strategy, param: Tensor, values: State) -> list[Tensor] | None:
    """The planes of every slot, theta first; made at first use. None if they are not this strategy's."""
    if not values:
        state.initialise(rule, strategy, param, values)
    keys, dtypes = _layout(rule, strategy)
    found = [plane for plane in (param, *map(values.get, keys)) if isinstance(plane, Tensor)]
    if len(values) != len(keys) + 1 or [plane.dtype for plane in found] != dtypes:
        return None
    shape, device = param.shape, param.device
    return found if all(p.shape == shape and p.device == device and has_memory(p) for p in found) else None


def has_memory(tensor: Tensor) -> bool:
    """Whether every element lies in memory of its own: no storage freed or shrunk (FSDP does), no element twice."""
    if is_dtensor(tensor):
        return True  # its local part is torch's own
    if tensor.untyped_storage().nbytes() < tensor.nbytes:
        return False
    return tensor.is_contiguous() or not _overlaps(tensor)


def _overlaps(tensor: Tensor) -> bool:
    """Whether a strided tensor may have two elements in one place, as one that was expanded."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


@cache
def _layout(rule: Rule, strategy: Strategy) -> tuple[list[str], list[torch.dtype]]:
    """(state keys of all planes but the parameter, dtypes of all planes)."""
    dtypes = state.dtypes(rule, strategy)
    return list(dtypes), [strategy.dtype, *dtypes.values()]


def places(params: Sequence[Tensor]) -> list[int]:
    """Where the local parts lie, as the operator takes it; nothing if no parameter is sharded."""
    numbers: list[int] = []
    if any(map(is_dtensor, params)):
        for place in map(region, params):
            numbers += [len(place.sizes), *place.sizes, *place.starts, *place.strides]
    return numbers


def require_compilable(planes: Sequence[Tensor], monitored: bool) -> None:
    """Raise RuntimeError for a step that torch.compile would get wrong."""
    if monitored:
        raise RuntimeError("monitor: it measures in Python, outside a compiled step; call opt.step() uncompiled")
    if any(map(is_dtensor, planes)):
        raise RuntimeError("params: a compiled step takes no DTensors; call opt.step() uncompiled")
    storages = [plane.untyped_storage().data_ptr() for plane in planes if plane.numel()]
    if len(set(storages)) < len(storages):
        raise RuntimeError(
            "params: some are views of one buffer, which torch.compile is known to mix up; call opt.step() "
            "uncompiled, or give each parameter memory of its own"
        )


def items(
    rule: Rule,
    call: Call,
    hyper: Sequence[float],
    entries: Sequence[Entry],  # the call's parameters
    sums: Tensor,  # [parameters, 5], or [0, 5] where the step is not measured
) -> Iterator[Item]:
    """Every parameter of a call, as a monitor sees it."""
    strategy = Strategy.parse(call.strategy)
    rest = map(local, call.planes)
    fold = cache(partial(_fold, rule, float(call.group["lr"]), tuple(hyper)))
    for k, entry in enumerate(entries):
        slots = tuple(tuple(next(rest).detach() for _ in fmt.dtypes) for fmt in strategy.formats)
        grad, step = local(call.grads[k]), int(call.steps[k]) + 1
        stream = Stream(call.group["seed"], step, entry.key)
        update = Update(strategy, slots, grad, call.group["maximize"], stream, sums[k] if len(sums) else None)
        yield Item(entry.name, entry.group_index, update, partial(fold, step, grad.device))


def _fold(rule: Rule, lr: float, hyper: tuple[float, ...], step: int, device: torch.device, dtype: torch.dtype) -> Any:
    """The constants of a step in one arithmetic, as tensors."""
    return rule.fold(lr, hyper, step, dtype).on(dtype, device)


def signed(number: int) -> int:
    """A number below 2**64 with the bits of a signed one, as operators take them."""
    return number - 2**64 if number >= 2**63 else number
