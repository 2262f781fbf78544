"""`collage compare`: one model, one seed, the same batches, several precision strategies."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import collage
from collage.harness import console, options
from collage.harness.compare import shown, verdict
from collage.harness.machine import machine
from collage.harness.report.results import METRICS, REFERENCE, SUMMARY
from collage.harness.tasks.data import Corpus, read_corpus
from collage.harness.text import short, to_json
from collage.harness.train import building, checkpoints, training, world
from collage.harness.train.config import FINETUNE_LR, RUNS, RunConfig
from collage.harness.train.resuming import SETTINGS
from collage.strategies import STRATEGIES

DEFAULT = ("bf16", "collage-light", "collage-plus", REFERENCE)
STEPS, FINETUNE_STEPS, PRETRAIN_STEPS = 300, 120, 250


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    run: RunConfig  # of every strategy and seed
    warm: RunConfig | None  # what goes before, shared by the strategies of a seed
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    command: str  # that makes the same again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `collage compare`."""
    parser.add_argument(
        "--strategies", default=",".join(DEFAULT), metavar="A,B,...",
        help=f"of {', '.join(STRATEGIES)}, or the paper's letters (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--finetune", action="store_true",
        help=f"one warm-up by AdamW under {REFERENCE} on novels, then every strategy goes on with Python source at "
        f"AdamW's lr {short(FINETUNE_LR)}: where plain bf16 fails most visibly",
    )  # fmt: skip
    parser.add_argument("--pretrain-steps", type=int, metavar="N", help=f"of that warm-up (default: {PRETRAIN_STEPS})")
    parser.add_argument(
        "--finetune-data", nargs="+", metavar="PATH", help="text to go on with (default: embedded Python source)"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with N seeds, from --seed on")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the results (default: runs/MODEL-REGIME)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier comparison in --out")
    options.add_options(parser, RunConfig, RUNS, eval_every=None)


def run(args: argparse.Namespace) -> int:
    """Train everything, write the results and the report, print the table. Returns the exit code."""
    if world.size() > 1:
        raise ValueError("collage compare: runs in one process; leave out torchrun, or use collage train under it")
    plan = plan_of(args)
    replaced = _replaced(plan.run.out, args.overwrite)
    corpora = _corpora(plan, args.finetune_data)
    out = options.open_folder(plan.run.out)
    for path in replaced:  # no old plot or table stands beside new numbers, even after an interrupt
        path.unlink(missing_ok=True)
    screen = Console()
    try:
        with (out / METRICS).open("w", encoding="utf-8") as metrics, console.progress(screen) as bars:
            results = _train_all(plan, corpora, metrics, bars)
        summary = summarise(plan, results)
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


def plan_of(args: argparse.Namespace) -> Plan:
    """Check all that was asked for, before anything is trained."""
    strategies = tuple(options.strategy("--strategies", name.strip()) for name in _split(args.strategies))
    if len(set(strategies)) < len(strategies):
        raise ValueError(f"--strategies: each once, got {', '.join(strategies)}")
    if args.seeds < 1:
        raise ValueError(f"--seeds: needs a number above 0, got {args.seeds}")
    if args.pretrain_steps is not None and args.pretrain_steps < 1:
        raise ValueError(
            f"--pretrain-steps: needs a number above 0, got {args.pretrain_steps}; to start from random weights leave "
            "out --finetune"
        )
    if not args.finetune and (args.pretrain_steps is not None or args.finetune_data):
        raise ValueError("--pretrain-steps, --finetune-data: only with --finetune")
    regime = "finetune" if args.finetune else "scratch"
    out = args.out or Path("runs") / f"{args.model}-{regime}"
    steps = args.steps or (FINETUNE_STEPS if args.finetune else STEPS)
    run = RunConfig.from_options(args, out=out, steps=steps, eval_every=max(1, steps // 4))
    for strategy in strategies:  # raises for one that the optimizer cannot have
        with options.flags_named(RunConfig):
            replace(run, strategy=strategy)
    warm = _warm_up(args, run) if args.finetune else None
    if warm is not None:
        run = replace(run, data=tuple(args.finetune_data or ()))
    seeds = tuple(range(args.seed, args.seed + args.seeds))
    return Plan(run, warm, strategies, seeds, shlex.join(["collage", *sys.argv[1:]]))


def _split(names: str) -> list[str]:
    """At the commas between strategies; those inside a spec, param=...,variance=..., stay."""
    parts: list[str] = []
    for part in names.split(","):
        if "=" in part and not part.startswith("param=") and parts and "=" in parts[-1]:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def _warm_up(args: argparse.Namespace, run: RunConfig) -> RunConfig:
    """From scratch, by the recipe; logged and evaluated at its ends alone."""
    steps = PRETRAIN_STEPS if args.pretrain_steps is None else args.pretrain_steps
    return RunConfig.of(
        args.model, run.out, phase=args.phase, strategy=REFERENCE, steps=steps, data=tuple(args.data or ()),
        tokenizer=args.tokenizer, batch_size=run.batch_size, micro_batch=run.micro_batch, seq_len=run.seq_len,
        compute=run.compute, every=steps, shadow=0, eval_sequences=run.micro_batch,
    )  # fmt: skip


def _corpora(plan: Plan, finetune_data: list[str] | None) -> tuple[Corpus, Corpus | None]:
    """Text of the runs, and of the warm-up. Read once; a wrong path or too little is known before a run."""
    config = plan.run
    warm = plan.warm.corpus() if plan.warm else None
    if finetune_data is not None and warm is not None:
        corpus = read_corpus(finetune_data, config.validation or None, warm.tokens)
    else:
        corpus = config.corpus()
    if plan.warm is not None and warm is not None:
        building.datasets(plan.warm, warm)  # raises if it is too little
    building.datasets(config, corpus, "--finetune-data" if finetune_data else "--data")
    return corpus, warm


def _train_all(
    plan: Plan, corpora: tuple[Corpus, Corpus | None], metrics: TextIO, bars: Progress
) -> list[training.RunResult]:
    def record(row: dict[str, Any]) -> None:
        metrics.write(to_json(row))
        metrics.flush()

    corpus, warm_corpus = corpora
    results: list[training.RunResult] = []
    measured = REFERENCE if REFERENCE in plan.strategies else plan.strategies[0]
    for seed in plan.seeds:
        where = f", seed {seed}" if len(plan.seeds) > 1 else ""
        init: Mapping[str, Tensor] | None = None
        if plan.warm is not None:
            tick = console.bar(bars, f"warm-up{where}", plan.warm.steps)
            init = training.run(replace(plan.warm, seed=seed), warm_corpus, tick=tick).weights
        for strategy in plan.strategies:
            config = replace(plan.run, strategy=strategy, seed=seed)
            tick = console.bar(bars, f"{strategy}{where}", config.steps)
            first = strategy == measured and seed == plan.seeds[0]
            result = training.run(config, corpus, init=init, record=record, tick=tick, histogram=first)
            results.append(replace(result, weights={}))
    return results


def summarise(plan: Plan, results: list[training.RunResult]) -> dict[str, Any]:
    """summary.json."""
    from collage.floors import floors_table

    config, runs = plan.run, [result.to_dict() for result in results]
    rows = verdict.table(plan.strategies, runs)
    about = machine(config.compute_dtype())
    return {
        "title": f"{'Fine-tuning' if plan.warm else 'Training from scratch'}: {config.model}, {config.optimizer}",
        "command": plan.command,
        "version": collage.__version__,
        "machine": about,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "regime": "finetune" if plan.warm else "scratch",
        "model": config.model,
        "optimizer": " ".join([config.optimizer, *config.optimizer_args]),
        "parameters": results[0].parameters,
        "steps": config.steps,
        "pretrain_steps": plan.warm.steps if plan.warm else None,
        "tokens_per_step": config.tokens_per_step,
        "lr": config.lr,
        "settings": config.to_dict(),
        "seeds": list(plan.seeds),
        "strategies": list(plan.strategies),
        "initial_loss": verdict.mean([run["initial_loss"] for run in runs]),
        "runs": runs,
        "table": rows,
        "floors": {name: floor._asdict() for name, floor in floors_table().items()},
        "advice": verdict.advice(rows, runs, config.steps, _beta2(config, results)),
        "update_histogram": next((r.update_histogram for r in results if r.update_histogram), None),
        "caveats": verdict.caveats(
            config, plan.strategies, len(plan.seeds), about["kernels"], results[0].report.unfollowed
        ),
    }


def _beta2(config: RunConfig, results: list[training.RunResult]) -> float | None:
    """The decay rate of the second moment; None where the optimizer keeps none."""
    keeps = any("exp_avg_sq" in result.bytes_by_slot for result in results)
    return config.betas[1] if config.betas and keeps else None
