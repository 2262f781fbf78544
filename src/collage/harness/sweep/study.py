"""What is run under several strategies and seeds, at one value of a setting after the other, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from collage.harness import options
from collage.harness.experiment import Experiment, Plan
from collage.harness.report.pairs import Run
from collage.harness.sweep.axes import Axis, label
from collage.harness.sweep.grid import Grid, Value
from collage.harness.sweep.losing import measures
from collage.harness.sweep.running import Job
from collage.harness.sweep.store import Asked
from collage.harness.text import short
from collage.harness.train.config import RunConfig


@dataclass(frozen=True)
class Study:
    """Strategies x values x seeds.

    Args:
        plan: what each run is, but for what follows.
        strategies: canonical names.
        seeds: of each.
        axis: the setting that is varied; None: none.
        values: of it.
    """

    plan: Plan
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    axis: Axis | None = None
    values: tuple[float, ...] = ()

    def jobs(self) -> list[Job]:
        """One for each seed, value and strategy; all values of the first seed come first. Raises ValueError."""
        experiment = cache(lambda: Experiment(self.plan))
        return [self._job(experiment, *cell) for cell in self.cells()]

    def cells(self) -> list[tuple[int, Value, str]]:
        """(seed, value, strategy) of each run."""
        values: tuple[Value, ...] = self.values if self.axis else (None,)
        return [(seed, value, name) for seed in self.seeds for value in values for name in self.strategies]

    def _job(self, experiment: Callable[[], Experiment], seed: int, value: Value, strategy: str) -> Job:
        changes: Mapping[str, Any] = {}
        where = f"seed {seed}"
        if self.axis is not None and value is not None:
            changes = self.axis.changes(self.plan.run, value)
            where = f"{label(self.axis, value)}, {where}"
        with options.flags_named(RunConfig):  # raises for what a run or its optimizer cannot have
            config = replace(self.plan.run, strategy=strategy, seed=seed, **changes)
        warm = replace(self.plan.warm, seed=seed) if self.plan.warm else None
        return Job(Asked.of(self.plan.task.name, config, warm), experiment, config, changes, where)

    def grid(self, runs: Iterable[Run]) -> Grid:
        """What its runs say together; runs: of every cell, in order."""
        found: dict[Value, list[Run]] = {}
        for (_, value, _), run in zip(self.cells(), runs, strict=True):
            found.setdefault(value, []).append(run)
        return Grid.of(self.axis.name if self.axis else None, self.strategies, measures(self.plan.task), found)

    def setting(self) -> str:
        """What was trained, in a line."""
        run, count = self.plan.run, len(self.seeds)
        varied = self.axis.name if self.axis else ""
        parts = [
            f"{self.plan.task.title}: {run.model}",
            f"{run.steps:,} steps" if varied != "steps" else "",
            " ".join([run.optimizer, *run.optimizer_args]),
            f"lr {short(run.lr)}" if varied != "lr" else "",
            f"{count} seeds" if count > 1 else "one seed",
        ]
        return " · ".join(filter(None, parts))
