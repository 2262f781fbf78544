"""What an optimizer can do is tried on small tensors, before it is wrapped: a step of one, of two, and of parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from collage.optimizers.wrapping.foreign import Foreign, Values, needs_all, same
from collage.sharding import local

LARGEST = 16  # of each dimension of what is tried
STEPS = 3
CLOSE = (
    1e-3  # of the largest update: operations on other shapes may round otherwise; another update differs by far more
)


class Tried(NamedTuple):
    """How far some steps moved parameters, the states they have then, and their group."""

    moves: list[Tensor]
    states: list[Values]
    group: dict[str, Any]


def probed(foreign: Foreign, group: dict[str, Any]) -> list[Values]:
    """The states that some steps make of parameters like the group's, in float32.

    Raises TypeError, ValueError, in one sentence, where the optimizer cannot be wrapped.
    """
    if not group["params"]:
        return []
    pairs = [shape for shape in sorted({_small(param) for param in group["params"]}, key=len) for _ in range(2)]
    device = local(group["params"][0]).device
    try:
        together = _stepped(foreign, group, pairs, device)
        alone = [_stepped(foreign, group, [shape], device, k) for k, shape in enumerate(pairs)]
    except Exception as error:
        raise TypeError(
            f"wrap: {foreign.name} cannot make a step of its own on {device.type}: {type(error).__name__}: {error}; "
            "wrap takes optimizers whose step() needs gradients alone, no closure, on the device of the parameters"
        ) from error
    for own in alone:
        differing = sorted(k for k, x in together.group.items() if k != "params" and not same(x, own.group.get(k)))
        if differing:
            raise ValueError(needs_all(foreign.name, differing))
    if not all(map(_close, together.moves, (own.moves[0] for own in alone))):
        raise ValueError(needs_all(foreign.name))
    return together.states


def is_elementwise(foreign: Foreign, group: dict[str, Any]) -> bool:
    """Whether the update of an element depends on that element alone, so that a shadow can follow some of them."""
    shape = (LARGEST, LARGEST)
    if not any(param.dim() > 1 for param in group["params"]):
        return True
    device = local(group["params"][0]).device
    try:
        whole, flat = (_stepped(foreign, group, [shape], device, view=view).moves[0] for view in (shape, (-1,)))
    except Exception:  # it takes no vectors
        return False
    return _close(whole.flatten(), flat)


def _small(param: Tensor) -> tuple[int, ...]:
    return tuple(min(n, LARGEST) for n in param.shape)


def _stepped(
    foreign: Foreign,
    group: dict[str, Any],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    first: int = 0,
    view: tuple[int, ...] | None = None,
) -> Tried:
    """Some steps of parameters of these shapes. Nothing of the optimizer moves.

    first: position of the first among those that are tried together, which says what numbers they have.
    """
    params = [nn.Parameter(_numbers(shape, first + k, device, view)) for k, shape in enumerate(shapes)]
    start = [param.detach().clone() for param in params]
    trial, group = Foreign(foreign.base, foreign.arguments), {**group, "params": []}
    trial.makes_states = foreign.makes_states
    states: list[Values | None] = [None] * len(params)
    if trial.has("train"):  # Schedule-Free's step refuses what is not told
        states = list(trial.run(group, params, states, "train"))
        group = {**group, **trial.moved(group)}
        trial.forget()
    for step in range(STEPS):
        for k, (param, shape) in enumerate(zip(params, shapes, strict=True)):
            param.grad = _numbers(shape, first + k + 100 * (step + 1), device, view)
        states = list(trial.run(group, params, states))
        group = {**group, **trial.moved(group)}
        trial.forget()
    return Tried([p.detach() - x for p, x in zip(params, start, strict=True)], [own or {} for own in states], group)


def _numbers(shape: tuple[int, ...], seed: int, device: torch.device, view: tuple[int, ...] | None) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(device)
    return drawn if view is None else drawn.reshape(view)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= CLOSE * a.abs().max()) if a.numel() else True
