"""What the step's operator needs of a group: its parameters of one strategy, as lists of tensors and plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from collage import edits, state
from collage.backends import Share
from collage.rng import signed
from collage.rules import Rule
from collage.shadow import Item
from collage.sharding import any_dtensor, local, locals_of, region
from collage.state import Entry, Group, State
from collage.strategies import STRATEGIES, Strategy

_shape, _dtype = attrgetter("shape"), attrgetter("dtype")
_weak: Any = StorageWeakRef  # torch has not typed it


class Call(NamedTuple):
    """One call of ``torch.ops.collage.step_``; the lists are its arguments."""

    group: Group
    in_float32: bool
    strategy: str
    planes: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    keys: list[int]
    regions: list[int]
    seen: list[Tensor]  # of `torch.ops.collage.adopt_`, as the names
    names: list[str]


def strategy_of(group: Group, in_float32: bool) -> Strategy | None:
    """The group's own strategy, or that of the float32 parameters among its narrower ones; None if it has no such."""
    own = Strategy.parse(group["strategy"])
    if not in_float32:
        return own
    return None if own.dtype == torch.float32 else STRATEGIES["fp32"]


def chosen(group: Group, in_float32: bool) -> list[Tensor]:
    """The group's parameters that have a gradient and that strategy."""
    full = torch.float32 in set(map(_dtype, group["params"]))
    if in_float32 and not full:
        return []
    params = [param for param in group["params"] if param.grad is not None]
    if not full or Strategy.parse(group["strategy"]).dtype == torch.float32:
        return params
    return [param for param in params if (param.dtype == torch.float32) == in_float32]


def gather(
    rule: Rule, strategy: Strategy, params: Sequence[Tensor], states: Mapping[Tensor, State], capturable: bool
) -> tuple[list[Any], list[Tensor]]:
    """(Every parameter's planes and counter, as its state holds them, not checked; the parameters that had none yet).

    A state is made at first use, if it can be.
    """
    keys = [*_layout(rule, strategy)[0], "step"]
    found: list[Any] = []
    fresh: list[Tensor] = []
    for param in params:
        values = states[param]
        if not values and param.dtype == strategy.dtype and _has_memory(local(param)):
            state.initialise(rule, strategy, param, values, capturable)
            fresh.append(param)
        found += (param, *map(values.get, keys))
    return found, fresh


class Seen(NamedTuple):
    """A parameter after its last step: where it lay, its version, and whether an edit of it was told."""

    memory: Any = None  # a weak reference to its storage, whose address another storage may have by now
    place: tuple[Any, ...] = ()
    version: int = edits.UNSEEN
    told: int = 0

    def lies_in(self, tensor: Tensor) -> bool:
        """Whether a tensor is where the parameter was."""
        return self.memory is not None and self.place == _place(tensor) and not self.memory.expired()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class Roster:
    """The parameters that step together. Checked once, and good while no tensor is exchanged, moved or reshaped.

    first: position of the group's first parameter, which names and random bits of unnamed ones depend on.
    seen: what earlier rosters knew of these parameters: see `known`.
    """

    def __init__(
        self, strategy: Strategy, first: int, gathered: list[Any], entries: Sequence[Entry],
        seen: Mapping[Tensor, Seen],
    ) -> None:  # fmt: skip
        params = [entry.param for entry in entries]
        regions = _regions(params)  # refuses partial DTensors
        width = len(gathered) // max(len(params), 1)
        self._of = strategy, first
        self.entries = entries
        self.planes = locals_of([tensor for k, tensor in enumerate(gathered, 1) if k % width])
        self.steps = gathered[width - 1 :: width]
        self.keys = [signed(entry.key) for entry in entries] if strategy.stochastic else []
        self.regions = regions if strategy.stochastic else []
        self._gathered, self._facts = gathered, self._now(params)
        self.names = [entry.name for entry in entries]
        self.thetas = self.planes[:: width - 1]
        rows: list[list[int]] = []
        self.stayed: set[int] = set()  # ids of the parameters that are where they were at their last step
        for param, theta in zip(params, self.thetas, strict=True):
            last = seen.get(param, Seen())
            if last.lies_in(theta):
                self.stayed.add(id(param))
            rows.append([last.version if id(param) in self.stayed else edits.UNSEEN, last.told, edits.UNSEEN, 0, 0])
        self.seen = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 5).T.contiguous()
        self._memory = [(_weak(theta.untyped_storage()), _place(theta)) for theta in self.thetas]

    def known(self) -> Iterator[tuple[Tensor, Seen]]:
        """What is known of each parameter after its last step."""
        for entry, memory, row in zip(self.entries, self._memory, self.seen.T.tolist(), strict=True):
            yield entry.param, Seen(*memory, row[edits.VERSION], row[edits.TOLD])

    def holds(self, strategy: Strategy, first: int, params: Sequence[Tensor], gathered: list[Any]) -> bool:
        """Whether these are the tensors that were checked, where they were."""
        same = (strategy, first) == self._of and len(gathered) == len(self._gathered)
        same = same and all(map(is_, gathered, self._gathered)) and self._now(params) == self._facts
        return same and not any(memory.expired() for memory, _ in self._memory)

    def _now(self, params: Sequence[Tensor]) -> tuple[list[Any], ...]:
        in_order = list(map(Tensor.is_contiguous, self.planes))
        strided = [] if all(in_order) else [(p.shape, p.stride()) for p in self.planes]
        return (
            list(map(Tensor.data_ptr, self.planes)), list(map(Tensor.data_ptr, self.steps)), in_order, strided,
            list(map(Tensor.numel, self.planes)), list(map(_shape, params)), list(map(_dtype, params)),
        )  # fmt: skip


def check(rule: Rule, strategy: Strategy, entry: Entry, grad: Tensor, values: State) -> None:
    """Raise, naming the parameter, what is wrong with its gradient (this rank's part) or its state."""
    state.check_gradient(entry, grad)
    if not suits(rule, strategy, entry.param, values):
        changed = (
            "; was its dtype or its strategy changed since it last stepped? Change it back, or make a new optimizer"
        )
        if values:
            state.check(rule, strategy, entry.param, values, entry.name, hint=changed)
        raise ValueError(
            f"param '{entry.name}': it and its optimizer state need memory on one device ({entry.param.device}), "
            "placed alike, every element its own; some of it is elsewhere, freed, or expanded. "
            "opt.load_state_dict(opt.state_dict()) moves a state to its parameter"
        )
    state.check_counter(values["step"], entry.name)


def suits(rule: Rule, strategy: Strategy, param: Tensor, values: State) -> bool:
    """Whether a parameter and its state are this strategy's, with memory on one device, every element its own."""
    keys, dtypes = _layout(rule, strategy)
    planes = [local(plane) for plane in (param, *map(values.get, keys)) if isinstance(plane, Tensor)]
    if len(values) != len(keys) + 1 or list(map(_dtype, planes)) != dtypes:
        return False
    shape, device = planes[0].shape, planes[0].device
    return all(p.shape == shape and p.device == device and _has_memory(p) for p in planes)


def _has_memory(tensor: Tensor) -> bool:
    """Whether every element lies in memory of its own: no storage freed or shrunk (FSDP does), no element twice."""
    return state.in_memory(tensor) and (tensor.is_contiguous() or not _overlaps(tensor))


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


def _regions(params: Sequence[Tensor]) -> list[int]:
    """Where the local parts lie, as the operator takes it; nothing if no parameter is sharded."""
    numbers: list[int] = []
    if any_dtensor(params):
        for place in map(region, params):
            numbers += [len(place.sizes), *place.sizes, *place.starts, *place.strides]
    return numbers


def numbers(settings: Sequence[float | Tensor]) -> Tensor:
    """Settings as a float64 tensor on the CPU.

    In a graph they are added to a constant, which torch.compile leaves open for the values of later steps; it would
    compile anew for each value of a tensor made of them.
    """
    if torch.compiler.is_compiling():
        return torch.stack([torch.zeros((), dtype=torch.float64, device="cpu") + x for x in settings])
    return torch.tensor(list(map(float, settings)), dtype=torch.float64, device="cpu")


def require_compilable(planes: Sequence[Tensor], monitored: bool) -> None:
    """Raise RuntimeError for a step that torch.compile would get wrong."""
    if monitored:
        raise RuntimeError("monitor: it measures in Python, outside a compiled step; call opt.step() uncompiled")
    if any_dtensor(planes):
        raise RuntimeError("params: a compiled step takes no DTensors; call opt.step() uncompiled")
    storages = [plane.untyped_storage().data_ptr() for plane in planes if plane.numel()]
    if len(set(storages)) < len(storages):
        raise RuntimeError(
            "params: some are views of one buffer, which torch.compile is known to mix up; call opt.step() "
            "uncompiled, or give each parameter memory of its own"
        )


def require_capturable(groups: Sequence[Group]) -> None:
    """Raise RuntimeError where a graph is being captured that would repeat one step number for ever."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if capturing and not all(group["capturable"] for group in groups):
        raise RuntimeError("capturable: a step in a CUDA graph needs AdamW(..., capturable=True)")


def items(call: Call, roster: Roster, hyper: Sequence[float], sums: Sequence[Tensor]) -> Iterator[Item]:
    """Every parameter of a call, as a monitor sees it. sums: [5] each; none where the step is not measured."""
    strategy, group = Strategy.parse(call.strategy), call.group
    rest = iter(call.planes)
    lr, seed, maximize = float(group["lr"]), group["seed"], group["maximize"]
    for k, entry in enumerate(roster.entries):
        slots = tuple(tuple(islice(rest, len(fmt.dtypes))) for fmt in strategy.formats)
        share = Share(slots, call.grads[k], int(call.steps[k]) + 1, entry.key, sums=sums[k] if sums else None)
        yield Item(entry.name, entry.group_index, strategy, share, maximize, seed, lr, hyper)
