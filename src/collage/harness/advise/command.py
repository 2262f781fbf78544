"""`collage advise`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from collage.advice.advising import advise
from collage.advice.rehearsal import LONGEST
from collage.harness import options
from collage.harness.advise import models, runs
from collage.harness.console import say
from collage.harness.text import to_json
from collage.strategies import UNCONVERTED

FLAGS = ("lr", "final_lr", "weight_decay", "betas", "steps", "memory", "ranks", "bandwidth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL_OR_RECIPE", help=models.ACCEPTED)
    add("--lr", type=float, required=True, metavar="X", help="learning rate, its peak, e.g. 1e-5")
    add("--final-lr", type=float, metavar="X", help="what it falls to; of a constant one the same (default: a tenth)")
    add("--weight-decay", type=float, default=0.01, metavar="WD", help="as given to AdamW (default: %(default)s)")
    add(
        "--betas", type=float, nargs=2, default=(0.9, 0.999), metavar=("B1", "B2"),
        help="decay rates of the moments (default: 0.9 0.999)",
    )  # fmt: skip
    add("--steps", type=int, default=LONGEST, metavar="N", help="of the run (default: %(default)s)")
    add("--memory", metavar="SIZE", help="of a rank, e.g. 24GB or 22.5GiB, or bytes: which strategies fit?")
    add("--ranks", type=int, default=1, metavar="N", help="that FSDP2 shards over (default: 1)")
    add(
        "--tuned-under", metavar="NAME", help="the strategy that lr was found under: which lr to start from without it?"
    )
    add(
        "--report", type=Path, metavar="FILE",
        help="of a run under that strategy, as collage train and compare write them (result.json, summary.json): how "
        "much of its updates arrived (default: as rehearsed)",
    )  # fmt: skip
    add("--bandwidth", type=float, metavar="GB/s", help="of the memory (default: measured here, in a second)")
    add(
        "--strategies",
        default=",".join(UNCONVERTED),
        metavar="A,B,...",
        help="to choose from (default: all but those of converted models)",
    )
    add("--json", type=Path, metavar="FILE", help="also write every number to FILE")


def run(args: argparse.Namespace) -> int:
    """Advise, print, write the JSON file. Returns the exit status."""
    options.require_file("--json", args.json)
    if args.report and not args.tuned_under:
        raise ValueError("--report: is of a run under the strategy that lr was tuned under; give --tuned-under, too")
    names = [options.strategy("--strategies", name) for name in options.split(args.strategies)]
    under = options.strategy("--tuned-under", args.tuned_under) if args.tuned_under else None
    arrived = runs.arrived(args.report, under) if args.report and under else None
    screen = Console()
    with screen.status("rehearsing ..."), options.flags_of(FLAGS):
        found = advise(
            models.find(args.model), args.lr, final_lr=args.final_lr, weight_decay=args.weight_decay,
            betas=tuple(args.betas), steps=args.steps, memory=_memory(args.memory), ranks=args.ranks, tuned_under=under,
            arrived=arrived, bandwidth=args.bandwidth, strategies=names,
        )  # fmt: skip
    say(screen, str(found))
    if args.json:
        args.json.write_text(to_json(found.to_dict(), indent=1), encoding="utf-8")
        say(screen, f"Every number: {args.json}")
    return 0


def _memory(text: str | None) -> float | str | None:
    """A number of bytes, or a size with a unit, which is left as it is."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
