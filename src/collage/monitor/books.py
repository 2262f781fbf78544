"""The books of a run: what was measured of each step, added up per parameter, per group and in total."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from collage.monitor.quality import SUMMED, Report, Tally
from collage.monitor.shadow import Placed, Sampled


class Measured(NamedTuple):
    """One step of the optimizer, or a part of it."""

    step: int
    rows: Sequence[tuple[Placed, Sequence[float]]]  # parameters in order, and theirs of what is SUMMED
    sampled: Mapping[str, Sampled]  # by name, of each of them that a shadow follows
    beside: Sequence[tuple[str, Sequence[float], Sampled]]  # strategies, and theirs


class Books:
    """The tallies of one stretch of the run."""

    def __init__(self) -> None:
        self.total = Tally()
        self.groups: dict[int, Tally] = {}
        self.parameters: dict[str, Tally] = {}
        self.beside: dict[str, Tally] = {}
        self._positions: dict[str, int] = {}

    def add(self, measured: Measured) -> None:
        """Add a step, or a further part of that which was added last."""
        step, of_groups = measured.step, dict[int, list[Sequence[float]]]()
        for parameter, sums in measured.rows:
            self._of(parameter).add(sums, step)
            of_groups.setdefault(parameter.group_index, []).append(sums)
        for index, rows in of_groups.items():
            self.groups.setdefault(index, Tally()).add(_total(rows), step)
        self.total.add(_total(row for rows in of_groups.values() for row in rows), step)
        self._add_sampled(measured)
        for name, sums, sample in measured.beside:
            self.beside.setdefault(name, Tally()).add(sums, step, sample)

    def _add_sampled(self, measured: Measured) -> None:
        _, rows, sampled, _ = measured
        of_groups: dict[int, list[Sampled]] = {}
        for parameter, _ in rows:
            sample = sampled.get(parameter.name)
            if sample is None:
                continue
            self.parameters[parameter.name].sample(sample, measured.step)
            of_groups.setdefault(parameter.group_index, []).append(sample)
        for index, samples in of_groups.items():
            self.groups[index].sample(sum(samples, Sampled()), measured.step)
        self.total.sample(sum(sampled.values(), Sampled()), measured.step)

    def add_edited(self, parameter: Placed, count: int) -> None:
        """Add so many elements that others have changed."""
        if count:
            group = self.groups.setdefault(parameter.group_index, Tally())
            for tally in (self._of(parameter), group, self.total):
                tally.edited += count

    def add_skipped(self, parameters: Sequence[Placed]) -> None:
        """Add a step that was skipped because of the gradients of these."""
        of_groups = {parameter.group_index: None for parameter in parameters}
        groups = [self.groups.setdefault(index, Tally()) for index in of_groups]
        for tally in (*map(self._of, parameters), *groups, self.total):
            tally.skipped += 1

    def _of(self, parameter: Placed) -> Tally:
        self._positions[parameter.name] = parameter.position
        return self.parameters.setdefault(parameter.name, Tally())

    def report(self) -> Report:
        """As they stand, parameters in the optimizer's order."""
        parameters = {name: self.parameters[name] for name in sorted(self._positions, key=self._positions.__getitem__)}
        return Report(
            total=self.total.quality(),
            by_group=[self.groups[index].quality() for index in sorted(self.groups)],
            by_parameter={name: tally.quality() for name, tally in parameters.items()},
            frozen=[name for name, tally in parameters.items() if tally.frozen],
            beside={name: tally.quality() for name, tally in self.beside.items()},
        )


def _total(rows: Iterable[Sequence[float]]) -> list[float]:
    total = [0.0] * len(SUMMED)
    for row in rows:
        total = [a + b for a, b in zip(total, row, strict=True)]
    return total
