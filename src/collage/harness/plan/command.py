"""`collage plan`: what a training step will need of memory, and what it does need."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from collage.advice.memory import amount
from collage.harness.bench.contestants import KINDS
from collage.harness.console import bar, progress, say
from collage.harness.options import require_file, split, strategy
from collage.harness.plan import shown
from collage.harness.plan.measure import Beside, measure
from collage.harness.plan.models import KNOWN, Model, find
from collage.harness.plan.predict import Prediction, predict
from collage.harness.plan.simulation import Work
from collage.harness.tasks.recipes import RECIPES
from collage.harness.text import to_json
from collage.harness.train.trainer import quiet
from collage.strategies import UNCONVERTED, Strategy, require_unconverted

COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help=f"a name ({', '.join((*RECIPES, *KNOWN))}), a config.json or folder of transformers, or a file of weights",
    )
    add("--strategies", metavar="NAMES", help="comma-separated (default: all but those of converted models)")
    # What Muon orthogonalises has temporaries of its size, which nothing here predicts
    known = tuple(name for name, kind in KINDS.items() if not kind.hidden)
    add("--optimizer", choices=known, default="adamw", help="which rule (default: %(default)s)")
    add("--ranks", type=int, default=1, metavar="N", help="that FSDP2 shards over; the table is of one (default: 1)")
    add(
        "--sequences",
        type=int,
        metavar="N",
        help="of each forward pass of a rank (default: a recipe's own, else 1); 0: weights, gradients and states alone",
    )
    add("--length", type=int, metavar="N", help="tokens of a sequence (default: a recipe's own, else at most 2,048)")
    add(
        "--compute",
        choices=tuple(COMPUTE),
        default="bf16",
        help="dtype of forward and backward; weights of another one are cast to it, as `collage train` does (default: "
        "%(default)s)",
    )
    add("--memory", type=memory, metavar="SIZE", help="of a rank, e.g. 24GB or 22.5GiB: which strategies fit?")
    add("--measure", action="store_true", help="also make real steps here, each strategy in processes of its own")
    add("--steps", type=int, default=3, metavar="N", help="of --measure (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write every number to FILE")


def memory(text: str) -> int:
    """24GB, for argparse."""
    try:
        return amount(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("memory: ")) from None


def run(args: argparse.Namespace) -> int:
    """Predict, measure if asked, print, write the JSON file. Returns the exit status."""
    require_file("--json", args.json)
    _require_positive(args)
    names = list(UNCONVERTED) if args.strategies is None else split(args.strategies)
    names = list(dict.fromkeys(strategy("--strategies", name) for name in names))
    require_unconverted("--strategies", map(Strategy.parse, names))
    screen = Console(width=max(110, Console().width))
    with quiet():
        found = find(args.model)
        work = _work(found, args)
        model = found.build("meta", torch.float32)
        with screen.status("counting ..."):
            predictions = predict(model, names, work, KINDS[args.optimizer].rule())
        plan = shown.Plan(found.name, args.optimizer, shown.count(model), work, args.memory, predictions)
        shown.show(plan, screen)
        beside = _measured(args, predictions, work, screen) if args.measure else []
    if beside:
        shown.show_measured(beside, screen)
    if args.json:
        args.json.write_text(to_json(shown.to_dict(plan, beside), indent=1), encoding="utf-8")
        say(screen, f"Every number: {args.json}")
    return 0


def _require_positive(args: argparse.Namespace) -> None:
    for flag, value, least in (
        ("--ranks", args.ranks, 1), ("--sequences", args.sequences, 0), ("--length", args.length, 1),
        ("--steps", args.steps, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ValueError(f"{flag}: needs at least {least}, got {value}")
    if args.measure and args.ranks > 1:
        raise ValueError("--measure: runs on one rank; leave --ranks out")


def _work(found: Model, args: argparse.Namespace) -> Work:
    """Raises ValueError, naming the flag, for what the model does not take."""
    sequences = found.sequences if args.sequences is None else args.sequences
    length = found.length if args.length is None else args.length
    if not found.sequences and (sequences or args.measure):
        raise ValueError(
            f"{'--sequences' if sequences else '--measure'}: '{found.name}' holds weights alone, and no forward pass; "
            "give the config.json of the model"
        )
    if sequences and length > found.longest:
        raise ValueError(f"--length: '{found.name}' takes at most {found.longest:,} tokens, got {length:,}")
    if args.measure and not sequences:
        raise ValueError("--measure: needs sequences to compute with; leave --sequences 0 out")
    return Work(sequences, length if sequences else 0, COMPUTE[args.compute], args.ranks)


def _measured(args: argparse.Namespace, predictions: list[Prediction], work: Work, screen: Console) -> list[Beside]:
    beside = []
    with progress(screen) as bars:
        tick = bar(bars, "measuring", len(predictions))
        for k, prediction in enumerate(predictions):
            beside.append(measure(args.model, args.optimizer, prediction, work, args.steps))
            tick(k + 1)
    return beside
