"""`collage bench --gradients`: measure, write the JSON, print the tables."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from rich.console import Console

from collage.harness.bench.gradients import accumulate, clip, release
from collage.harness.console import bar, print_table, progress, say
from collage.harness.machine import machine
from collage.harness.options import open_folder
from collage.harness.text import Column, fixed, percent, scientific, short, to_json

NS = partial(fixed, digits=3)
TABLES: dict[str, tuple[str, tuple[Column, ...]]] = {
    "accumulate": (
        f"Adding up the gradients of {accumulate.MICRO} micro-batches, {accumulate.NUMEL:,} bfloat16 weights",
        (
            Column("error", "error of the sum", "÷ its norm", scientific),
            Column("bytes_kept", "bytes kept", "per weight", short),
            Column("bytes_more", "more while", "one arrives", partial(short, digits=3)),
            Column("ns_per_param", "ns/param and", "micro-batch", NS),
        ),
    ),
    "clip": (
        f"Clipping the gradients of {clip.TENSORS} × {clip.NUMEL:,} bfloat16 weights",
        (
            Column("error", "error", "of the norm", scientific),
            Column("ns_kept", "ns/param", "not clipped", NS),
            Column("ns_clipped", "ns/param", "clipped", NS),
        ),
    ),
    "release": (
        "collage-plus, updated in backward (release_gradients) and after it",
        (
            Column("after_ms", "ms", "after", partial(fixed, digits=2)),
            Column("inside_ms", "ms", "inside", partial(fixed, digits=2)),
            Column("ratio", "time", "inside ÷ after", partial(fixed, digits=2)),
            Column("alive_after", "gradients alive", "after", percent),
            Column("alive_inside", "at once", "inside", percent),
        ),
    ),
}


def run(args: argparse.Namespace) -> int:
    """Measure all three; the exit status."""
    open_folder(args.out)
    screen = Console(width=max(100, Console().width))
    result = measure(args.rounds, screen)
    result["command"] = f"collage bench --gradients --rounds {args.rounds}"
    (args.out / "gradients.json").write_text(to_json(result, indent=1), encoding="utf-8")
    for key, (title, columns) in TABLES.items():
        print_table(screen, title, columns, result[key])
    say(screen, f"Medians on {torch.get_num_threads()} threads. Numbers: {args.out}/gradients.json")
    return 0


def measure(rounds: int, screen: Console) -> dict[str, Any]:
    """The rows of every table."""
    with progress(screen) as bars:
        return {
            "machine": machine(torch.float32, False),
            "accumulate": accumulate.measure(bar(bars, "micro-batches", accumulate.MICRO)),
            "clip": clip.measure(rounds, bar(bars, "clipping", rounds)),
            "release": release.measure(rounds, bar(bars, "release", rounds * len(release.SHAPES))),
        }
