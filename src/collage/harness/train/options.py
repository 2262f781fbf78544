"""The options of every command that trains, and the settings they stand for."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from collage.harness import options
from collage.harness.tasks.recipes import RECIPES
from collage.harness.train.config import COMPUTE, SCHEDULES, RunConfig


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What to train, on what, and how. Defaults come from the model's recipe."""
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--model", default="tiny-llama", metavar="NAME", help=f"{', '.join(RECIPES)} (default: %(default)s)"
    )
    what.add_argument(
        "--phase", type=int, default=1, metavar="N", help="of a recipe with several, as BERT's (default: 1)"
    )
    what.add_argument("--seed", type=int, default=0, help="of weights, batches, masks and rounding (default: 0)")
    text = parser.add_argument_group("text")
    text.add_argument("--data", nargs="+", metavar="PATH", help="text files or folders (default: embedded novels)")
    text.add_argument(
        "--validation", nargs="+", metavar="PATH", help="text to be judged by (default: the last tenth of the data)"
    )
    text.add_argument("--tokenizer", metavar="FILE", help="a JSON file of the tokenizers library (default: bytes)")
    how = parser.add_argument_group("how (defaults: the model's recipe)")
    how.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    how.add_argument("--batch-size", type=int, metavar="N", help="sequences per step")
    how.add_argument("--micro-batch", type=int, metavar="N", help="sequences per forward pass; a step adds them up")
    how.add_argument("--seq-len", type=int, metavar="N", help="tokens per sequence")
    how.add_argument("--lr", type=float, help="peak learning rate")
    how.add_argument("--betas", type=float, nargs=2, metavar=("B1", "B2"), help="decay rates of the moments")
    how.add_argument("--eps", type=float, help="added to the root of the second moment")
    how.add_argument("--weight-decay", type=float, metavar="X", help="decoupled")
    how.add_argument("--max-grad-norm", type=float, metavar="X", help="gradients are clipped to it; 0: not at all")
    how.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate, after the warm-up")
    how.add_argument("--warmup-steps", type=int, metavar="N", help="of the learning rate")
    how.add_argument(
        "--compute",
        choices=COMPUTE,
        help="arithmetic of forward and backward (default: auto, bf16 where the hardware multiplies matrices in it)",
    )
    watch = parser.add_argument_group("what is measured")
    watch.add_argument("--every", type=int, metavar="N", help="measure EDQ and log: step 1 and every Nth (default: 10)")
    watch.add_argument("--shadow", type=int, metavar="N", help="follow one weight in N in fp32 (default: 256; 0: none)")
    watch.add_argument("--eval-every", type=int, metavar="N", help="steps between evaluations")
    watch.add_argument("--eval-sequences", type=int, metavar="N", help="validation sequences (default: 256)")


def run_config(args: argparse.Namespace, out: Path, **settings: Any) -> RunConfig:
    """The options as a RunConfig; `settings` are used where an option was not given."""
    names = {f.name for f in fields(RunConfig)} - {"model", "out"}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "strategy" in given:
        tuples["strategy"] = options.strategy("--strategy", given["strategy"])
    tuples["beside"] = tuple(options.strategy("--beside", name) for name in given.get("beside", ()))
    try:
        return RunConfig.of(args.model, out, phase=args.phase, **(settings | tuples))
    except ValueError as error:
        field, colon, rest = str(error).partition(":")
        raise ValueError(f"--{field.replace('_', '-')}{colon}{rest}" if field in names else str(error)) from None
