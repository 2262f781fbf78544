"""Effective descent quality: how much of the intended update reached the weights.

The step's own pass adds five sums per parameter (``reference.SUMS``); a monitor keeps their totals and makes the
report. Those sums start from the stored state, so they cannot see damage already done to m and v: the shadow can.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

from collage.backends.reference import SUMS
from collage.monitor.quality import Report, Tally
from collage.monitor.shadow import Placed, Sampled, Shadow, Stepping
from collage.strategies import Strategy
from collage.unwrapping import unwrapped


@runtime_checkable
class Monitored(Protocol):
    """What a monitor needs of an optimizer."""

    monitors: list[Monitor]


class _Books:
    """The tallies of one stretch of the run."""

    def __init__(self) -> None:
        self.total = Tally()
        self.groups: dict[int, Tally] = {}
        self.parameters: dict[str, Tally] = {}
        self.beside: dict[str, Tally] = {}

    def add(self, stepping: Sequence[Stepping], step: int) -> None:
        of_groups: dict[int, list[list[float]]] = {}
        every = [pair for parameters, batch in stepping for pair in zip(parameters, batch.sums, strict=True)]
        for parameter, sums in sorted(every, key=lambda pair: pair[0].position):
            row = sums.tolist()
            self.parameters.setdefault(parameter.name, Tally()).add(row, step)
            of_groups.setdefault(parameter.group_index, []).append(row)
        for index, rows in of_groups.items():
            self.groups.setdefault(index, Tally()).add(_total(rows), step)
        self.total.add(_total(row for rows in of_groups.values() for row in rows), step)

    def add_edited(self, parameter: Placed, count: int) -> None:
        if count:
            group = self.groups.setdefault(parameter.group_index, Tally())
            for tally in (self.parameters.setdefault(parameter.name, Tally()), group, self.total):
                tally.edited += count

    def add_skipped(self, parameters: Iterable[Placed]) -> None:
        of_groups = {parameter.group_index for parameter in parameters}
        own = [self.parameters.setdefault(parameter.name, Tally()) for parameter in parameters]
        for tally in (*own, *(self.groups.setdefault(index, Tally()) for index in of_groups), self.total):
            tally.skipped += 1

    def add_sampled(self, sampled: Mapping[str, Sampled], group_of: Mapping[str, int], step: int) -> None:
        for name, sample in sampled.items():
            self.parameters[name].sample(sample, step)
        for index in set(group_of.values()):
            self.groups[index].sample(sum((s for n, s in sampled.items() if group_of[n] == index), Sampled()), step)
        self.total.sample(sum(sampled.values(), Sampled()), step)

    def report(self) -> Report:
        return Report(
            total=self.total.quality(),
            by_group=[self.groups[index].quality() for index in sorted(self.groups)],
            by_parameter={name: tally.quality() for name, tally in self.parameters.items()},
            frozen=[name for name, tally in self.parameters.items() if tally.frozen],
            beside={name: tally.quality() for name, tally in self.beside.items()},
        )


def _total(rows: Iterable[Sequence[float]]) -> list[float]:
    total = [0.0] * len(SUMS)
    for row in rows:
        total = [a + b for a, b in zip(total, row, strict=True)]
    return total


class Monitor:
    """Watches an optimizer. Made by `monitor`."""

    def __init__(self, every: int, shadow: int | None, strategies: Sequence[Strategy]) -> None:
        self.every = every
        self.seconds = 0.0  # that its own work has taken so far
        self._now: tuple[int, frozenset[str]] = (0, frozenset())  # step of the optimizer, and who has made it so far
        self._coming = self._now  # the same with the call under way, which may yet be refused
        self._new_shadow = partial(Shadow, shadow, tuple(dict.fromkeys(strategies))) if shadow else lambda: None
        self._shadow = self._new_shadow()
        self._all, self._window = _Books(), _Books()

    @property
    def due(self) -> bool:
        """Whether the step under way is measured."""
        return self._coming[0] % self.every == 0

    def begin(self, names: Iterable[str]) -> bool:
        """Called by the optimizer with all that are about to step; returns whether they are to be measured.

        A step of the optimizer may come in several calls, a few parameters each; it is over when one comes again.
        """
        (step, stepped), coming = self._now, frozenset(names)
        self._coming = (step, stepped | coming) if coming.isdisjoint(stepped) else (step + 1, coming)
        return self.due

    def before(self, stepping: Sequence[Stepping], changed: Mapping[str, int]) -> None:
        """Called by the optimizer before it writes. changed: whom others wrote to -> elements that did not fit."""
        with self._timed():
            self.edited((parameter for parameters, _ in stepping for parameter in parameters), changed)
            if self._shadow:
                self._shadow.before(stepping, self.due, changed.keys())

    def after(self, stepping: Sequence[Stepping]) -> None:
        """Called by the optimizer after it wrote."""
        with self._timed():
            self._add(stepping)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def _add(self, stepping: Sequence[Stepping]) -> None:
        self._now, step = self._coming, self._coming[0]
        sampled, beside = self._shadow.after(stepping, self.due) if self._shadow else ({}, {})
        if not self.due:
            return
        group_of = {parameter.name: parameter.group_index for parameters, _ in stepping for parameter in parameters}
        for books in (self._all, self._window):
            books.add(stepping, step)
            books.add_sampled(sampled, group_of, step)
            for name, (sums, sample) in beside.items():
                books.beside.setdefault(name, Tally()).add(sums, step, sample)

    def edited(self, parameters: Iterable[Placed], changed: Mapping[str, int]) -> None:
        """Called when other components were derived anew: how many elements of each parameter."""
        for parameter in parameters:
            for books in (self._all, self._window):
                books.add_edited(parameter, changed.get(parameter.name, 0))

    def skipped(self, parameters: Iterable[Placed]) -> None:
        """Called for a step that was skipped, with those whose gradients were not finite."""
        for books in (self._all, self._window):
            books.add_skipped(parameters)

    def report(self) -> Report:
        """Everything since creation or `reset`."""
        return self._all.report()

    def window(self) -> Report:
        """Everything since the last call of `window`: one point of a curve."""
        books, self._window = self._window, _Books()
        return books.report()

    def meet_anew(self) -> None:
        """Start the shadow anew at the next step: the optimizer's state was exchanged."""
        self._shadow = self._new_shadow()

    def reset(self) -> None:
        """Forget the sums so far; the shadow goes on."""
        self._all, self._window = _Books(), _Books()


def monitor(
    optimizer: Any,
    every: int = 10,
    shadow: int | None = 256,
    strategies: str | Strategy | Iterable[str | Strategy] = (),
) -> Monitor:
    """Measure what an optimizer's rounding loses, while it trains. It never changes a bit of the run.

    Args:
        optimizer: of this package; also as Accelerate, Lightning or Fabric have wrapped it.
        every: measure one step in this many, the first included.
        shadow: follow one element in this many, in runs of 16 neighbours, with the same rule in float32 (costs 12
            bytes for each); None for none.
        strategies: others (or one) to run beside it on those elements, to see what they would lose on this very run.

    Returns:
        A Monitor: ``report()`` has ``.total``, ``.by_group``, ``.by_parameter``, ``.frozen`` and ``.to_dict()``.

    Raises:
        TypeError: another optimizer.
        ValueError: an ``every`` or ``shadow`` below 1, an unknown strategy.

    >>> import collage, torch
    >>> w = torch.nn.Parameter(torch.ones(8).bfloat16())
    >>> opt = collage.AdamW([("w", w)], lr=1e-5, weight_decay=0.0, strategy="bf16")
    >>> mon = collage.monitor(opt, every=1)
    >>> w.grad = torch.ones_like(w)
    >>> opt.step()
    >>> mon.report().total.lost, mon.report().frozen
    (1.0, ['w'])
    """
    watched: Monitored = unwrapped(optimizer, Monitored)  # type: ignore[type-abstract]
    for name, number in (("every", every), ("shadow", shadow)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name}: needs an integer >= 1, got {number!r}")
    beside = (strategies,) if isinstance(strategies, str | Strategy) else strategies
    result = Monitor(every, shadow, [Strategy.parse(s) for s in beside])
    watched.monitors.append(result)
    return result
