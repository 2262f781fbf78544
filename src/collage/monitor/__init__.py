"""Effective descent quality: how much of the intended update reached the weights.

The step's own pass adds five sums per parameter (``reference.SUMS``); where weights have scales, a look at them adds
three counts (``scaling.COUNTS``). A monitor keeps their totals and makes the report. The sums start from the stored
state, so they cannot see damage already done to m and v: the shadow can.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from collage.collectives import spreads_of
from collage.monitor import scaling
from collage.monitor.books import Books, Measured
from collage.monitor.quality import Report
from collage.monitor.shadow import Follower, Placed, Stepping
from collage.monitor.shares import Shares
from collage.sharding import any_dtensor
from collage.strategies import Strategy
from collage.unwrapping import unwrapped

Group = dict[str, Any]


@runtime_checkable
class Monitored(Protocol):
    """What a monitor needs of an optimizer."""

    monitors: list[Monitor]
    param_groups: list[Group]

    def shadow(self, stride: int, strategies: Sequence[Strategy]) -> Follower: ...


class Monitor:
    """Watches an optimizer. Made by `monitor`."""

    def __init__(
        self, every: int, new_shadow: Callable[[], Follower | None], groups: Callable[[], list[Group]]
    ) -> None:
        self.every = every
        self._groups = groups  # of the optimizer: a load makes new ones
        self._lr: float | None = None  # the largest so far
        self.seconds = 0.0  # that its own work has taken so far
        self._now: tuple[int, frozenset[str]] = (0, frozenset())  # step of the optimizer, and who has made it so far
        self._coming = self._now  # the same with the call under way, which may yet be refused
        self._new_shadow = new_shadow
        self._shadow = self._new_shadow()
        self._scales: list[Tensor | None] = []  # of each batch's weights, before a measured step
        self._unfollowed: dict[str, int] = {}  # by a shadow: their positions
        self._all, self._window = Books(), Books()
        self._shares = Shares()  # what is to be added up over ranks before it goes into the books

    @property
    def due(self) -> bool:
        """Whether the step under way is measured."""
        return self._coming[0] % self.every == 0

    def go_on(self) -> None:
        """The next step is not the first of its run: that is measured whatever `every` is."""
        step, stepped = self._now
        self._now = max(step, 1), stepped

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
            self._scales = [scaling.before(batch) for _, batch in stepping] if self.due else []
            if self._shadow:
                self._shadow.before(stepping, self.due, changed.keys())
                left_out = [own for own, batch in stepping if not batch.rule.elementwise]
                self._unfollowed |= {p.name: p.position for own in left_out for p in own}

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
        self._lr = max([*([] if self._lr is None else [self._lr]), *_rates(self._groups())], default=None)
        rows = sorted(self._measured(stepping), key=lambda row: row[0].position)
        beside = {key: ([*sums, *scaling.NONE], sample) for key, (sums, sample) in beside.items()}
        if self._shares or any_dtensor([parameter.tensor for parameter, _ in rows]):
            self._shares.add(Measured(step, rows, sampled, ()), beside)
        else:
            self._enter(Measured(step, rows, sampled, [(name, *own) for (name, _), own in beside.items()]))

    def _measured(self, stepping: Sequence[Stepping]) -> Iterator[tuple[Placed, list[float]]]:
        """Each parameter and what was measured of its step."""
        for (parameters, batch), old in zip(stepping, self._scales, strict=True):
            for parameter, sums, counts in zip(parameters, batch.sums, scaling.counted(batch, old), strict=True):
                yield parameter, [*sums.tolist(), *counts]
        self._scales = []

    def _enter(self, measured: Measured) -> None:
        for books in (self._all, self._window):
            books.add(measured)

    def edited(self, parameters: Iterable[Placed], changed: Mapping[str, int]) -> None:
        """Called when other components were derived anew: how many elements of each parameter (of this rank's part)."""
        those = list(parameters)
        for parameter, spread in zip(those, spreads_of([p.tensor for p in those]), strict=True):
            count = changed.get(parameter.name, 0)
            if spread is not None:
                self._shares.of(parameter, spread).add_edited(count)  # of all, as other ranks may have changed ones
            elif count:
                self._enter_edited(parameter, count)

    def _enter_edited(self, parameter: Placed, count: int) -> None:
        for books in (self._all, self._window):
            books.add_edited(parameter, count)

    def _settle(self) -> None:
        """Bring the books up to date with what ranks have of parameters that they share."""
        shares, self._shares = self._shares, Shares()
        shares.gather()
        for measured in shares.measured():
            self._enter(measured)
        for parameter, count in shares.edited():
            self._enter_edited(parameter, count)

    def skipped(self, parameters: Sequence[Placed]) -> None:
        """Called for a step that was skipped, with those whose gradients were not finite."""
        for books in (self._all, self._window):
            books.add_skipped(parameters)

    def report(self) -> Report:
        """Everything since creation or `reset`.

        Where parameters are sharded (FSDP2, tensor parallelism) a collective, to be called on every rank: it has the
        sums over all of them, and so is the same on each, and that of one process. Until then a rank keeps 24 bytes for
        each sharded parameter and measured step.
        """
        self._settle()
        return self._reported(self._all)

    def window(self) -> Report:
        """Everything since the last call of `window`: one point of a curve. On every rank, as `report`."""
        self._settle()
        books, self._window = self._window, Books()
        return self._reported(books)

    def _reported(self, books: Books) -> Report:
        return replace(
            books.report(),
            unfollowed=sorted(self._unfollowed, key=self._unfollowed.__getitem__),
            strategies=list(dict.fromkeys(str(group["strategy"]) for group in self._groups())),
            lr=self._lr,
        )

    def meet_anew(self) -> None:
        """Start the shadow anew at the next step: the optimizer's state was exchanged."""
        self._shadow = self._new_shadow()

    def reset(self) -> None:
        """Forget the sums so far; the shadow goes on."""
        self._all, self._window = Books(), Books()
        self._shares = Shares()


def _rates(groups: Iterable[Group]) -> list[float]:
    return [float(group["lr"]) for group in groups if "lr" in group]


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
        A Monitor: ``report()`` has ``.total``, ``.by_group``, ``.by_parameter``, ``.frozen`` and ``.to_dict()``. Where
        parameters are sharded, it is called on every rank.

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
    others = tuple(dict.fromkeys(map(Strategy.parse, beside)))
    result = Monitor(
        every, partial(watched.shadow, shadow, others) if shadow else lambda: None, lambda: watched.param_groups
    )
    watched.monitors.append(result)
    return result
