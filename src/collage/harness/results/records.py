"""What is kept of the runs behind the page: a small file for each study, a line for each run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collage.harness.report.pairs import Run
from collage.harness.sweep.running import Job
from collage.harness.sweep.store import Stored
from collage.harness.text import to_json
from collage.harness.train.checkpoints import write_whole

# Of a run. Losses and scores keep all their digits: they are what a run made again is compared with.
_WHOLE = ("strategy", "seed", "last_step", "val_loss", "initial_loss", "score", "initial_score")
_ROUNDED = ("edq_ratio", "lost", "v_ratio", "bytes_per_param", "seconds")
_DIGITS = 6


@dataclass
class Records:
    """Of one study: by what was asked for, so that records of other settings are not taken for these."""

    runs: dict[str, Run] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Records:
        """Those of a file; none if it is not there."""
        if not path.exists():
            return cls()
        lines = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return cls({line["asked"]: {**line, "val_loss": _finite(line["val_loss"])} for line in lines})

    def write(self, path: Path) -> None:
        """All of them, in order; nothing of a file is seen before it is whole."""
        lines = ",\n".join(to_json(run).strip() for run in self.runs.values())
        write_whole(path, f'{{"runs": [\n{lines}\n]}}\n')

    def add(self, stored: Stored) -> None:
        """Keep what the page tells of a run."""
        run = {key: stored.run.get(key) for key in _WHOLE}
        run |= {key: _rounded(stored.run.get(key)) for key in _ROUNDED}
        made = {"machine": stored.machine, "version": stored.made_by["version"]}
        self.runs[stored.asked.name] = {"asked": stored.asked.name, **run, **made}

    def of(self, jobs: Sequence[Job]) -> list[Run] | None:
        """Of these runs, in order; None if one is missing."""
        found = [self.runs.get(job.asked.name) for job in jobs]
        whole = [run for run in found if run is not None]
        return whole if len(whole) == len(found) else None

    def keep_only(self, jobs: Sequence[Job]) -> None:
        """Drop those of runs that are not wanted any more, and put the others in order."""
        self.runs = {job.asked.name: self.runs[job.asked.name] for job in jobs if job.asked.name in self.runs}


def machines(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The classes of machines that made them."""
    return list(dict.fromkeys(run["machine"] for run in runs))


def _finite(loss: float | None) -> float:
    """As it was: JSON has no NaN."""
    return math.nan if loss is None else loss


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
