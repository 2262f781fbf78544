"""The loop that a run takes: transformers' Trainer over data, or a policy that plays a game."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from collage.harness.rl import run as rl
from collage.harness.tasks.games import Game
from collage.harness.train import training
from collage.harness.train.config import Data, RunConfig


def run(config: RunConfig, data: Data | None = None, *, resume: Path | None = None, **rest: Any) -> training.RunResult:
    """What a run gave. Its data and all else are those of `training.run`."""
    data = config.corpus() if data is None else data
    if isinstance(data, Game):
        return rl.run(config, data, **rest)
    return training.run(config, data, resume=resume, **rest)
