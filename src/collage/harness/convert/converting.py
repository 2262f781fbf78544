"""The conversion itself: a plan for every tensor, made before anything is written, then one tensor after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collage.conversion import Conversion, Rounded, carry, joined, rounded_pair
from collage.formats import format_of
from collage.harness.convert import files, matching, states, targets
from collage.harness.convert.files import Empty
from collage.harness.convert.models import About, Model, Writer
from collage.harness.convert.states import COLLAGE, Number, Parameter, Saved
from collage.harness.convert.targets import Target
from collage.layout import Plane, Planes
from collage.optimizers.converting import require_held
from collage.sharding import from_bytes
from collage.strategies import STRATEGIES, Strategy

STATE = "optimizer.pt"


@dataclass
class Weight:
    """What becomes of one weight and its state."""

    name: str
    parameter: Parameter
    prefixes: list[str]  # of what is kept of each element, the weight first
    source: Strategy
    strategy: Strategy


@dataclass
class Done:
    """What was converted, and what was not."""

    report: Conversion = field(default_factory=Conversion)
    left: list[str] = field(default_factory=list)  # tensors that are as they were
    step: int = 0
    wrote_state: bool = False
    misfits: int = 0
    numbers: int = 0


class Conversions:
    """A model and a state on their way to a target. Raises ValueError for what cannot be, before it writes."""

    def __init__(self, model: Model, saved: Saved | None, target: Target, what: str, is_cut: bool = False) -> None:
        self.model, self.target, self.is_cut, self.done = model, target, is_cut, Done()
        self._saved, self._what = saved or matching.of_model(model), what
        names = matching.names(model, self._saved, what)
        mixed = len({model.about[name].dtype for name in names}) > 1
        self.weights = {
            name: self._weight(name, parameter, stays=mixed)
            for name, parameter in zip(names, self._saved.parameters, strict=True)
        }
        self._tied = {model.place(name): name for name in names}
        self.done.left = [name for name in model.about if self.of(name) is None]
        self.done.step = max((_step(w.parameter.state) for w in self.weights.values()), default=0)
        self.content = self._content()

    def of(self, name: str) -> Weight | None:
        """What becomes of a tensor of the model; None: it stays."""
        return self.weights.get(name) or self.weights.get(self._tied.get(self.model.place(name), ""))

    def about(self, name: str) -> About:
        """A tensor as it will be."""
        old, weight = self.model.about[name], self.of(name)
        return old if weight is None else About(weight.strategy.dtype, old.shape)

    def _weight(self, name: str, parameter: Parameter, stays: bool) -> Weight:
        """stays: float32 weights beside narrower ones do."""
        dtype, shape = self.model.about[name]
        source = states.strategy_of(self._saved, parameter, dtype, shape, self._what)
        strategy = STRATEGIES["fp32"] if stays and dtype == torch.float32 else self.target.strategy.of(shape)
        prefixes = states.kept_in(parameter.state, shape)
        matching.require_shapes(name, shape, states.planes(prefixes, source), parameter.state, self._what)
        return Weight(name, parameter, prefixes, source, strategy)

    def _content(self) -> dict[str, Any] | None:
        """What the file of the state will hold; None: there is nothing that a weight does not show."""
        made: dict[Any, Any] = {}
        names: list[list[str]] = [[] for _ in self._saved.groups]
        for name, weight in self.weights.items():
            names[weight.parameter.group].append(name)
            planes = {
                targets.key_of(self.target, key): self._empty(plane.shape(self.model.about[name].shape), plane)
                for key, plane in states.planes(weight.prefixes, weight.strategy).items()
            }
            keeps = self.target.is_ours or self._saved.wrapped or weight.prefixes[1:]  # torch's would miss its moments
            if planes or (weight.parameter.state and keeps):
                rest = targets.rest_of(self.target, weight.parameter.state, self._saved.wrapped)
                made[weight.parameter.id] = {**rest, **planes}
        if not made:
            return None
        slots = {prefix for weight in self.weights.values() for prefix in weight.prefixes}
        strategies = [self._strategy_of(own) for own in names]
        kept = targets.Kept(slots, self.done.step, self._saved.wrapped)
        return targets.content(self.target, self._saved.groups, names, strategies, made, kept)

    def _strategy_of(self, names: Iterable[str]) -> Strategy:
        """Of a group: the target's, but where all its weights are float32 beside others that are not."""
        own = {self.weights[name].strategy for name in names}
        return STRATEGIES["fp32"] if own == {STRATEGIES["fp32"]} else self.target.strategy

    def _empty(self, shape: tuple[int, ...], plane: Plane) -> Empty:
        """A plane to be; our state_dicts have 16-bit integers as bytes."""
        if plane.dtype == torch.int16 and self.target.dialect == COLLAGE:
            return Empty((*shape, 2), torch.int8)
        return Empty(shape, plane.dtype)

    def write(self, folder: Path, tick: Callable[[int], None] = lambda _: None) -> Done:
        """Write the model and the state, one tensor at a time. tick: is given the number of finished bytes."""
        shards = [{name: self.about(name) for name in shard} for shard in self.model.shards]
        made = files.create(folder / STATE, self.content) if self.content is not None else {"state": {}}
        self.done.wrote_state = self.content is not None
        finished = 0
        with Writer(folder, shards, self.model.metadata) as writer:
            for name in (name for shard in shards for name in shard):
                writer.write(name, self._converted(name, made["state"]))
                finished += self.about(name).nbytes
                tick(finished)
            writer.finish()
        self._require_fit()
        return self.done

    def _converted(self, name: str, made: Mapping[Any, Any]) -> Tensor:
        """One tensor of the model as it will be; the planes of its state are written."""
        x, weight = self.model[name], self.of(name)
        if weight is None:
            return x
        visible = torch.empty(self.about(name).shape, dtype=self.about(name).dtype)
        outs, own = made.get(weight.parameter.id, {}), weight.parameter.state
        pairs = zip(*(states.numbers(weight.prefixes, s) for s in (weight.source, weight.strategy)), strict=True)
        for old, new in pairs:
            found, out = _planes(old, own), _planes(new, outs, lambda key: targets.key_of(self.target, key))
            if old.prefix == "param":
                self._theta(x, old, found, new, [visible, *out], name)
            else:
                self._count(old, new, carry(old.format, found, new.format, out), name)
        return visible

    def _theta(self, x: Tensor, old: Number, lows: Planes, new: Number, out: Planes, name: str) -> None:
        if not lows:
            self._count(old, new, carry(old.format, [x], new.format, out), name)
            return
        if self.is_cut and old.format == "bf16+int16":
            x = rounded_pair(x, lows[0])[0]
        fmt, own, misfits = joined(x, old.format, lows)
        self.done.misfits += misfits
        self.done.numbers += x.numel()
        self._count(old, new, carry(fmt, own, new.format, out), name)

    def _count(self, old: Number, new: Number, lost: Rounded, name: str) -> None:
        require_held(lost, name, old.prefix, new.format)
        self.done.report.add(old.prefix, old.format, new.format, lost)

    def _require_fit(self) -> None:
        if 2 * self.done.misfits > self.done.numbers:
            raise ValueError(
                f"{self.model.path}: {self.done.misfits:,} of {self.done.numbers:,} low components in the optimizer's "
                "state do not belong to these weights; give the model and the state that were saved together"
            )


def _planes(number: Number, state: Mapping[str, Any], named: Callable[[str], str] = str) -> list[Tensor]:
    """The planes of a number in a state, but for a weight itself, which is in none."""
    result = []
    for key, plane in zip(number.keys, format_of(number.format).planes, strict=True):
        if key != "param":
            found = state[named(key)]
            result.append(from_bytes(found) if plane.dtype == torch.int16 != found.dtype else found)
    return result


def _step(state: Mapping[str, Any]) -> int:
    return int(state.get("step", 0))
