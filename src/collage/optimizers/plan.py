"""What a step needs of a group's parameters: each is looked at once, and good while no tensor is exchanged or moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from collage.backends.batch import stochastic
from collage.backends.operator import regions_of
from collage.optimizers import edits, planes
from collage.optimizers.memory import check_gradient, has_memory
from collage.optimizers.parameters import Group, Parameter, State
from collage.rules import Rule
from collage.sharding import any_dtensor, local, locals_of, region
from collage.strategies import STRATEGIES, Strategy

_shape, _dtype = attrgetter("shape"), attrgetter("dtype")
_weak: Any = StorageWeakRef  # torch has not typed it


def strategy_for(group: Group, in_float32: bool) -> Strategy | None:
    """The group's own strategy, or that of the float32 parameters among its narrower ones; None if it has no such."""
    own = Strategy.parse(group["strategy"])
    if not in_float32:
        return own
    return None if own.dtype == torch.float32 else STRATEGIES["fp32"]


def chosen(group: Group, in_float32: bool) -> list[Tensor]:
    """The group's parameters that have a gradient and that strategy."""
    params = [param for param in group["params"] if param.grad is not None]
    if torch.float32 not in set(map(_dtype, params)):
        return [] if in_float32 else params
    if Strategy.parse(group["strategy"]).dtype == torch.float32:
        return params
    return [param for param in params if (param.dtype == torch.float32) == in_float32]


@dataclass(slots=True)
class Plan:
    """One parameter, checked: its planes under a rule and a strategy, where they lie, and what was seen of them.

    version: of theta after its last step; told: whether an edit of it was.
    """

    parameter: Parameter
    rule: Rule
    strategy: Strategy
    held: list[Any]  # the parameter and its state's tensors, the counter last
    planes: list[Tensor] = field(init=False)  # local ones
    region: list[int] = field(init=False)
    facts: tuple[list[Any], ...] = field(init=False)
    version: int = edits.UNSEEN
    told: int = 0
    stayed: bool = False  # is where it was at its last step
    memory: Any = field(init=False)  # a weak reference to its storage, whose address another one may have by now
    place: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        tensor = self.parameter.tensor
        self.region = _region([tensor])  # refuses partial DTensors
        self.planes = locals_of(self.held[:-1])
        self.facts = _facts(self.held, self.planes)
        self.memory, self.place = _weak(self.planes[0].untyped_storage()), _place(self.planes[0])

    def follows(self, last: Plan | None) -> None:
        """Take over what was seen of the parameter, as far as it is where it was."""
        if last is not None:
            self.told = last.told
            self.stayed = last.version != edits.UNSEEN and last.place == self.place and not last.memory.expired()
            self.version = last.version if self.stayed else edits.UNSEEN

    def holds(self, parameter: Parameter, rule: Rule, strategy: Strategy, held: Sequence[Any]) -> bool:
        """Whether these are the tensors that were checked, where they were."""
        same = self.parameter[:3] == parameter[:3] and self.parameter.group is parameter.group
        same = same and (self.rule, self.strategy) == (rule, strategy)
        same = same and len(held) == len(self.held) and all(map(is_, held, self.held))
        return same and _facts(held, self.planes) == self.facts and not self.memory.expired()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _facts(held: Sequence[Any], planes: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """What must not change of tensors that were checked. held: of one parameter, or of several of one strategy."""
    width = len(held) // (len(held) - len(planes))  # a counter each
    in_order = list(map(Tensor.is_contiguous, planes))
    strided = [] if all(in_order) else [(p.shape, p.stride()) for p in planes]
    params = held[::width]
    return (
        list(map(Tensor.data_ptr, planes)), list(map(Tensor.data_ptr, held[width - 1 :: width])),
        in_order, strided, list(map(Tensor.numel, planes)), list(map(_shape, params)), list(map(_dtype, params)),
    )  # fmt: skip


class Columns:
    """Parameters that step together, as columns: what the step's operator takes of them.

    seen: [5, parameters] int64, the rows that `edits` names.
    """

    def __init__(self, first: int, plans: Sequence[Plan]) -> None:
        self.plans, self.first = plans, first
        self.rule, self.strategy = plans[0].rule, plans[0].strategy
        self.formats = planes.kept(self.rule, self.strategy).formats
        self.held = [x for plan in plans for x in plan.held]
        self.planes = [plane for plan in plans for plane in plan.planes]
        self.thetas = [plan.planes[0] for plan in plans]
        self.steps = [plan.held[-1] for plan in plans]
        self.names = [plan.parameter.name for plan in plans]
        random = stochastic(self.rule, self.formats)
        self.keys = [plan.parameter.key for plan in plans] if random else []
        self.regions = [x for plan in plans for x in plan.region] if random else []
        rows = [[plan.version, plan.told, edits.UNSEEN, 0, 0] for plan in plans]
        self.seen = torch.tensor(rows, dtype=torch.int64, device="cpu").T.contiguous()
        self.facts = _facts(self.held, self.planes)
        if self.regions and not all(plan.region for plan in plans):
            self.regions = [x for plan in plans for x in plan.region or _region([plan.parameter.tensor], whole=True)]
        self.places = regions_of(self.regions)

    def settle(self) -> None:
        """Leave what was seen of each parameter in its plan."""
        for plan, version, told in zip(self.plans, *self.seen[:2].tolist(), strict=True):
            plan.version, plan.told = version, told

    def holds(self, rule: Rule, strategy: Strategy, first: int, held: list[Any]) -> bool:
        """Whether these are the tensors that were checked, where they were."""
        same = (rule, strategy, first) == (self.rule, self.strategy, self.first) and len(held) == len(self.held)
        same = same and all(map(is_, held, self.held)) and _facts(held, self.planes) == self.facts
        return same and not any(plan.memory.expired() for plan in self.plans)


def gather(
    rule: Rule, strategy: Strategy, params: Sequence[Tensor], states: Mapping[Tensor, State], capturable: bool
) -> tuple[list[Any], list[Tensor]]:
    """(Every parameter, its planes and counter, as its state holds them, not checked; those that had no state yet).

    A state is made at first use, if it can be.
    """
    keys = (*planes.kept(rule, strategy).keys, "step")
    found: list[Any] = []
    fresh: list[Tensor] = []
    for param in params:
        values = states[param]
        if not values and param.dtype == strategy.dtype and has_memory(local(param)):
            planes.initialise(rule, strategy, param, values, capturable)
            fresh.append(param)
        found += (param, *map(values.get, keys))
    return found, fresh


def check(rule: Rule, strategy: Strategy, parameter: Parameter, grad: Tensor, values: State) -> None:
    """Raise, naming the parameter, what is wrong with its gradient (this rank's part) or its state."""
    check_gradient(parameter, grad)
    if not suits(rule, strategy, parameter.tensor, values):
        changed = (
            "; was its dtype or its strategy changed since it last stepped? Change it back, or make a new optimizer"
        )
        if values:
            planes.check(rule, strategy, parameter.tensor, values, parameter.name, hint=changed)
        raise ValueError(
            f"param '{parameter.name}': it and its optimizer state need memory on one device "
            f"({parameter.tensor.device}), placed alike, every element its own; some of it is elsewhere, freed, or "
            "expanded. opt.load_state_dict(opt.state_dict()) moves a state to its parameter"
        )
    planes.check_counter(values["step"], parameter.name)


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
    held: list[Any],
    grads: Sequence[Tensor],
    plans: Mapping[int, Plan],
    look: Callable[[Parameter, Tensor], None],
) -> list[Plan]:
    """A plan for each parameter that steps: the one there is where it still holds, or a new one after a `look`.

    plans: by id of the parameter. Raises what `look` raises.
    """
    width = len(held) // len(grads)
    result = []
    for k, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        own, plan = held[k * width : (k + 1) * width], plans.get(id(parameter.tensor))
        if plan is None or not plan.holds(parameter, rule, strategy, own):
            look(parameter, grad)
            last, plan = plan, Plan(parameter, rule, strategy, own)
            plan.follows(last)
        else:
            check_gradient(parameter, grad)
        result.append(plan)
    return result
