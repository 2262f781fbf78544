"""What the runs of a study say together: a cell for each value and strategy, and a sentence for each strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from collage.harness.report.pairs import Difference, Run, by_seed, deviation, difference, mean
from collage.harness.report.results import REFERENCE
from collage.harness.sweep.losing import Measure, sentence, state

Value: TypeAlias = "float | None"  # of the axis; None where there is none
_MEANS = ("val_loss", "initial_loss", "score", "initial_score", "edq_ratio", "lost", "v_ratio", "bytes_per_param")


@dataclass(frozen=True)
class Cell:
    """A strategy's runs at one value.

    Attributes:
        count: of runs.
        means: over seeds, by their name in a run.
        spreads: standard deviations over seeds.
        differences: to the reference's runs, by the key of each measure.
        state: what became of it: KEPT, LOST, DIVERGED or UNKNOWN.
    """

    count: int
    means: Mapping[str, float | None]
    spreads: Mapping[str, float | None]
    differences: Mapping[str, Difference]
    state: str

    @classmethod
    def of(cls, strategy: str, runs: Sequence[Run], measures: Sequence[Measure]) -> Cell:
        """Of the runs of all strategies at this value."""
        mine = list(by_seed(strategy, runs).values())
        means = {key: mean(run.get(key) for run in mine) for key in _MEANS}
        found = {measure.key: difference(strategy, runs, measure.key) for measure in measures}
        reference = list(by_seed(REFERENCE, runs).values())
        return cls(
            count=len(mine),
            means=means,
            spreads={measure.key: deviation(run.get(measure.key) for run in mine) for measure in measures},
            differences=found,
            state=state(mine, reference, found[measures[0].key], measures[0]),
        )


@dataclass(frozen=True)
class Grid:
    """The cells of a study. Strategies are judged by the first measure."""

    axis: str | None
    strategies: tuple[str, ...]
    measures: tuple[Measure, ...]
    cells: Mapping[Value, Mapping[str, Cell]]

    @classmethod
    def of(
        cls,
        axis: str | None,
        strategies: Sequence[str],
        measures: Sequence[Measure],
        runs: Mapping[Value, Sequence[Run]],
    ) -> Grid:
        """Of the runs at each value, of every strategy and seed."""
        values = sorted(runs, key=lambda value: value or 0.0)
        cells = {value: {name: Cell.of(name, runs[value], measures) for name in strategies} for value in values}
        return cls(axis, tuple(strategies), tuple(measures), cells)

    def sentences(self) -> list[str]:
        """Where along the axis each strategy loses."""
        others = [name for name in self.strategies if name != REFERENCE]
        return [sentence(name, self.axis or "", self._states(name), self.measures[0]) for name in others]

    def _states(self, strategy: str) -> dict[float, str]:
        return {value: cells[strategy].state for value, cells in self.cells.items() if value is not None}

    def to_dict(self) -> list[dict[str, Any]]:
        """The cells, ready for JSON."""
        return [
            {"value": value, "strategy": name, **asdict(cell)}
            for value, cells in self.cells.items()
            for name, cell in cells.items()
        ]
