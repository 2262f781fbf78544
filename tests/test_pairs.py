"""Runs paired by seed, what lies between them, and the sentence that says where a strategy loses."""

from __future__ import annotations

import math
from typing import Any

import pytest

from collage.harness.report.pairs import Difference, difference, pairs, two_sided
from collage.harness.sweep.losing import DIVERGED, KEPT, LOSS, LOST, UNKNOWN, sentence, state

NAN = float("nan")


def runs(**losses: list[float]) -> list[dict[str, Any]]:
    """strategy, with _ for -, to its loss by seed."""
    return [
        {"strategy": name.replace("_", "-"), "seed": seed, "val_loss": loss}
        for name, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]


# Two-sided, of printed tables: t that is exceeded with this chance.
TABLE = [(1, 0.05, 12.7062), (1, 0.01, 63.6567), (2, 0.05, 4.30265), (3, 0.01, 5.84091), (4, 0.001, 8.61030),
         (7, 0.05, 2.36462), (30, 0.05, 2.04227)]  # fmt: skip


@pytest.mark.parametrize(("free", "chance", "t"), TABLE)
def test_students_t_is_that_of_the_tables(free: int, chance: float, t: float) -> None:
    assert two_sided(t, free) == pytest.approx(chance, rel=2e-5)  # the tables' own digits
    assert two_sided(-t, free) == two_sided(t, free)
    assert two_sided(0.0, free) == 1.0


def test_a_difference_is_of_the_same_seeds() -> None:
    found = difference("bf16", runs(bf16=[2.5, 2.7, 9.0], fp32_master=[2.0, 2.1]))
    assert (found.count, found.mean) == (2, pytest.approx(0.55))
    assert found.spread == pytest.approx(0.05 * math.sqrt(2))
    assert found.p == pytest.approx(two_sided(0.55 / 0.05, 1))
    assert found.within == pytest.approx(12.7062 * 0.05, rel=1e-5)


def test_runs_that_diverged_are_no_pairs() -> None:
    found = runs(bf16=[2.5, NAN, 2.6], fp32_master=[2.0, 2.1, NAN])
    assert [pair[0]["seed"] for pair in pairs("bf16", found)] == [0]
    assert difference("bf16", found) == Difference(1, 0.5, None, None, None)
    assert difference("kahan", found).mean is None


def test_differences_that_are_all_the_same() -> None:
    assert Difference.of([0.0, 0.0, 0.0]).p == 1.0
    assert Difference.of([0.5, 0.5, 0.5]).p == 0.0


def test_what_counts_as_lost() -> None:
    assert LOSS.lost(Difference.of([0.5]))
    assert not LOSS.lost(Difference.of([0.009]))
    assert not LOSS.lost(Difference.of([0.2, -0.15]))  # a mean of 0.025, and a standard error of 0.175
    assert LOSS.lost(Difference.of([0.2, 0.21]))
    assert not LOSS.lost(Difference.of([]))


def test_what_counts_as_kept_needs_the_whole_interval() -> None:
    assert LOSS.kept(Difference.of([0.001, 0.002, 0.0]))
    assert not LOSS.kept(Difference.of([0.001, 0.02, -0.02]))
    assert not LOSS.kept(Difference.of([0.0]))


def test_the_state_of_a_cell() -> None:
    fine, gone, worse = ({"val_loss": loss} for loss in (2.0, NAN, 2.5))
    assert state([worse], [fine], Difference.of([0.5]), LOSS) == LOST
    assert state([fine], [fine], Difference.of([0.0]), LOSS) == KEPT
    assert state([fine, gone], [fine], Difference.of([0.0]), LOSS) == DIVERGED
    assert state([fine], [gone], Difference.of([]), LOSS) == UNKNOWN
    assert state([fine], [], Difference.of([]), LOSS) == UNKNOWN


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ("kkkk", "loses no more than 0.01 nats at lr from 1e-6 to 3e-5."),
        ("llkk", "loses more than 0.01 nats from lr 3e-6 down."),
        ("kkkl", "loses more than 0.01 nats from lr 3e-5 up."),
        ("llll", "loses more than 0.01 nats at every lr tried."),
        ("klkk", "loses more than 0.01 nats at lr 3e-6."),
        ("lklk", "loses more than 0.01 nats at lr 1e-6 and 1e-5."),
        ("lkkd", "loses more than 0.01 nats from lr 1e-6 down and from 3e-5 up; it diverges at 3e-5."),
        ("lkku", "loses more than 0.01 nats from lr 1e-6 down; fp32-master diverges at 3e-5."),
        ("uuuu", "was not judged: fp32-master was not run, or diverged everywhere."),
    ],
)
def test_where_a_strategy_loses(states: str, told: str) -> None:
    by_letter = {"k": KEPT, "l": LOST, "d": DIVERGED, "u": UNKNOWN}
    found = {value: by_letter[letter] for value, letter in zip((1e-6, 3e-6, 1e-5, 3e-5), states, strict=True)}
    assert sentence("bf16", "lr", found, LOSS) == f"bf16 {told}"
