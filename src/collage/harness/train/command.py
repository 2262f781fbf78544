"""`collage train`: one strategy, with checkpoints and resume."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

import collage
from collage.harness import console, options
from collage.harness.text import fixed, percent, scientific, to_json
from collage.harness.train import building, checkpoints, training
from collage.harness.train.config import KEPT, OWN, RUNS, RunConfig

SETTINGS, METRICS, RESULT, WEIGHTS = "settings.json", "metrics.jsonl", "result.json", "weights.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `collage train`: all fields of a RunConfig."""
    settings: dict[str, Any] = {"out": Path("runs/train"), "save_every": 100, "eval_every": 100}
    options.add_options(parser, RunConfig, (OWN, KEPT, *RUNS), **settings)


def run(args: argparse.Namespace) -> int:
    """Train. Writes checkpoints, metrics.jsonl, TensorBoard logs, result.json and the weights into --out."""
    config = RunConfig.from_options(args)
    screen = Console()
    if config.resume and (config.out / RESULT).exists():
        return _already_finished(config, screen)
    init = _weights(config.init, config) if config.init else None
    corpus = config.corpus()
    building.datasets(config, corpus)  # too little text is an error before anything is written
    options.open_folder(config.out)
    start = _start(config, screen)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(config.out / "tensorboard"))
    try:
        with (config.out / METRICS).open("a", encoding="utf-8") as metrics, console.progress(screen) as bars:

            def record(row: dict[str, Any]) -> None:
                if start is None or row["step"]:  # a resumed run has told its first loss before
                    metrics.write(to_json(row))
                    metrics.flush()
                    console.say(bars.console, _line(row))

            tick = console.bar(bars, config.strategy, config.steps)
            result = training.run(
                config, corpus, init=init, resume=start, record=record, tick=tick, report_to="tensorboard"
            )
    except KeyboardInterrupt:
        console.say(screen, f"interrupted; checkpoints and metrics so far are in {config.out}; go on with --resume")
        return 130
    _save(result, config.out)
    console.say(screen, _verdict(result))
    console.say(screen, f"weights: {config.out / WEIGHTS}")
    if not result.diverged:
        return 0
    console.say(screen, f"diverged: the loss of step {result.last_step} is not finite; lower --lr", "bold red")
    return 1


def _weights(path: str, config: RunConfig) -> dict[str, Tensor]:
    init = building.read_weights(path)
    building.require_fit(config, init)
    return init


def _already_finished(config: RunConfig, screen: Console) -> int:
    """Leave the run as it is. Returns its exit code."""
    _require_same_run(config)
    result = config.out / RESULT
    diverged = json.loads(result.read_text(encoding="utf-8"))["val_loss"] is None
    how = "diverged; lower --lr and choose another --out" if diverged else "nothing left to do"
    console.say(screen, f"already finished: {how}; see {result}")
    return int(diverged)


def _line(row: dict[str, Any]) -> str:
    if row["kind"] == "eval":
        return f"step {row['step']:>6}  validation loss {fixed(row['loss'], 4)}"
    measured = "" if row["edq_ratio"] is None else f"  {_quality(row['edq_ratio'], row['lost'])}"
    return f"step {row['step']:>6}  loss {fixed(row['loss'], 4)}  lr {scientific(row['lr'])}{measured}"


def _quality(edq_ratio: float | None, lost: float | None) -> str:
    return "no EDQ" if edq_ratio is None else f"EDQ ratio {fixed(edq_ratio, 4)}, lost {percent(lost)}"


def _verdict(result: training.RunResult) -> str:
    total, frozen = result.report.total, len(result.report.frozen)
    since = f"since step {result.since_step} alone: " if result.since_step else ""
    said = [
        f"{result.strategy}: validation loss {fixed(result.initial_loss, 4)} → {fixed(result.val_loss, 4)}",
        f"{since}{_quality(total.edq_ratio, total.lost)}" + (f", {frozen} parameters frozen" if frozen else ""),
        *(
            f"{name} would have had {_quality(quality.edq_ratio, quality.lost)}"
            for name, quality in result.report.beside.items()
            if quality.edq_ratio is not None
        ),
    ]
    return "; ".join(said)


def _start(config: RunConfig, screen: Console) -> Path | None:
    """The checkpoint to go on from, or None to begin. Refuses to mix two runs in one folder."""
    settings, found = config.out / SETTINGS, checkpoints.all_in(config.out)
    told = [path for path in (config.out / METRICS, config.out / RESULT) if path.exists() and path.stat().st_size]
    if not config.resume and (found or told):
        fix = "add --resume to go on with it" if found else "empty it"
        raise ValueError(
            f"--out '{config.out}': holds {(told + found)[-1].name} of an earlier run; {fix}, or choose another folder"
        )
    start = None
    if config.resume:
        _require_same_run(config)
        start, skipped = checkpoints.newest_complete(config.out)
        for line in skipped:
            console.say(screen, line)
        went = f"going on from {start.name}" if start else "no complete checkpoint: starting from the beginning"
        console.say(screen, f"{went} in {config.out}")
    _forget_after(config.out / METRICS, checkpoints.step_of(start) if start else None)
    checkpoints.write_whole(settings, to_json(config.to_dict(), indent=1))
    return start


def _require_same_run(config: RunConfig) -> None:
    settings = config.out / SETTINGS
    if settings.exists():
        config.require_same_run(json.loads(settings.read_text(encoding="utf-8")))


def _forget_after(metrics: Path, step: int | None) -> None:
    """Keep only the records up to the checkpoint's step: the rest will be made again."""
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the last is cut off if the run was killed
    kept = [line for line in whole if step is not None and json.loads(line)["step"] <= step]
    checkpoints.write_whole(metrics, "".join(kept))


def _save(result: training.RunResult, out: Path) -> None:
    """The weights in float32 with all that their components hold, each tied one under one name; last, result.json."""
    from safetensors.torch import save_file

    partial = out / f".{WEIGHTS}.writing"
    save_file(result.weights, partial, metadata={"format": "pt", "collage": collage.__version__})
    os.replace(partial, out / WEIGHTS)
    checkpoints.write_whole(out / RESULT, to_json(result.to_dict(), indent=1))
