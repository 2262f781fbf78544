"""What an optimizer can do is tried on small tensors, before it is wrapped: a step of one, of two, and of parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from collage.optimizers.wrapping.foreign import Foreign, Values, needs_all, same, unhooked
from collage.optimizers.wrapping.slots import is_shaped
from collage.randomness import Randomness
from collage.sharding import local

LARGEST = 16  # of each dimension of what is tried
FEW = 100  # of their elements
GRADIENTS = (1.0, 3.0, 1e-3, 1e4)  # how large they are in each step: some clip what grows, or is beyond a norm
CLOSE = 1e-3  # of the largest update: other shapes may be rounded otherwise; another update differs by far more


class Kept(NamedTuple):
    """What an optimizer keeps of a parameter: its states after some steps, and the names of those after the first.

    shaped: those with a number for each of the parameter's.
    """

    states: Values
    first: frozenset[str] = frozenset()
    shaped: frozenset[str] = frozenset()


Shape = tuple[int, ...]


class Tried(NamedTuple):
    """How far each step moved the parameters, the states they have then, and their group."""

    moves: list[Tensor]  # of each parameter: [steps, *shape]
    states: list[Kept]
    group: dict[str, Any]


def probed(foreign: Foreign, group: dict[str, Any]) -> dict[Shape, Kept]:
    """What the optimizer keeps of parameters like the group's, in float32, by the `small` shape.

    Raises TypeError, ValueError, in one sentence, where the optimizer cannot be wrapped.
    """
    if not group["params"]:
        return {}
    pairs = [shape for shape in sorted({small(param) for param in group["params"]}, key=len) for _ in range(2)]
    device = local(group["params"][0]).device
    try:
        foreign.require_apart()
        runs = [Run(shape, k, device) for k, shape in enumerate(pairs)]
        together = _stepped(foreign, group, runs)
        alone = [_stepped(foreign, group, [run]) for run in runs]
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
    _require_same_steps(foreign, group, runs, together.moves)
    return dict(zip(pairs, together.states, strict=True))


def _require_same_steps(foreign: Foreign, group: dict[str, Any], runs: Sequence[Run], moves: Sequence[Tensor]) -> None:
    """Raise ValueError where an optimizer that has its parameters from the start steps otherwise."""
    params = [nn.Parameter(run.numbers(0)) for run in runs]
    drawn = Randomness(params)
    try:
        itself = foreign.itself(group, params)
        if foreign.has("train"):
            itself.train()  # type: ignore[attr-defined]
        found = _moves(params, runs, lambda: unhooked(type(itself), "step")(itself))
    except Exception:  # it cannot be made without what is not known: there is nothing to compare with
        return
    finally:
        drawn.restore()
    if not all(map(_close, found, moves)):
        raise ValueError(
            f"wrap: {foreign.name} keeps something from step to step that is neither in the state of a parameter nor a "
            "setting of a group (a state under a key of its own, a dict or list among its attributes), and would lose "
            "it; keep that in state[param] or in the group, or leave it on float32 weights"
        )


def is_elementwise(foreign: Foreign, group: dict[str, Any]) -> bool:
    """Whether the update of an element depends on that element alone, so that a shadow can follow some of them."""
    if not group["params"]:
        return True
    shape = (LARGEST, LARGEST) if any(param.dim() > 1 for param in group["params"]) else (LARGEST**2,)
    run = Run(shape, 0, local(group["params"][0]).device)
    try:
        whole, some = (_stepped(foreign, group, [own]).moves[0] for own in (run, run._replace(first=FEW)))
    except Exception:  # it takes no vectors
        return False
    return _close(whole.flatten(1)[:, :FEW], some)


def small(param: Tensor) -> Shape:
    """The shape in which one like it is tried."""
    return tuple(min(n, LARGEST) for n in param.shape)


class Run(NamedTuple):
    """A parameter that is tried, and its gradients."""

    shape: Shape
    seed: int
    device: torch.device
    first: int | None = None  # as a vector of so many of its elements

    def numbers(self, step: int) -> Tensor:
        """The parameter at step 0, then its gradients."""
        generator = torch.Generator().manual_seed(self.seed + 100 * step)
        drawn = torch.randn(self.shape, dtype=torch.float32, generator=generator, device="cpu").to(self.device)
        return drawn if self.first is None else drawn.flatten()[: self.first]


def _stepped(foreign: Foreign, group: dict[str, Any], runs: Sequence[Run]) -> Tried:
    """Some steps. Nothing of the optimizer moves, nor torch's random generators."""
    params = [nn.Parameter(run.numbers(0)) for run in runs]
    drawn, trial = Randomness(params), Foreign(foreign.base, foreign.arguments)
    trial.makes_states, trial.is_trial = foreign.makes_states, True
    group, states = {**group, "params": []}, list[Values | None]([None] * len(params))
    first = list[frozenset[str]]()

    def step() -> None:
        nonlocal states, group, first
        states, group = _tried(trial, group, params, states, "step")
        first = first or [frozenset(own or ()) for own in states]

    try:
        if trial.has("train"):  # Schedule-Free's step refuses what is not told
            states, group = _tried(trial, group, params, states, "train")
        moves = _moves(params, runs, step)
    finally:
        drawn.restore()
    kept = [_kept(own or {}, names, param) for own, names, param in zip(states, first, params, strict=True)]
    return Tried(moves, kept, group)


def _moves(params: Sequence[nn.Parameter], runs: Sequence[Run], step: Callable[[], None]) -> list[Tensor]:
    """How far each step, with gradients of another size, moves the parameters: [steps, *shape] of each."""
    moves = []
    for k, size in enumerate(GRADIENTS):
        before = [param.detach().clone() for param in params]
        for param, run in zip(params, runs, strict=True):
            param.grad = size * run.numbers(k + 1)
        step()
        moves.append([param.detach() - x for param, x in zip(params, before, strict=True)])
    return [torch.stack(own) for own in zip(*moves, strict=True)]


def _tried(
    trial: Foreign, group: dict[str, Any], params: Sequence[nn.Parameter], states: Sequence[Values | None], method: str
) -> tuple[list[Values | None], dict[str, Any]]:
    """The states after a method, and the group as it is then."""
    after = list[Values | None](trial.run(group, params, states, method))
    group = {**group, **trial.moved(group)}
    trial.forget()
    return after, group


def _kept(states: Values, first: frozenset[str], param: Tensor) -> Kept:
    return Kept(states, first, frozenset(name for name, x in states.items() if param.dim() and is_shaped(x, param)))


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether the moves of each step are alike."""
    return all(bool((x - y).abs().max() <= CLOSE * x.abs().max()) for x, y in zip(a, b, strict=True) if x.numel())
