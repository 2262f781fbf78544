"""Where along an axis a strategy loses more than it may: one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from collage.harness.report.pairs import Difference, Run, diverged
from collage.harness.report.results import REFERENCE
from collage.harness.tasks.registry import Task
from collage.harness.text import fixed, hundredths, listed, short


@dataclass(frozen=True)
class Measure:
    """What runs are judged by.

    Args:
        key: of a run.
        name: in a title.
        sign: 1 where more is worse.
        tolerance: a mean loss of more than this counts, if it is also more than twice its standard error.
        text: how it is shown; `sign="+"` for a difference.
        allowed: how the tolerance is said.
    """

    key: str
    name: str
    sign: int
    tolerance: float
    text: Callable[..., str]
    allowed: str

    @property
    def title(self) -> str:
        """At the beginning of a heading."""
        return self.name[0].upper() + self.name[1:]

    def lost(self, difference: Difference) -> bool:
        """Whether the mean loss is more than the tolerance, and than what seeds alone would make it."""
        if difference.mean is None:
            return False
        error = (difference.spread or 0.0) / math.sqrt(difference.count)
        return self.sign * difference.mean > max(self.tolerance, 2 * error)

    def kept(self, difference: Difference) -> bool:
        """Whether the runs show that no more than the tolerance is lost: all of the interval says so."""
        if difference.mean is None or difference.within is None:
            return False
        return self.sign * difference.mean + difference.within <= self.tolerance


LOSS = Measure("val_loss", "validation loss", 1, 0.01, partial(fixed, digits=4), "0.01 nats")


def measures(task: Task) -> tuple[Measure, ...]:
    """Of a task: what it is judged by, then the other one."""
    if task.score is None:
        return (LOSS,)
    if task.score.percent:
        return LOSS, Measure("score", task.score.name, -1, 0.005, hundredths, f"0.5 points of {task.score.name}")
    return (Measure("score", task.score.name, -1, 5.0, partial(fixed, digits=1), f"5 of {task.score.name}"),)


KEPT, LOST, DIVERGED, UNKNOWN = "kept", "lost", "diverged", "unknown"


def state(runs: Sequence[Run], reference: Sequence[Run], found: Difference, measure: Measure) -> str:
    """What became of a strategy's runs at one value, beside the reference's."""
    if not reference or any(map(diverged, reference)):
        return UNKNOWN
    if any(map(diverged, runs)):
        return DIVERGED
    return LOST if measure.lost(found) else KEPT


def sentence(strategy: str, axis: str, states: Mapping[float, str], measure: Measure) -> str:
    """Where a strategy loses. states: of each value, ascending."""
    judged = [value for value, found in states.items() if found != UNKNOWN]
    if not judged:
        return f"{strategy} was not judged: {REFERENCE} was not run, or diverged everywhere."
    bad = [value for value in judged if states[value] != KEPT]
    gone = [value for value in bad if states[value] == DIVERGED]
    unjudged = [value for value in states if value not in judged]
    left_out = f"; {REFERENCE} diverges at {_values(unjudged)}" if unjudged else ""
    if not bad:
        where = f"from {short(judged[0], 6)} to {short(judged[-1], 6)}" if len(judged) > 1 else short(judged[0], 6)
        return f"{strategy} loses no more than {measure.allowed} at {axis} {where}{left_out}."
    tail = f"; it diverges at {_values(gone)}" if gone else ""
    return f"{strategy} loses more than {measure.allowed} {_where(axis, judged, bad)}{tail}{left_out}."


def _where(axis: str, judged: Sequence[float], bad: Sequence[float]) -> str:
    """The bad ones of the values judged: at an end of the axis, at both, or one by one."""
    if len(bad) == len(judged):
        return f"at every {axis} tried" if len(judged) > 1 else f"at {axis} {short(bad[0], 6)}"
    low = next(i for i, value in enumerate(judged) if value not in bad)
    high = next(i for i, value in enumerate(reversed(judged)) if value not in bad)
    if low + high < len(bad):
        return f"at {axis} {_values(bad)}"
    ends = [f"{short(judged[low - 1], 6)} down"] * (low > 0) + [f"{short(judged[-high], 6)} up"] * (high > 0)
    return f"from {axis} {' and from '.join(ends)}"


def _values(values: Sequence[float]) -> str:
    return listed([short(value, 6) for value in values])
