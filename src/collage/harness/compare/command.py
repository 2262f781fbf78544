"""`collage compare`: one model, one seed, the same batches, several precision strategies."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import Progress

import collage
from collage.harness import console, options
from collage.harness.compare import shown, verdict
from collage.harness.experiment import PRETRAIN_STEPS, Experiment, Plan
from collage.harness.machine import machine
from collage.harness.report.results import METRICS, REFERENCE, SUMMARY
from collage.harness.tasks.recipes import get_recipe
from collage.harness.tasks.registry import FINETUNE_LR, TASKS, Task, get_task
from collage.harness.text import short, to_json
from collage.harness.train import checkpoints, training, world
from collage.harness.train.config import RUNS, RunConfig
from collage.harness.train.resuming import SETTINGS
from collage.strategies import STRATEGIES

DEFAULT = ("bf16", "collage-light", "collage-plus", REFERENCE)


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    plan: Plan
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    command: str  # that makes the same again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `collage compare`."""
    parser.add_argument(
        "--strategies", default=",".join(DEFAULT), metavar="A,B,...",
        help=f"of {', '.join(STRATEGIES)}, or the paper's letters (default: %(default)s)",
    )  # fmt: skip
    told = "; ".join(f"{task.name}: {task.says}" for task in TASKS.values())
    parser.add_argument("--task", choices=tuple(TASKS), metavar="NAME", help=f"{told} (default: pretrain)")
    parser.add_argument(
        "--finetune", action="store_true",
        help=f"--task finetune: one warm-up by AdamW under {REFERENCE} on novels, then every strategy goes on with "
        f"Python source at AdamW's lr {short(FINETUNE_LR)}: where plain bf16 fails most visibly",
    )  # fmt: skip
    parser.add_argument("--pretrain-steps", type=int, metavar="N", help=f"of that warm-up (default: {PRETRAIN_STEPS})")
    parser.add_argument(
        "--finetune-data", nargs="+", metavar="PATH", help="text to go on with (default: embedded Python source)"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with N seeds, from --seed on")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the results (default: runs/MODEL-REGIME)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier comparison in --out")
    options.add_options(parser, RunConfig, RUNS, model=None, eval_every=None, eval_sequences=None)


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
    strategies = tuple(options.strategy("--strategies", name.strip()) for name in _split(args.strategies))
    if len(set(strategies)) < len(strategies):
        raise ValueError(f"--strategies: each once, got {', '.join(strategies)}")
    if args.seeds < 1:
        raise ValueError(f"--seeds: needs a number above 0, got {args.seeds}")
    plan = _plan(args)
    for strategy in strategies:  # raises for one that the optimizer cannot have
        with options.flags_named(RunConfig):
            replace(plan.run, strategy=strategy)
    seeds = tuple(range(args.seed, args.seed + args.seeds))
    return Comparison(plan, strategies, seeds, shlex.join(["collage", *sys.argv[1:]]))


def _plan(args: argparse.Namespace) -> Plan:
    task = _task(args)
    if args.pretrain_steps is not None and args.pretrain_steps < 1:
        raise ValueError(
            f"--pretrain-steps: needs a number above 0, got {args.pretrain_steps}; to start from random weights leave "
            "out --finetune"
        )
    if not task.warm_up and (args.pretrain_steps is not None or args.finetune_data):
        raise ValueError("--pretrain-steps, --finetune-data: only with --finetune")
    model, steps = args.model or task.models[0], args.steps or task.steps
    if get_recipe(model).name not in task.models:
        raise ValueError(f"--model: task '{task.name}' trains {', '.join(task.models)}; got '{model}'")
    settings = {
        "out": args.out or Path("runs") / f"{model}-{task.name}",
        "steps": steps, "model": model, "eval_every": max(1, steps // 4), **task.settings,
    }  # fmt: skip
    run = RunConfig.from_options(args, **settings)
    return Plan.of(task, run, args.pretrain_steps, tuple(args.finetune_data or ()))


def _task(args: argparse.Namespace) -> Task:
    """Raises ValueError if --finetune and --task differ."""
    if args.finetune and args.task not in (None, "finetune"):
        raise ValueError(f"--finetune: is --task finetune, got --task {args.task}; leave out one")
    args.finetune = args.finetune or args.task == "finetune"
    task = get_task("finetune" if args.finetune else args.task or "pretrain")
    task.require()
    return task


def _split(names: str) -> list[str]:
    """At the commas between strategies; those inside a spec, param=...,variance=..., stay."""
    parts: list[str] = []
    for part in names.split(","):
        if "=" in part and not part.startswith("param=") and parts and "=" in parts[-1]:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


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
        "initial_loss": verdict.mean([run["initial_loss"] for run in runs]),
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
