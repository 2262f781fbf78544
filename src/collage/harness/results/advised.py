"""What `collage.advise` says of runs that were made, from the weights they began with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import collage
from collage.harness.experiment import Experiment, Plan
from collage.harness.sweep.store import Stored
from collage.harness.tasks.registry import get_task
from collage.harness.train.config import RunConfig

_BANDWIDTH = 10.0  # GB/s: times are not asked for, so none is measured


def ask(one: Stored) -> Mapping[str, str]:
    """strategy -> verdict, of runs that begin as this one and have its settings."""
    run = _config(one.asked.settings)
    start = json.dumps([one.asked.task, run.model, run.seed, one.asked.start], sort_keys=True)
    advice = collage.advise(
        _weights(start), run.lr, final_lr=run.lr * run.lr_scale(run.steps - 1), weight_decay=run.weight_decay or 0.0,
        betas=run.betas or (0.9, 0.999), steps=run.steps, bandwidth=_BANDWIDTH,
    )  # fmt: skip
    return {row["strategy"]: row["verdict"] for row in advice.rows}


@cache
def _weights(start: str) -> Mapping[str, Any]:
    """Of a model as its runs begin: a warm-up is trained once for all that go on from it."""
    task, model, seed, warm = json.loads(start)
    run = RunConfig.of(model, Path(), seed=seed, **get_task(task).settings)
    return Experiment(Plan(get_task(task), run, _config(warm) if warm else None)).model(seed).state_dict()


def _config(settings: Mapping[str, Any]) -> RunConfig:
    """The settings of a run, of what a store has of them."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return RunConfig.of(out=Path(), **given)
