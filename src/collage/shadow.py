"""The shadow: the same rule in float32 on one element in N, fed with the run's own gradients.

The rules are elementwise, so for those elements this is exactly the run that float32 would have made of these
gradients. It sees what the sums of a step cannot: a second moment that stuck long ago.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from collage.accumulators import Register
from collage.backends import Update, reference
from collage.formats import split
from collage.rng import Stream
from collage.rules import Rule
from collage.strategies import Strategy


class Observed(Protocol):
    """What a shadow needs of one parameter's share of a step."""

    @property
    def name(self) -> str: ...
    @property
    def group_index(self) -> int: ...
    @property
    def update(self) -> Update: ...
    @property
    def fold(self) -> Callable[[torch.dtype], Any]: ...


@dataclass(slots=True)
class Sampled:
    """Sums over the sampled elements. v and m are of the last step added, dot and norm2 of all."""

    v: float = 0.0
    v_shadow: float = 0.0
    m_error2: float = 0.0
    m_shadow2: float = 0.0
    dot: float = 0.0  # <shadow's update, arrived>
    norm2: float = 0.0  # |shadow's update|**2

    def __add__(self, other: Sampled) -> Sampled:
        return Sampled(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def add(self, step: Sampled) -> None:
        """Add a later step."""
        self.v, self.v_shadow, self.m_error2, self.m_shadow2 = step.v, step.v_shadow, step.m_error2, step.m_shadow2
        self.dot += step.dot
        self.norm2 += step.norm2


Beside = dict[str, tuple[list[float], Sampled]]


class Shadow:
    """Follows one element in ``stride`` of every parameter (row-major, its rank's part)."""

    def __init__(self, rule: Rule, stride: int, strategies: Sequence[Strategy]) -> None:
        self.rule = rule
        self.stride = stride
        self.strategies = strategies
        self._slots: dict[str, list[Tensor]] = {}  # name -> float32 theta, m, v
        self._joined: dict[tuple[str, ...], list[Tensor]] = {}  # names of a batch of the last step -> the same, joined
        self._beside: dict[str, dict[str, list[list[Tensor]]]] = {str(s): {} for s in strategies}  # -> planes
        self._before: dict[str, list[Tensor]] = {}

    def _sample(self, plane: Tensor) -> Tensor:
        """One element in ``stride``, row-major. A view where the plane is contiguous."""
        if plane.is_contiguous():
            return plane.view(-1)[:: self.stride]
        return plane.take(torch.arange(0, plane.numel(), self.stride, device=plane.device))

    def before(self, items: Sequence[Observed], due: bool) -> None:
        """Meet new parameters where they are; remember theta if the step is to be measured."""
        for item in items:
            if item.name not in self._slots:
                self._meet(item)
            if due:
                theta = item.update.strategy.formats[0].components(item.update.slots[0])
                self._before[item.name] = [self._sample(plane).clone() for plane in theta]

    def _meet(self, item: Observed) -> None:
        pairs = zip(item.update.strategy.formats, item.update.slots, strict=True)
        slots = [fmt.value([self._sample(p).clone() for p in planes]) for fmt, planes in pairs]
        self._slots[item.name] = slots
        for strategy in self.strategies:
            both = zip(strategy.formats, slots, strict=True)
            self._beside[str(strategy)][item.name] = [list(split(fmt, x)) for fmt, x in both]

    def after(self, items: Sequence[Observed], due: bool) -> tuple[dict[str, Sampled], Beside]:
        """Follow the step. Returns, if it is measured, each parameter's sums and each other strategy's."""
        sampled: dict[str, Sampled] = {}
        beside: Beside = {str(s): ([0.0] * len(reference.SUMS), Sampled()) for s in self.strategies} if due else {}
        joined, self._joined = self._joined, {}
        for batch in _same_constants(items):
            g = torch.cat([self._sample(item.update.grad) for item in batch]).float()
            g = -g if batch[0].update.maximize else g
            deltas = self._advance(batch, g, joined)
            if due:
                sampled |= {item.name: self._compare(item, delta) for item, delta in zip(batch, deltas, strict=True)}
            for strategy in self.strategies:
                sums, sample = self._advance_beside(strategy, batch, g)
                if due:
                    old_sums, old_sample = beside[str(strategy)]
                    beside[str(strategy)] = ([a + b for a, b in zip(old_sums, sums, strict=True)], old_sample + sample)
        return sampled, beside

    def _advance(
        self, batch: Sequence[Observed], g: Tensor, joined: dict[tuple[str, ...], list[Tensor]]
    ) -> Sequence[Tensor]:
        """One float32 step of the batch, all its parameters in one tensor. Returns the updates it intended."""
        names = tuple(item.name for item in batch)
        slots = joined.get(names) or self._join(names)
        delta, grown = self.rule.update(tuple(map(Register, slots)), g, batch[0].fold(torch.float32))
        self._joined[names] = [x.value for x in grown]
        sizes = [self._slots[name][0].numel() for name in names]
        for name, *parts in zip(names, *(torch.split(slot, sizes) for slot in self._joined[names]), strict=True):
            self._slots[name] = parts
        return torch.split(delta, sizes)

    def _join(self, names: Sequence[str]) -> list[Tensor]:
        return [torch.cat(slot) for slot in zip(*(self._slots[name] for name in names), strict=True)]

    def _compare(self, item: Observed, delta: Tensor) -> Sampled:
        """The run's sampled elements against the shadow's."""
        formats = item.update.strategy.formats
        slots = [[self._sample(p) for p in planes] for planes in item.update.slots]
        arrived = torch.zeros_like(delta, dtype=torch.float64)
        for old, new in zip(self._before.pop(item.name), formats[0].components(slots[0]), strict=True):
            arrived += new.double() - old.double()
        values = [fmt.value(planes) for fmt, planes in zip(formats, slots, strict=True)]
        result = self._moments(values, self._slots[item.name])
        result.dot = float((delta.double() * arrived).sum())
        result.norm2 = float(delta.double().square().sum())
        return result

    def _moments(self, values: Sequence[Tensor], shadow: Sequence[Tensor]) -> Sampled:
        result = Sampled()
        for (prefix, _), x, exact in zip(self.rule.slots, values, shadow, strict=True):
            if prefix == "exp_avg":
                result.m_error2 = float((x.double() - exact.double()).square().sum())
                result.m_shadow2 = float(exact.double().square().sum())
            if prefix == "exp_avg_sq":
                result.v, result.v_shadow = float(x.double().sum()), float(exact.double().sum())
        return result

    def _advance_beside(self, strategy: Strategy, batch: Sequence[Observed], g: Tensor) -> tuple[list[float], Sampled]:
        """One step of another strategy on the same elements. Returns its sums (reference.SUMS) and its moments."""
        planes_of = self._beside[str(strategy)]
        slots = [
            [torch.cat(parts) for parts in zip(*(planes_of[item.name][k] for item in batch), strict=True)]
            for k in range(len(strategy.formats))
        ]
        stream = Stream(batch[0].update.stream.seed, batch[0].update.stream.step, key=batch[0].group_index)
        index = torch.arange(g.numel(), device=g.device)
        random = [stream.bits(index, k) if fmt.stochastic else None for k, fmt in enumerate(strategy.formats)]
        g = g.to(strategy.register)
        delta, new = reference.advance(self.rule, strategy, slots, g, batch[0].fold(strategy.register), random)
        sums = torch.zeros(len(reference.SUMS), dtype=torch.float64)
        reference.measure(strategy, slots[0], new[0], delta, sums)
        sizes = [self._slots[item.name][0].numel() for item in batch]
        for i, item in enumerate(batch):
            planes_of[item.name] = [[torch.split(plane, sizes)[i] for plane in planes] for planes in new]
        values = [fmt.value(planes) for fmt, planes in zip(strategy.formats, new, strict=True)]
        return sums.tolist(), self._moments(values, self._joined[tuple(item.name for item in batch)])


def _same_constants(items: Sequence[Observed]) -> Iterator[list[Observed]]:
    """Parameters that share a group, step number and device can step as one tensor."""
    batches: dict[tuple[Any, ...], list[Observed]] = {}
    for item in items:
        key = (item.group_index, item.update.stream.step, item.update.grad.device)
        batches.setdefault(key, []).append(item)
    yield from batches.values()
