"""The conversion itself: a plan for every tensor, made before anything is written, then one tensor after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collage.backends.batch import cut
from collage.conversion import Conversion, Rounded, carry, joined, rounded_pair
from collage.formats import format_of
from collage.harness.convert import files, matching, states, targets
from collage.harness.convert.files import Empty
from collage.harness.convert.models import About, Model, Writer
from collage.harness.convert.states import COLLAGE, Parameter, Saved
from collage.harness.convert.targets import Target
from collage.layout import Planes
from collage.optimizers.planes import in_words, kept
from collage.sharding import from_bytes
from collage.strategies import STRATEGIES, Strategy

STATE = "optimizer.pt"


@dataclass
class Weight:
    """What becomes of one weight and its state."""

    name: str
    parameter: Parameter
    prefixes: list[str]  # of what it keeps, itself first
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
        self._saved = saved or matching.of_model(model)
        names = matching.names(model, self._saved, what)
        self.weights = {}
        mixed = len({model.about[name].dtype for name in names}) > 1
        for name, parameter in zip(names, self._saved.parameters, strict=True):
            self.weights[name] = self._weight(name, parameter, what, stays=mixed)
        self._tied = {model.place(name): name for name in names}
        self.done.left = [name for name in model.about if self.of(name) is None]
        self.done.step = max((int(w.parameter.state.get("step", 0)) for w in self.weights.values()), default=0)
        self._names: list[list[str]] = [[] for _ in self._saved.groups]
        for weight in self.weights.values():
            self._names[weight.parameter.group].append(weight.name)
        self.content = self._content()

    def of(self, name: str) -> Weight | None:
        """What becomes of a tensor of the model; None: it stays."""
        return self.weights.get(name) or self.weights.get(self._tied.get(self.model.place(name), ""))

    def _weight(self, name: str, parameter: Parameter, what: str, stays: bool) -> Weight:
        dtype, shape = self.model.about[name]
        source = states.strategy_of(self._saved, parameter, dtype, shape, what)
        strategy = STRATEGIES["fp32"] if stays and dtype == torch.float32 else self.target.strategy.of(shape)
        prefixes = list(dict.fromkeys(["param", *states.slots_in(parameter.state)]))
        matching.require_shapes(name, shape, states.rule_of(prefixes), source, parameter.state, what)
        return Weight(name, parameter, prefixes, source, strategy)

    def _content(self) -> dict[str, Any] | None:
        """What the file of the state will hold; None: there is nothing that a weight does not show."""
        made: dict[Any, Any] = {}
        slots: set[str] = set()
        for weight in self.weights.values():
            shape, slots = self.model.about[weight.name].shape, slots | set(weight.prefixes)
            own = self._planes(weight, shape)
            step = weight.parameter.state.get("step", torch.zeros((), dtype=torch.int64))
            if own:
                made[weight.parameter.id] = {**targets.step_of(self.target, step), **own}
        if not made:
            return None
        strategies = [self._strategy_of_group(k) for k in range(len(self._names))]
        return targets.content(self.target, self._saved.groups, self._names, strategies, made, slots, self.done.step)

    def _strategy_of_group(self, index: int) -> Strategy:
        """The target's, but for a group of float32 weights among others."""
        own = {self.weights[name].strategy for name in self._names[index]}
        return STRATEGIES["fp32"] if own == {STRATEGIES["fp32"]} else self.target.strategy

    def _planes(self, weight: Weight, shape: torch.Size) -> dict[str, Any]:
        own = kept(states.rule_of(weight.prefixes), weight.strategy)
        result: dict[str, Any] = {}
        for key, plane in zip(own.keys, own.planes[1:], strict=True):
            sizes = plane.shape(shape)
            as_bytes = plane.dtype == torch.int16 and self.target.dialect == COLLAGE
            made = Empty((*sizes, 2), torch.int8) if as_bytes else Empty(sizes, plane.dtype)
            result[targets.key_of(self.target, key)] = made
        return result

    def about(self, name: str) -> About:
        """A tensor as it will be."""
        old, weight = self.model.about[name], self.of(name)
        return old if weight is None else About(weight.strategy.dtype, old.shape)

    def write(self, folder: Path, tick: Callable[[int], None] = lambda _: None) -> Done:
        """Write the model and the state, one tensor at a time. tick: is given the number of finished bytes."""
        shards = [{name: self.about(name) for name in shard} for shard in self.model.shards]
        made = files.create(folder / STATE, self.content) if self.content is not None else {"state": {}}
        self.done.wrote_state = self.content is not None
        finished = 0
        with Writer(folder, shards, self.model.metadata) as writer:
            for shard in shards:
                for name, about in shard.items():
                    writer.write(name, self._converted(name, about, made["state"]))
                    finished += about.nbytes
                    tick(finished)
            writer.finish()
        self._require_fit()
        return self.done

    def _converted(self, name: str, about: About, made: Mapping[Any, Any]) -> Tensor:
        """One tensor of the model as it will be; the planes of its state are written."""
        x, weight = self.model[name], self.of(name)
        if weight is None:
            return x
        visible = torch.empty(about.shape, dtype=about.dtype)
        rule, state = states.rule_of(weight.prefixes), weight.parameter.state
        state = in_words(rule, weight.source, state)
        own = kept(rule, weight.strategy)
        outs = self._outs(weight, own.keys, made.get(weight.parameter.id, {}))
        slots = cut(own.formats, [visible, *outs])
        for slot, source, target, out in zip(
            rule.slots, weight.source.formats(rule.roles), own.formats, slots, strict=True
        ):
            keys = [slot.prefix + suffix for suffix in format_of(source).suffixes]
            if slot.prefix == "param":
                self._theta(x, source, [state[key] for key in keys[1:]], target, out, weight)
            elif keys[0] in state:
                self._count(slot.prefix, source, target, carry(source, [state[key] for key in keys], target, out), name)
        return visible

    def _outs(self, weight: Weight, keys: tuple[str, ...], made: Mapping[str, Tensor]) -> Planes:
        """The planes to be written, in our order."""
        found = [made[targets.key_of(self.target, key)] for key in keys]
        return [from_bytes(x) if x.dtype == torch.int8 and x.shape[-1:] == (2,) and self._is_bytes(key, weight) else x
                for key, x in zip(keys, found, strict=True)]  # fmt: skip

    def _is_bytes(self, key: str, weight: Weight) -> bool:
        return self.target.dialect == COLLAGE and key == "param_lo" and "int16" in weight.strategy.param

    def _theta(self, x: Tensor, source: str, lows: Planes, target: str, out: Planes, weight: Weight) -> None:
        if not lows:
            self._count("param", source, target, carry(source, [x], target, out), weight.name)
            return
        if self.is_cut and source == "bf16+int16":
            x = rounded_pair(x, lows[0])[0]
        fmt, own, misfits = joined(x, source, lows)
        self.done.misfits += misfits
        self.done.numbers += x.numel()
        self._count("param", source, target, carry(fmt, own, target, out), weight.name)

    def _count(self, slot: str, source: str, target: str, lost: Rounded, name: str) -> None:
        if lost.beyond:
            raise ValueError(
                f"'{name}': {lost.beyond:,} numbers of {slot} are beyond what '{target}' holds; "
                "take a strategy of bfloat16 formats"
            )
        self.done.report.add(slot, source, target, lost)

    def _require_fit(self) -> None:
        if 2 * self.done.misfits > self.done.numbers:
            raise ValueError(
                f"{self.model.path}: {self.done.misfits:,} of {self.done.numbers:,} low components in the optimizer's "
                "state do not belong to these weights; give the model and the state that were saved together"
            )
