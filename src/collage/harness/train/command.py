"""`collage train`: one strategy, with checkpoints and resume."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

import collage
from collage.harness import console, options
from collage.harness.tasks.recipes import get_recipe
from collage.harness.tasks.registry import require_installed
from collage.harness.tasks.weights import WEIGHTS
from collage.harness.text import fixed, percent, scientific, short, to_json
from collage.harness.train import building, checkpoints, loops, resuming, training, world
from collage.harness.train.config import KEPT, OWN, RUNS, RunConfig
from collage.harness.train.resuming import METRICS, RESULT

SAVE_EVERY = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `collage train`: all fields of a RunConfig."""
    settings: dict[str, Any] = {"out": Path("runs/train"), "save_every": None, "eval_every": 100}
    options.add_options(parser, RunConfig, (OWN, KEPT, *RUNS), **settings)


def run(args: argparse.Namespace) -> int:
    """Train. Writes checkpoints, metrics.jsonl, TensorBoard logs, result.json and the weights into --out.

    Under torchrun the first process alone writes and prints.
    """
    with world.joined():
        config = world.first_does(lambda: settings_of(args))
        screen = Console(quiet=not world.is_first())
        finished = world.first_does(lambda: resuming.already_finished(config, screen) if config.resume else None)
        return _train(config, screen) if finished is None else finished


def settings_of(args: argparse.Namespace) -> RunConfig:
    """The settings, for this number of processes. Raises ValueError naming the flag."""
    plays = get_recipe(args.model).plays
    require_installed(args.model)
    config = RunConfig.from_options(args, save_every=0 if plays else SAVE_EVERY)
    with options.flags_named(RunConfig):
        config.share(world.size())
    if plays and world.size() > 1:
        raise ValueError(f"--model: '{config.model}' plays in one process; leave out torchrun")
    if config.shard and world.size() == 1:
        raise ValueError(
            "--shard: there is one process; start several (torchrun --nproc-per-node 2 -m collage train ...), or leave "
            "it out"
        )
    return config


def _train(config: RunConfig, screen: Console) -> int:
    init = world.each_does(lambda: _weights(config))
    corpus = world.each_does(config.corpus)
    start, told = world.first_does(lambda: resuming.begin(config, corpus, screen))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(config.out / "tensorboard"))
    try:
        with (config.out / METRICS).open("a", encoding="utf-8") as metrics, console.progress(screen) as bars:

            def record(row: dict[str, Any]) -> None:
                if world.is_first() and resuming.key(row) not in told:
                    metrics.write(to_json(row))
                    metrics.flush()
                    console.say(bars.console, _line(row))

            tick = console.bar(bars, config.strategy, config.steps)
            result = loops.run(
                config, corpus, init=init, resume=start, record=record, tick=tick, report_to="tensorboard"
            )
    except KeyboardInterrupt:
        console.say(screen, f"interrupted; checkpoints and metrics so far are in {config.out}; go on with --resume")
        return 130
    if world.is_first():
        _save(result, config.out)
    console.say(screen, _verdict(config.optimizer, result))
    console.say(screen, f"weights: {config.out / WEIGHTS}")
    if not result.diverged:
        return 0
    console.say(screen, f"diverged: the loss of step {result.last_step} is not finite; lower --lr", "bold red")
    return 1


def _weights(config: RunConfig) -> Mapping[str, Tensor] | None:
    init = building.start(config)
    if init is not None:
        building.require_fit(config, init)
    return init


def _line(row: dict[str, Any]) -> str:
    if row["kind"] == "eval":
        score = f"  score {short(row['score'])}" if "score" in row else ""
        return f"step {row['step']:>6}  validation loss {fixed(row['loss'], 4)}{score}"
    measured = "" if row["edq_ratio"] is None else f"  {_quality(row['edq_ratio'], row['lost'])}"
    return f"step {row['step']:>6}  loss {fixed(row['loss'], 4)}  lr {scientific(row['lr'])}{measured}"


def _quality(edq_ratio: float | None, lost: float | None) -> str:
    return "no EDQ" if edq_ratio is None else f"EDQ ratio {fixed(edq_ratio, 4)}, lost {percent(lost)}"


def _verdict(optimizer: str, result: training.RunResult) -> str:
    total, frozen = result.report.total, len(result.report.frozen)
    since = f"since step {result.since_step} alone: " if result.since_step else ""
    said = [
        f"{optimizer} under {result.strategy}: validation loss {fixed(result.initial_loss, 4)} → "
        f"{fixed(result.val_loss, 4)}",
        *([f"score {short(result.initial_score)} → {short(result.score)}"] if result.score is not None else []),
        f"{since}{_quality(total.edq_ratio, total.lost)}" + (f", {frozen} parameters frozen" if frozen else ""),
        *([f"a row's scale moved in {percent(total.rescaled)} of the steps"] if total.scales else []),
        *([f"{total.saturated:,} weights beyond the largest scale"] if total.saturated else []),
        *(
            f"{name} would have had {_quality(quality.edq_ratio, quality.lost)}"
            for name, quality in result.report.beside.items()
            if quality.edq_ratio is not None
        ),
    ]
    return "; ".join(said)


def _save(result: training.RunResult, out: Path) -> None:
    """The weights in float32 with all that their components hold, each tied one under one name; last, result.json."""
    from safetensors.torch import save_file

    partial = out / f".{WEIGHTS}.writing"
    save_file(result.weights, partial, metadata={"format": "pt", "collage": collage.__version__})
    checkpoints.sync(partial)
    os.replace(partial, out / WEIGHTS)
    checkpoints.write_whole(out / RESULT, to_json(result.to_dict(), indent=1))
