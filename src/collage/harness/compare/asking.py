"""What `collage compare` and `collage sweep` are both asked for: a task, strategies, seeds, settings of a run."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from collage.harness import options
from collage.harness.experiment import PRETRAIN_STEPS, Plan, defaults
from collage.harness.report.results import REFERENCE
from collage.harness.tasks.registry import FINETUNE_LR, TASKS, Task, get_task
from collage.harness.text import short
from collage.harness.train.config import RUNS, RunConfig
from collage.strategies import STRATEGIES

DEFAULT = ("bf16", "collage-light", "collage-plus", REFERENCE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of both."""
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
    options.add_options(parser, RunConfig, RUNS, model=None, eval_every=None, eval_sequences=None)


def plan_of(args: argparse.Namespace, folder: str) -> Plan:
    """What is run, but for strategies and seeds. Raises ValueError naming the flag.

    folder: in runs/, if --out is not given; {model} and {task} stand in it.
    """
    task = _task(args)
    if args.pretrain_steps is not None and args.pretrain_steps < 1:
        raise ValueError(
            f"--pretrain-steps: needs a number above 0, got {args.pretrain_steps}; to start from random weights leave "
            "out --finetune"
        )
    if not task.warm_up and (args.pretrain_steps is not None or args.finetune_data):
        raise ValueError("--pretrain-steps, --finetune-data: only with --finetune")
    settings = defaults(task, args.model, args.steps)
    out = args.out or Path("runs") / folder.format(model=settings["model"], task=task.name)
    run = RunConfig.from_options(args, out=out, **settings)
    return Plan.of(task, run, args.pretrain_steps, tuple(args.finetune_data or ()))


def strategies_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Their canonical names. Raises ValueError naming the flag."""
    found = tuple(options.strategy("--strategies", name) for name in options.split(args.strategies))
    if len(set(found)) < len(found):
        raise ValueError(f"--strategies: each once, got {', '.join(found)}")
    return found


def seeds_of(args: argparse.Namespace) -> tuple[int, ...]:
    """From --seed on. Raises ValueError naming the flag."""
    if args.seeds < 1:
        raise ValueError(f"--seeds: needs a number above 0, got {args.seeds}")
    return tuple(range(args.seed, args.seed + args.seeds))


def require_strategies(strategies: tuple[str, ...], run: RunConfig) -> None:
    """Raises ValueError naming one that the optimizer of a run cannot have."""
    for strategy in strategies:
        with options.flags_named(RunConfig):
            replace(run, strategy=strategy)


def _task(args: argparse.Namespace) -> Task:
    """Raises ValueError if --finetune and --task differ."""
    if args.finetune and args.task not in (None, "finetune"):
        raise ValueError(f"--finetune: is --task finetune, got --task {args.task}; leave out one")
    args.finetune = args.finetune or args.task == "finetune"
    task = get_task("finetune" if args.finetune else args.task or "pretrain")
    task.require()
    return task
