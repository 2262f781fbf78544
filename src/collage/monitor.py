"""Effective descent quality: how much of the intended update reached the weights.

The step's own pass adds five sums per parameter (``reference.SUMS``); a monitor keeps their totals and makes the
report. Those sums start from the stored state, so they cannot see damage already done to m and v: the shadow can.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from collage.backends.reference import SUMS
from collage.rules import Rule
from collage.shadow import Item, Sampled, Shadow
from collage.state import unwrapped
from collage.strategies import Strategy


@runtime_checkable
class Monitored(Protocol):
    """What a monitor needs of an optimizer."""

    monitors: list[Monitor]

    @property
    def rule(self) -> Rule: ...


class Placed(Protocol):
    """A parameter's name, and the group it is in."""

    @property
    def name(self) -> str: ...

    @property
    def group_index(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Quality:
    """How much of the intended update Delta arrived, over the monitored steps. None where undefined.

    Attributes:
        steps: monitored steps.
        edq: the paper's metric, mean over steps of <Delta / |Delta|, arrived>. In units of the weights.
        edq_ratio: <Delta, arrived> / |Delta|**2. 1.0 means that the whole update arrived.
        edq_visible: the same for the component that the forward pass sees.
        lost: share of the non-zero updates that changed no plane.
        nonzero: how many updates were not zero.
        edited: how many weights lost their low components because others changed them, or to `resync`.
        v_ratio: mean of the second moment over its shadow's, at the last monitored step.
        m_error: |m - shadow's m| / |shadow's m|, at the last monitored step.
        edq_shadow: as edq_ratio, against the update that undamaged float32 moments would have made.
    """

    steps: int
    edq: float | None
    edq_ratio: float | None
    edq_visible: float | None
    lost: float | None
    nonzero: int
    edited: int = 0
    v_ratio: float | None = None
    m_error: float | None = None
    edq_shadow: float | None = None


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


@dataclass(slots=True)
class Tally:
    """Running sums of one parameter, one group, or all."""

    steps: int = 0
    with_update: int = 0
    edq: float = 0.0
    dot: float = 0.0
    visible: float = 0.0
    norm2: float = 0.0
    nonzero: int = 0
    lost: int = 0
    edited: int = 0
    sampled: Sampled = field(default_factory=Sampled)

    def add(self, sums: Sequence[float]) -> None:
        """Add one step's SUMS."""
        dot, visible, norm2, nonzero, lost = sums
        self.steps += 1
        if norm2:
            self.with_update += 1
            self.edq += dot / math.sqrt(norm2)
        self.dot += dot
        self.visible += visible
        self.norm2 += norm2
        self.nonzero += int(nonzero)
        self.lost += int(lost)

    @property
    def frozen(self) -> bool:
        return 0 < self.nonzero == self.lost

    def quality(self) -> Quality:
        s = self.sampled
        return Quality(
            steps=self.steps,
            edq=_ratio(self.edq, self.with_update),
            edq_ratio=_ratio(self.dot, self.norm2),
            edq_visible=_ratio(self.visible, self.norm2),
            lost=_ratio(self.lost, self.nonzero),
            nonzero=self.nonzero,
            edited=self.edited,
            v_ratio=_ratio(s.v, s.v_shadow),
            m_error=None if not s.m_shadow2 else math.sqrt(s.m_error2 / s.m_shadow2),
            edq_shadow=_ratio(s.dot, s.norm2),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """Quality in total, per group (by index) and per parameter (by name).

    Attributes:
        frozen: parameters none of whose updates arrived in any plane.
        beside: strategies run on the shadow's sample, and what they lost on this very run.
    """

    total: Quality
    by_group: list[Quality]
    by_parameter: dict[str, Quality]
    frozen: list[str]
    beside: dict[str, Quality]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON; a number that is not finite becomes None."""
        result: dict[str, Any] = jsonable(asdict(self))
        return result


def jsonable(x: Any) -> Any:
    """The same mappings and lists; a number that is not finite, which JSON does not know, becomes None."""
    if isinstance(x, Mapping):
        return {key: jsonable(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [jsonable(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


class _Books:
    """The tallies of one stretch of the run."""

    def __init__(self) -> None:
        self.total = Tally()
        self.groups: dict[int, Tally] = {}
        self.parameters: dict[str, Tally] = {}
        self.beside: dict[str, Tally] = {}

    def add(self, items: Sequence[Item]) -> None:
        rows = {item.name: item.share.sums.tolist() for item in items if item.share.sums is not None}
        for item in items:
            self.parameters.setdefault(item.name, Tally()).add(rows[item.name])
        for index in {item.group_index for item in items}:
            ours = [rows[item.name] for item in items if item.group_index == index]
            self.groups.setdefault(index, Tally()).add(_total(ours))
        self.total.add(_total(rows.values()))

    def add_edited(self, item: Placed, count: int) -> None:
        if count:
            group = self.groups.setdefault(item.group_index, Tally())
            for tally in (self.parameters.setdefault(item.name, Tally()), group, self.total):
                tally.edited += count

    def add_sampled(self, sampled: dict[str, Sampled], group_of: dict[str, int]) -> None:
        for name, sample in sampled.items():
            self.parameters[name].sampled.add(sample)
        for index in set(group_of.values()):
            self.groups[index].sampled.add(sum((s for n, s in sampled.items() if group_of[n] == index), Sampled()))
        self.total.sampled.add(sum(sampled.values(), Sampled()))

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

    def __init__(self, rule: Rule, every: int, shadow: int | None, strategies: Sequence[Strategy]) -> None:
        self.every = every
        self.seconds = 0.0  # that its own work has taken so far
        self._calls = 0
        self._new_shadow = partial(Shadow, rule, shadow, tuple(dict.fromkeys(strategies))) if shadow else lambda: None
        self._shadow = self._new_shadow()
        self._all, self._window = _Books(), _Books()

    @property
    def due(self) -> bool:
        """Whether the coming step is measured."""
        return self._calls % self.every == 0

    def before(self, items: Sequence[Item], changed: Mapping[str, int]) -> None:
        """Called by the optimizer before it writes. changed: whom others wrote to -> elements that did not fit."""
        with self._timed():
            self.edited(items, changed)
            if self._shadow:
                self._shadow.before(items, self.due, changed.keys())

    def after(self, items: Sequence[Item]) -> None:
        """Called by the optimizer after it wrote."""
        with self._timed():
            self._add(items)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def _add(self, items: Sequence[Item]) -> None:
        due, self._calls = self.due, self._calls + 1
        sampled, beside = self._shadow.after(items, due) if self._shadow else ({}, {})
        if not due:
            return
        group_of = {item.name: item.group_index for item in items}
        for books in (self._all, self._window):
            books.add(items)
            books.add_sampled(sampled, group_of)
            for name, (sums, sample) in beside.items():
                tally = books.beside.setdefault(name, Tally())
                tally.add(sums)
                tally.sampled.add(sample)

    def edited(self, items: Iterable[Placed], changed: Mapping[str, int]) -> None:
        """Called when other components were derived anew: how many elements of each parameter."""
        for item in items:
            for books in (self._all, self._window):
                books.add_edited(item, changed.get(item.name, 0))

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
    result = Monitor(watched.rule, every, shadow, [Strategy.parse(s) for s in beside])
    watched.monitors.append(result)
    return result
