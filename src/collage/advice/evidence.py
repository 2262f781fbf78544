"""Runs that were measured: what each strategy lost against float32 master weights, for verdicts to cite."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from collage.numerals import fixed, short

NEAR = 10.0  # times another learning rate: beyond, a run says nothing of it
NOISE = 0.01  # nats: less says nothing
TABLE = Path(__file__).with_name("evidence.json")


@dataclass(frozen=True)
class Run:
    """A strategy's run beside that of `fp32-master` on the same batches. lost: nats of validation loss."""

    task: str
    model: str
    strategy: str
    lr: float
    beta2: float
    weight_decay: float
    steps: int
    batch: int
    seed: int
    lost: float

    def __str__(self) -> str:
        return (
            f"in {self.task} of {self.model} at lr {short(self.lr)}, {self.steps} steps, {self.strategy} {self._said}"
        )

    @property
    def _said(self) -> str:
        if abs(self.lost) < NOISE:
            return f"ended within {fixed(max(abs(self.lost), 1e-4), 4)} nats of fp32-master"
        return f"{'lost' if self.lost > 0 else 'gained'} {fixed(abs(self.lost), 2)} nats"


@cache
def runs() -> tuple[Run, ...]:
    """All of the table."""
    return tuple(Run(**row) for row in json.loads(TABLE.read_text(encoding="utf-8")))


def nearest(strategy: str, lr: float) -> Run | None:
    """The run of a strategy whose learning rate is the nearest, the longer one of two; None: none was within NEAR."""
    own = [run for run in runs() if run.strategy == strategy and 1 / NEAR <= run.lr / lr <= NEAR]
    return min(own, key=lambda run: (abs(math.log(run.lr / lr)), -run.steps), default=None)
