"""Runs of a strategy beside the reference's on the same seeds and batches: what lies between, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Any

from collage.harness.report.results import REFERENCE
from collage.harness.text import number

Run = Mapping[str, Any]
SURE = 0.95  # of the interval


@dataclass(frozen=True)
class Difference:
    """Of a strategy's runs to the reference's, paired by seed. None: too few pairs to know.

    Student's paired t-test, and not the exact test by flipped signs: of n pairs that one has 2**n arrangements, so with
    3 seeds its p is never below 0.25, however clear the difference. What t takes for granted is that differences over
    seeds lie about normally. A large p does not show that there is none: the interval says how large it may be.
    """

    count: int
    mean: float | None
    spread: float | None  # standard deviation over the pairs
    p: float | None  # of a mean at least so far from 0 if there were no difference; two-sided
    within: float | None  # half of the interval that holds the true mean in 95 % of such experiments

    @classmethod
    def of(cls, values: Sequence[float]) -> Difference:
        """Of differences, one for each seed."""
        if len(values) < 2:
            return cls(len(values), fmean(values) if values else None, None, None, None)
        mean, spread = fmean(values), stdev(values)
        error, free = spread / math.sqrt(len(values)), len(values) - 1
        p = two_sided(mean / error, free) if error else float(mean == 0)
        return cls(len(values), mean, spread, p, _quantile(free) * error)


def by_seed(strategy: str, runs: Sequence[Run]) -> dict[int, Run]:
    """A strategy's runs."""
    return {run["seed"]: run for run in runs if run["strategy"] == strategy}


def pairs(strategy: str, runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """(a run, the reference's on the same seed), where both came to their end."""
    reference = by_seed(REFERENCE, runs)
    both = [(run, reference[seed]) for seed, run in by_seed(strategy, runs).items() if seed in reference]
    return [pair for pair in both if not any(map(diverged, pair))]


def gaps(strategy: str, runs: Sequence[Run], key: str) -> list[float]:
    """What lies between, for each pair that has this number."""
    both = [(number(run.get(key)), number(reference.get(key))) for run, reference in pairs(strategy, runs)]
    return [mine - its for mine, its in both if mine is not None and its is not None]


def difference(strategy: str, runs: Sequence[Run], key: str = "val_loss") -> Difference:
    """Of one number of the runs, where both have it."""
    return Difference.of(gaps(strategy, runs, key))


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def deviation(values: Iterable[float | None]) -> float | None:
    """Standard deviation of those that are known and finite; None of fewer than two."""
    known = [known for value in values if (known := number(value)) is not None]
    return stdev(known) if len(known) > 1 else None


def diverged(row: Run) -> bool:
    """Of a run, or of a row of the table: under some seed."""
    return number(row["val_loss"]) is None


def two_sided(t: float, free: int) -> float:
    """Chance of a Student's t at least so far from 0, with so many degrees of freedom.

    Abramowitz and Stegun 26.7.3 and 26.7.4, finite sums.

    >>> round(two_sided(12.706, 1), 4), round(two_sided(-4.303, 2), 4), round(two_sided(2.776, 4), 4)
    (0.05, 0.05, 0.05)
    """
    angle, odd = math.atan2(abs(t), math.sqrt(free)), free % 2
    total, term = 0.0, math.cos(angle) ** odd
    for power in range(odd, free - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    inside = math.sin(angle) * total
    return max(0.0, 1.0 - (2 / math.pi * (angle + inside) if odd else inside))


@cache
def _quantile(free: int) -> float:
    """The t that is exceeded, up or down, with a chance of 1 - SURE."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, free) > 1 - SURE else (low, middle)
    return high
