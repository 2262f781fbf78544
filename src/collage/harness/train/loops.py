"""The loop that a run takes: transformers' Trainer over data, or a policy that plays a game."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from collage.harness.tasks.games import Game
from collage.harness.tasks.material import Data
from collage.harness.train import training
from collage.harness.train.config import RunConfig

_OF_GAMES = "collage.harness.rl.run"  # known by name alone: it is built of what is here


def run(config: RunConfig, data: Data | None = None, *, resume: Path | None = None, **rest: Any) -> training.RunResult:
    """What a run gave. Its data and all else are those of `training.run`."""
    data = config.corpus() if data is None else data
    if not isinstance(data, Game):
        return training.run(config, data, resume=resume, **rest)
    result: training.RunResult = importlib.import_module(_OF_GAMES).run(config, data, **rest)
    return result
