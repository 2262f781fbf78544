"""The files of a finished `collage compare`, and its numbers by strategy and seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from collage.harness.tasks.registry import Loss
from collage.harness.text import number

Points: TypeAlias = "list[tuple[float, float]]"  # (step, value), by step

SUMMARY, METRICS = "summary.json", "metrics.jsonl"
REFERENCE = "fp32-master"
ULP_AT_ONE = 2.0**-7  # of bf16


@dataclass(frozen=True)
class Comparison:
    """The files of one `collage compare`."""

    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, out: Path) -> Comparison:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        lines = (out / METRICS).read_text(encoding="utf-8").splitlines()
        return cls(summary, [json.loads(line) for line in lines if line.strip()])

    @property
    def strategies(self) -> list[str]:
        return list(self.summary["strategies"])

    @property
    def finetune(self) -> bool:
        return bool(self.summary.get("regime") == "finetune")

    @property
    def score(self) -> str | None:
        """Name of the task's measure beside its loss; None: it has none."""
        score = self.summary.get("score")
        return score["name"] if score else None

    @property
    def loss(self) -> Loss:
        """How the task's losses are told."""
        return Loss(**self.summary.get("loss", {}))

    def column(self, key: str) -> dict[str, float | None]:
        """One column of the table, by strategy."""
        rows = {row["strategy"]: number(row.get(key)) for row in self.summary["table"]}
        return {strategy: rows.get(strategy) for strategy in self.strategies}

    def runs(self, strategy: str) -> list[Mapping[str, Any]]:
        return [run for run in self.summary["runs"] if run["strategy"] == strategy]

    def frozen(self, strategy: str) -> list[str]:
        """Parameters of which no update ever arrived, under any seed."""
        return list(dict.fromkeys(name for run in self.runs(strategy) for name in run.get("frozen") or ()))

    def curves(self, kind: str, key: str, strategy: str) -> dict[int, Points]:
        """seed -> points, without what was not measured."""
        curves: dict[int, dict[float, float]] = {}
        for record in self.metrics:
            if record["kind"] == kind and record["strategy"] == strategy:
                value = number(record.get(key))
                if value is not None:
                    curves.setdefault(record["seed"], {})[float(record["step"])] = value
        return {seed: sorted(points.items()) for seed, points in sorted(curves.items())}

    def validation(self, strategy: str) -> dict[int, Points]:
        """seed -> validation losses, from before the first step on."""
        curves = self.curves("eval", "loss", strategy)
        for run in self.runs(strategy):
            first = number(run.get("initial_loss"))
            points = curves.get(run["seed"])
            if first is not None and points and points[0][0] > 0:
                points.insert(0, (0.0, first))
        return curves


def mean(curves: Mapping[int, Points]) -> Points:
    """Mean over the seeds that have a value, at each step."""
    values: dict[float, list[float]] = {}
    for points in curves.values():
        for step, value in points:
            values.setdefault(step, []).append(value)
    return [(step, fmean(seen)) for step, seen in sorted(values.items())]


def smooth(points: Points, window: int) -> Points:
    """Centred moving average over `window` points, fewer at the ends."""
    half = window // 2
    return [
        (step, fmean(value for _, value in points[max(0, i - half) : i + half + 1]))
        for i, (step, _) in enumerate(points)
    ]
