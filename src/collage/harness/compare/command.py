"""`collage compare`: one model, one seed, the same batches, several precision strategies."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import Progress

import collage
from collage.harness import console, options
from collage.harness.compare import asking, shown, verdict
from collage.harness.experiment import Experiment, Plan
from collage.harness.machine import machine
from collage.harness.report.pairs import mean
from collage.harness.report.results import METRICS, REFERENCE, SUMMARY
from collage.harness.text import to_json
from collage.harness.train import checkpoints, training, world
from collage.harness.train.config import RunConfig
from collage.harness.train.resuming import SETTINGS


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    plan: Plan
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    command: str  # that makes the same again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `collage compare`."""
    asking.add_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the results (default: runs/MODEL-TASK)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier comparison in --out")


def run(args: argparse.Namespace) -> int:
    """Train everything, write the results and the report, print the table. Returns the exit code."""
    if world.size() > 1:
        raise ValueError("collage compare: runs in one process; leave out torchrun, or use collage train under it")
    asked = comparison_of(args)
    run = asked.plan.run
    replaced = _replaced(run.out, args.overwrite)
    experiment = Experiment(asked.plan)
    out = options.open_folder(run.out)
    for path in replaced:  # no old plot or table stands beside new numbers, even after an interrupt
        path.unlink(missing_ok=True)
    screen = Console()
    try:
        with (out / METRICS).open("w", encoding="utf-8") as metrics, console.progress(screen) as bars:
            results = _train_all(asked, experiment, metrics, bars)
        summary = summarise(asked, results)
        checkpoints.write_whole(out / SUMMARY, to_json(summary, indent=1))
        shown.print_comparison(screen, summary)
        from collage.harness.report.page import write_report  # matplotlib takes a second

        console.say(screen, f"report: {write_report(out)}")
    except KeyboardInterrupt:
        console.say(screen, f"interrupted; what was measured so far is in {out / METRICS}")
        return 130
    return 0


def _replaced(out: Path, overwrite: bool) -> list[Path]:
    """The files of an earlier comparison in the folder. Raises ValueError if they, or a run there, are to stay."""
    if (out / SETTINGS).exists():
        raise ValueError(f"--out '{out}': holds a run of collage train; choose another folder")
    found = [path for path in (out / SUMMARY, out / METRICS) if path.exists() and path.stat().st_size]
    if found and not overwrite:
        raise ValueError(
            f"--out '{out}': holds {found[0].name} of an earlier comparison; choose another folder, delete this one, "
            "or add --overwrite"
        )
    return [*found, out / "report.html", *(out / "plots").glob("*.png")] if found else []


def comparison_of(args: argparse.Namespace) -> Comparison:
    """Check all that was asked for, before anything is trained."""
    strategies, seeds = asking.strategies_of(args), asking.seeds_of(args)
    plan = asking.plan_of(args, "{model}-{task}")
    asking.require_strategies(strategies, plan.run)
    return Comparison(plan, strategies, seeds, shlex.join(["collage", *sys.argv[1:]]))


def _train_all(asked: Comparison, experiment: Experiment, metrics: TextIO, bars: Progress) -> list[training.RunResult]:
    def record(row: dict[str, Any]) -> None:
        metrics.write(to_json(row))
        metrics.flush()

    results: list[training.RunResult] = []
    measured = REFERENCE if REFERENCE in asked.strategies else asked.strategies[0]
    for seed in asked.seeds:
        tick = partial(_bar, bars, f", seed {seed}" if len(asked.seeds) > 1 else "")
        for strategy in asked.strategies:
            first = strategy == measured and seed == asked.seeds[0]
            results.append(experiment.run(strategy, seed, record=record, tick=tick, histogram=first))
    return results


def _bar(bars: Progress, where: str, name: str, steps: int) -> Callable[[int], None]:
    return console.bar(bars, f"{name}{where}", steps)


def summarise(asked: Comparison, results: list[training.RunResult]) -> dict[str, Any]:
    """summary.json."""
    from collage.floors import floors_table

    plan, config, runs = asked.plan, asked.plan.run, [result.to_dict() for result in results]
    rows = verdict.table(asked.strategies, runs)
    about = machine(config.compute_dtype())
    return {
        "title": f"{plan.task.title}: {config.model}, {config.optimizer}",
        "command": asked.command,
        "version": collage.__version__,
        "machine": about,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "task": plan.task.name,
        "regime": "finetune" if plan.task.warm_up or plan.task.pretrained else "scratch",
        "loss": asdict(plan.task.loss),
        "score": asdict(plan.task.score) if plan.task.score else None,
        "model": config.model,
        "optimizer": " ".join([config.optimizer, *config.optimizer_args]),
        "parameters": results[0].parameters,
        "steps": config.steps,
        "pretrain_steps": plan.warm.steps if plan.warm else None,
        "tokens_per_step": config.tokens_per_step,
        "lr": config.lr,
        "settings": config.to_dict(),
        "seeds": list(asked.seeds),
        "strategies": list(asked.strategies),
        "initial_loss": mean(run["initial_loss"] for run in runs),
        "runs": runs,
        "table": rows,
        "floors": {name: floor._asdict() for name, floor in floors_table().items()},
        "advice": verdict.advice(rows, runs, config.steps, _beta2(config, results)),
        "update_histogram": next((r.update_histogram for r in results if r.update_histogram), None),
        "caveats": verdict.caveats(
            config, asked.strategies, len(asked.seeds), about["kernels"], results[0].report.unfollowed
        ),
    }


def _beta2(config: RunConfig, results: list[training.RunResult]) -> float | None:
    """The decay rate of the second moment; None where the optimizer keeps none."""
    keeps = any("exp_avg_sq" in result.bytes_by_slot for result in results)
    return config.betas[1] if config.betas and keeps else None
