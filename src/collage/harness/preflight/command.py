"""`collage preflight`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from collage.harness import options
from collage.harness.console import say
from collage.harness.preflight import shown
from collage.harness.preflight.examine import examine
from collage.harness.tasks.weights import ACCEPTED
from collage.harness.text import to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help=ACCEPTED)
    add("--lr", type=float, required=True, help="learning rate: about the size of one update of Adam, e.g. 1e-5")
    add("--weight-decay", type=float, default=0.0, metavar="WD", help="as given to AdamW, e.g. 0.1 (default: none)")
    add("--json", type=Path, metavar="FILE", help="also write every number to FILE")


def run(args: argparse.Namespace) -> int:
    """Examine the model, print the tables and the verdict, write the JSON file. Returns the exit status."""
    options.require_file("--json", args.json)
    screen = Console()
    with screen.status("reading ..."):
        found = examine(args.model, args.lr, args.weight_decay)
    shown.show(found, screen)
    if args.json:
        args.json.write_text(to_json(shown.to_dict(found), indent=1), encoding="utf-8")
        say(screen, f"Every number: {args.json}")
    return 0
