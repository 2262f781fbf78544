"""What a step needs of a group's parameters: each is looked at once, and good while no tensor is exchanged or moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from collage.backends.batch import stochastic
from collage.backends.operator import regions_of
from collage.optimizers import checking, edits, planes
from collage.optimizers.facts import Facts
from collage.optimizers.memory import check_gradient, has_memory
from collage.optimizers.parameters import Group, Parameter, State
from collage.rules import Rule
from collage.sharding import any_dtensor, local, region
from collage.strategies import STRATEGIES, Strategy, is_small

_dtype = attrgetter("dtype")


# Kinds of a group's parameters: those of its strategy, small ones, float32 ones among its narrower ones, 16-bit ones
# beside its 8-bit ones, some of them small again. Each kind has a strategy, and steps by itself.
KINDS = OWN, SMALL, WIDE, BESIDE, BESIDE_SMALL = range(5)


def strategies_for(group: Group) -> tuple[Strategy, ...]:
    """The strategy of each kind of a group's parameters."""
    own = Strategy.parse(group["strategy"])
    return own, own.small, STRATEGIES["fp32"], own.beside, own.beside.small


Chosen = tuple[list[Tensor], list[Tensor]]  # parameters, and their gradients


def chosen(group: Group, params: Sequence[Tensor] | None = None) -> Sequence[Chosen]:
    """The group's parameters of each kind that have a gradient; or of some of its parameters."""
    params = [param for param in (group["params"] if params is None else params) if param.grad is not None]
    grads: list[Any] = [param.grad for param in params]
    own, small, *_ = strategies_for(group)
    found: list[Chosen] = [([], []) for _ in KINDS]
    if own is small and set(map(_dtype, params)) <= {own.dtype}:
        found[OWN] = params, grads
        return found
    for param, grad in zip(params, grads, strict=True):
        some, theirs = found[_kind(param, own)]
        some.append(param)
        theirs.append(grad)
    return found


def _kind(param: Tensor, own: Strategy) -> int:
    if param.dtype == torch.float32 != own.dtype:
        return WIDE
    beside = own.beside is not own and param.dtype == own.beside.dtype
    small = own is not own.small and is_small(param.shape)
    return (BESIDE_SMALL if small else BESIDE) if beside else SMALL if small else OWN


@dataclass(slots=True)
class Plan:
    """One parameter, checked: its planes under a rule and a strategy, where they lie, and what was seen of them.

    version: of theta after its last step; told: whether an edit of it was; stayed: whether it is where it was then.
    """

    parameter: Parameter
    rule: Rule
    strategy: Strategy
    state: State
    planes: list[Tensor] = field(init=False)  # local ones
    held: list[Tensor] = field(init=False)  # all that is in the state
    region: list[int] = field(init=False)
    facts: Facts = field(init=False)
    version: int = edits.UNSEEN
    told: int = 0
    stayed: bool = False

    def __post_init__(self) -> None:
        tensor = self.parameter.tensor
        self.region = _region([tensor])  # refuses partial DTensors
        keys = planes.kept(self.rule, self.strategy).keys
        self.planes = [local(tensor), *map(local, map(self.state.__getitem__, keys))]
        self.held = list(self.state.values())
        self.facts = Facts([tensor], self.planes, [self.state["step"]])

    def follows(self, last: Plan | None) -> None:
        """Take over what was seen of the parameter, as far as it is where it was."""
        if last is not None:
            self.told = last.told
            self.stayed = last.version != edits.UNSEEN and last.facts.place == self.facts.place and last.facts.live
            self.version = last.version if self.stayed else edits.UNSEEN

    def holds(self, parameter: Parameter, rule: Rule, strategy: Strategy, state: State) -> bool:
        """Whether these are the tensors that were checked, where they were."""
        same = self.parameter[:3] == parameter[:3] and self.parameter.group is parameter.group
        same = same and (self.rule, self.strategy) == (rule, strategy) and len(state) == len(self.held)
        return same and self.state is state and all(map(is_, state.values(), self.held)) and self.facts.hold()


class Columns:
    """Parameters that step together, as columns: what the step's operator takes of them.

    seen: [5, parameters] int64, the rows that `edits` names.
    """

    def __init__(self, first: int, plans: Sequence[Plan]) -> None:
        self.plans, self.first = plans, first
        self.rule, self.strategy = plans[0].rule, plans[0].strategy
        self.group = plans[0].parameter.group
        self.formats = planes.kept(self.rule, self.strategy).formats
        self.params = [plan.parameter.tensor for plan in plans]
        self.states = [plan.state for plan in plans]
        self.held = [x for plan in plans for x in plan.held]
        self.planes = [plane for plan in plans for plane in plan.planes]
        self.steps = [plan.state["step"] for plan in plans]
        self.facts = plans[0].facts if len(plans) == 1 else Facts(self.params, self.planes, self.steps)
        self.thetas = self.facts.visible
        self.sharded = self.params if any_dtensor(self.params) else ()
        self.names = [plan.parameter.name for plan in plans]
        random = stochastic(self.rule, self.formats)
        self.keys = [plan.parameter.key for plan in plans] if random else []
        self.regions = [x for plan in plans for x in plan.region] if random else []
        if self.regions and not all(plan.region for plan in plans):
            self.regions = [x for plan in plans for x in plan.region or _region([plan.parameter.tensor], whole=True)]
        self.places = regions_of(self.regions)
        rows = [[plan.version, plan.told, edits.UNSEEN, 0, 0] for plan in plans]
        self.seen = torch.tensor(rows, dtype=torch.int64, device="cpu").T.contiguous()
        self.kept: dict[str, Any] = {"addresses": self.facts.addresses}
        if all(step.device.type == "cpu" for step in self.steps):
            self.kept["counters"] = self.facts.counters

    def settle(self) -> None:
        """Leave what was seen of each parameter in its plan."""
        for plan, version, told in zip(self.plans, *self.seen[:2].tolist(), strict=True):
            plan.version, plan.told = version, told

    def holds(
        self, rule: Rule, strategy: Strategy, first: int, params: Sequence[Tensor], states: Mapping[Tensor, State]
    ) -> bool:
        """Whether these are the tensors that were checked, where they were."""
        if (rule, strategy, first, len(params)) != (self.rule, self.strategy, self.first, len(self.params)):
            return False
        if not all(map(is_, params, self.params)) or not all(map(is_, map(states.get, params), self.states)):
            return False
        now = list(chain.from_iterable(map(dict.values, self.states)))
        return len(now) == len(self.held) and all(map(is_, now, self.held)) and self.facts.hold()


def started(
    rule: Rule, strategy: Strategy, params: Sequence[Tensor], states: Mapping[Tensor, State], capturable: bool
) -> list[Tensor]:
    """Make a state for every parameter that has none yet, if it can be; returns which those are."""
    fresh: list[Tensor] = []
    for param in params:
        planes.complete(rule, strategy, param, states[param])
        if states[param] or param.dtype != strategy.dtype or planes.cut(rule, strategy, param):
            continue
        if has_memory(local(param)):
            planes.initialise(rule, strategy, param, states[param], capturable)
            fresh.append(param)
    return fresh


def check(rule: Rule, strategy: Strategy, parameter: Parameter, grad: Tensor, values: State) -> None:
    """Raise, naming the parameter, what is wrong with its gradient (this rank's part) or its state."""
    check_gradient(parameter, grad)
    require_whole_blocks(rule, strategy, parameter)
    if not suits(rule, strategy, parameter.tensor, values):
        changed = (
            "; was its dtype or its strategy changed since it last stepped? Change it back, or make a new optimizer"
        )
        if values:
            checking.check(rule, strategy, parameter.tensor, values, parameter.name, hint=changed)
        raise ValueError(
            f"param '{parameter.name}': it and its optimizer state need memory on one device "
            f"({parameter.tensor.device}), placed alike, every element its own; some of it is elsewhere, freed, or "
            "expanded. opt.load_state_dict(opt.state_dict()) moves a state to its parameter"
        )
    checking.check_counter(values["step"], parameter.name)


def require_whole_blocks(rule: Rule, strategy: Strategy, parameter: Parameter) -> None:
    """Raise ValueError, naming the parameter, where its shards cut blocks that share a scale."""
    reason = planes.cut(rule, strategy, parameter.tensor)
    if reason:
        raise ValueError(f"param '{parameter.name}': {reason}")


def suits(rule: Rule, strategy: Strategy, param: Tensor, values: State) -> bool:
    """Whether a parameter and its state are this strategy's, with memory on one device, every element its own."""
    own = planes.kept(rule, strategy)
    found = [local(plane) for plane in (param, *map(values.get, own.keys)) if isinstance(plane, Tensor)]
    if len(values) != len(own.keys) + 1 or list(map(_dtype, found)) != [plane.dtype for plane in own.planes]:
        return False
    shapes = [plane.shape(found[0].shape) for plane in own.planes]
    return [tuple(p.shape) for p in found] == shapes and all(
        p.device == found[0].device and has_memory(p) for p in found
    )


def _region(params: Sequence[Tensor], whole: bool = False) -> list[int]:
    """Where the local parts lie, as the operator takes it; nothing of one that is not sharded, unless `whole`."""
    numbers: list[int] = []
    if whole or any_dtensor(params):
        for place in map(region, params):
            numbers += [len(place.sizes), *place.sizes, *place.starts, *place.strides]
    return numbers


def renewed(
    parameters: Iterator[Parameter],
    rule: Rule,
    strategy: Strategy,
    grads: Sequence[Tensor],
    states: Mapping[Tensor, State],
    plans: Mapping[int, Plan],
    look: Callable[[Parameter, Tensor], None],
) -> list[Plan]:
    """A plan for each parameter that steps: the one there is where it still holds, or a new one after a `look`.

    plans: by id of the parameter. Raises what `look` raises.
    """
    result = []
    for parameter, grad in zip(parameters, grads, strict=True):
        state, plan = states[parameter.tensor], plans.get(id(parameter.tensor))
        if plan is None or not plan.holds(parameter, rule, strategy, state):
            look(parameter, grad)
            last, plan = plan, Plan(parameter, rule, strategy, state)
            plan.follows(last)
        else:
            check_gradient(parameter, grad)
        result.append(plan)
    return result
