"""The shadow: the same rule in float32 on one element in N, fed with the run's own gradients.

The rules are elementwise, so for those elements this is exactly the run that float32 would have made of these
gradients. It sees what the sums of a step cannot: a second moment that stuck long ago.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.backends import Batch, Share, choose, reference
from collage.formats import split
from collage.rules import Rule
from collage.strategies import STRATEGIES, Strategy

RUN = 16  # neighbours: elements far apart would each cost a cache line


class Item(NamedTuple):
    """One parameter's share of a step, as a monitor and its shadow see it."""

    name: str
    group_index: int
    strategy: Strategy
    share: Share
    maximize: bool
    seed: int
    lr: float
    hyper: Sequence[float]  # the rule's other hyper-parameters


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


def intended(rule: Rule, strategy: Strategy, item: Item, slots: Sequence[Sequence[Tensor]], g: Tensor) -> Tensor:
    """The update that the rule makes of these planes and gradients in an item's step, before it is rounded."""
    register = strategy.register
    constants = rule.fold(item.lr, item.hyper, item.share.step, register).on(register, g.device)
    numbers = tuple(fmt.load(tuple(planes), register) for fmt, planes in zip(strategy.formats, slots, strict=True))
    g = g.to(register)
    return rule.update(numbers, -g if item.maximize else g, constants).delta


Beside = dict[str, tuple[list[float], Sampled]]


class _Run:
    """One strategy on the sampled elements. Parameters that step together lie in one tensor."""

    def __init__(self, rule: Rule, strategy: Strategy) -> None:
        self.rule = rule
        self.strategy = strategy
        self._planes: dict[str, list[Tensor]] = {}  # of each parameter: views of those below, once it has stepped
        self._joined: dict[tuple[str, ...], list[Tensor]] = {}

    def meet(self, name: str, values: Sequence[Tensor]) -> None:
        """Start a parameter at these numbers of theta and the rule's other slots."""
        pairs = zip(self.strategy.formats, values, strict=True)
        self._joined = {names: planes for names, planes in self._joined.items() if name not in names}
        self._planes[name] = [plane for fmt, x in pairs for plane in split(fmt, x)]

    def follow(self, name: str, theta: Tensor) -> None:
        """Go on from these weights; the other slots stay."""
        for plane, value in zip(self._planes[name], split(self.strategy.formats[0], theta), strict=False):
            plane.copy_(value)

    def slots(self, items: Sequence[Item]) -> list[list[Tensor]]:
        """The planes of every slot, of all these parameters in one."""
        names = tuple(item.name for item in items)
        if names not in self._joined:
            self._join(names)
        rest = iter(self._joined[names])
        return [list(islice(rest, len(fmt.dtypes))) for fmt in self.strategy.formats]

    def _join(self, names: tuple[str, ...]) -> None:
        sizes = [self._planes[name][0].numel() for name in names]
        joined = [torch.cat(parts) for parts in zip(*map(self._planes.__getitem__, names), strict=True)]
        for name, *parts in zip(names, *(torch.split(plane, sizes) for plane in joined), strict=True):
            self._planes[name] = parts
        self._joined = {others: planes for others, planes in self._joined.items() if not set(others) & set(names)}
        self._joined[names] = joined

    def values(self, items: Sequence[Item]) -> list[Tensor]:
        """The numbers that the planes stand for, float32."""
        return [fmt.value(planes) for fmt, planes in zip(self.strategy.formats, self.slots(items), strict=True)]

    def intended(self, items: Sequence[Item], g: Tensor) -> Tensor:
        """The update that `step` will make, before it is rounded into theta."""
        return intended(self.rule, self.strategy, items[0], self.slots(items), g)

    def step(self, items: Sequence[Item], g: Tensor, sums: Sequence[Tensor] = ()) -> None:
        """One step, as an optimizer of that strategy would make it."""
        first = items[0]
        planes = [plane for slot in self.slots(items) for plane in slot]
        batch = Batch(
            self.rule, self.strategy, first.lr, first.hyper, first.maximize, first.seed, planes, [g],
            [first.share.step], [first.group_index], [], sums,
        )  # fmt: skip
        choose("auto", g.device).step(batch)


class Shadow:
    """Follows one element in ``stride`` of every parameter (row-major, its rank's part), in runs of neighbours."""

    def __init__(self, rule: Rule, stride: int, strategies: Sequence[Strategy]) -> None:
        self.stride = stride
        self._exact = _Run(rule, STRATEGIES["fp32"])
        self._beside = [_Run(rule, strategy) for strategy in strategies]
        self._met: dict[str, torch.Size] = {}
        self._before: list[list[Tensor]] = []  # theta's planes in each batch of a measured step

    def _sample(self, plane: Tensor) -> Tensor:
        """One element in ``stride``, row-major. A view where that can be."""
        if self.stride == 1 or plane.numel() <= RUN:
            return plane.reshape(-1)
        if plane.is_contiguous():
            return plane.view(-1).unfold(0, RUN, RUN * self.stride).reshape(-1)
        first = torch.arange(0, plane.numel() - RUN + 1, RUN * self.stride, device=plane.device)
        return plane.take((first[:, None] + torch.arange(RUN, device=plane.device)).view(-1))

    def _samples(self, planes: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(map(self._sample, planes)))

    def before(self, items: Sequence[Item], due: bool, changed: Container[str] = ()) -> None:
        """Meet new parameters, follow those that others changed, remember theta if the step is to be measured."""
        for item in items:
            if self._met.get(item.name) != item.share.grad.shape:
                self._meet(item)
            elif item.name in changed:
                theta = item.strategy.formats[0].value([self._sample(plane) for plane in item.share.slots[0]])
                for run in (self._exact, *self._beside):
                    run.follow(item.name, theta)
        if due:
            self._before = [self._slot(batch, 0) for batch in _batches(items)]

    def _meet(self, item: Item) -> None:
        pairs = zip(item.strategy.formats, item.share.slots, strict=True)
        values = [fmt.value([self._sample(p).clone() for p in planes]) for fmt, planes in pairs]
        self._met[item.name] = item.share.grad.shape
        for run in (self._exact, *self._beside):
            run.meet(item.name, values)

    def _slot(self, batch: Sequence[Item], slot: int) -> list[Tensor]:
        """The planes of a slot as the optimizer has them, sampled, of all these parameters in one."""
        return [self._samples(planes) for planes in zip(*(item.share.slots[slot] for item in batch), strict=True)]

    def after(self, items: Sequence[Item], due: bool) -> tuple[dict[str, Sampled], Beside]:
        """Follow the step. Returns, if it is measured, each parameter's sums and each other strategy's."""
        sampled: dict[str, Sampled] = {}
        beside: Beside = {}
        for k, batch in enumerate(_batches(items)):
            g = self._samples(item.share.grad for item in batch).float()
            delta = self._exact.intended(batch, g) if due else None
            self._exact.step(batch, g)
            if delta is not None:
                sampled |= self._compare(batch, delta, self._before[k])
            for run in self._beside:
                sums = torch.zeros(1, len(reference.SUMS), dtype=torch.float64, device="cpu")
                run.step(batch, g, list(sums) if due else [])
                if due:
                    old, sample = beside.get(str(run.strategy), ([0.0] * len(reference.SUMS), Sampled()))
                    moments = Sampled(*self._moments(run.values(batch), batch).sum(1).tolist())
                    total = [a + b for a, b in zip(old, sums[0].tolist(), strict=True)]
                    beside[str(run.strategy)] = total, sample + moments
        self._before = []
        return sampled, beside

    def _compare(self, batch: Sequence[Item], delta: Tensor, before: list[Tensor]) -> dict[str, Sampled]:
        """The run's sampled elements against the shadow's, parameter by parameter."""
        formats = batch[0].strategy.formats
        slots = [self._slot(batch, slot) for slot in range(len(formats))]
        arrived = torch.zeros_like(delta, dtype=torch.float64)
        pairs = zip(formats[0].components(before), formats[0].components(slots[0]), strict=True)
        for old, new in reversed(list(pairs)):
            arrived += new.double() - old.double()
        values = [fmt.value(planes) for fmt, planes in zip(formats, slots, strict=True)]
        intended = delta.double()
        terms = torch.cat([self._moments(values, batch), torch.stack([intended * arrived, intended * intended])])
        sizes = [self._sample(item.share.grad).numel() for item in batch]
        owner = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64, device=delta.device))
        totals = torch.zeros(len(terms), len(batch), dtype=torch.float64, device=delta.device)
        totals.index_add_(1, owner, terms)
        return {item.name: Sampled(*own) for item, own in zip(batch, totals.T.tolist(), strict=True)}

    def _moments(self, values: Sequence[Tensor], batch: Sequence[Item]) -> Tensor:
        """[4, elements] float64: what v, v_shadow, m_error2 and m_shadow2 of `Sampled` are the sums of."""
        exact = self._exact.values(batch)
        terms = {
            prefix: (x.double(), y.double())
            for (prefix, _), x, y in zip(self._exact.rule.slots, values, exact, strict=True)
        }
        nothing = torch.zeros_like(values[0], dtype=torch.float64)
        m, m_shadow = terms.get("exp_avg", (nothing, nothing))
        v, v_shadow = terms.get("exp_avg_sq", (nothing, nothing))
        return torch.stack([v, v_shadow, (m - m_shadow) ** 2, m_shadow**2])


def _batches(items: Sequence[Item]) -> list[list[Item]]:
    """Parameters that share a group, strategy, step number and device can step as one tensor."""
    batches: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        key = (item.group_index, item.strategy, item.share.step, item.share.grad.device)
        batches.setdefault(key, []).append(item)
    return list(batches.values())
