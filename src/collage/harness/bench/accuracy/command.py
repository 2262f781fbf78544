"""`collage bench --accuracy`: measure, write the JSON and the picture, print the tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from collage.harness.bench.accuracy import entries, moments, plot, weights
from collage.harness.bench.accuracy.entries import MOMENTS, Entry
from collage.harness.bench.accuracy.shown import show
from collage.harness.console import bar, progress, say
from collage.harness.machine import machine
from collage.harness.options import open_folder
from collage.harness.text import to_json
from collage.strategies import Strategy


def run(strategies: Sequence[Strategy], args: argparse.Namespace) -> int:
    """Measure every format, or those of the strategies; the exit status."""
    open_folder(args.out)
    screen = Console(width=max(112, Console().width))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small
    try:
        result = measure(strategies, not args.no_others, screen)
    finally:
        torch.set_num_threads(before)
    result["command"] = "collage bench --accuracy" + (f" --strategies {args.strategies}" if args.strategies else "")
    result["command"] += " --no-others" * args.no_others
    (args.out / "accuracy.json").write_text(to_json(result, indent=1), encoding="utf-8")
    plot.draw(result, args.out / "accuracy.png")
    show(result, screen)
    say(screen, f"numbers and picture: {args.out}/accuracy.json, accuracy.png")
    return 0


def measure(strategies: Sequence[Strategy], others: bool, screen: Console) -> dict[str, Any]:
    """A row of every format of weights and of every pair of moments; of what cannot be measured here, the reason."""
    light, pairs = entries.weights(strategies, others), entries.moments(strategies, others)
    missing = {entry: reason for entry in (*light, *pairs) if (reason := entry.missing())}
    there = [entry for entry in light if entry not in missing]
    makers = {entry.name: entry.make for entry in pairs if entry not in missing}
    with progress(screen) as bars:
        tick = _counted(bar(bars, "weights", len(there) * weights.STEPS))
        lost = {entry: weights.measure(entry, tick) for entry in there}
        tick = _counted(bar(bars, "moments", sum(sum(moments.phases(betas)) for betas in moments.BETAS)))
        numbers = [moments.measure(makers, betas, tick) for betas in moments.BETAS]
    return {
        "machine": machine(torch.float32, False),
        "weights": [_row(entry) | lost.get(entry, {}) for entry in light],
        "moments": [_pair(entry, numbers) for entry in pairs],
        "missing": {entry.name: reason for entry, reason in missing.items()},
    }


def _row(entry: Entry) -> dict[str, Any]:
    return {"name": entry.name, "bytes": entry.size, "ours": entry.ours}


def _pair(entry: Entry, numbers: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """The row of a pair of moments: numbers of every beta2 in turn."""
    row = _row(entry)
    for role, name, size in zip(MOMENTS, entry.names, entry.sizes, strict=True):
        row |= {role: name, f"{role} bytes": size}
    return row | {key: number for own in numbers for key, number in own.get(entry.name, {}).items()}


def _counted(tell: Callable[[int], None]) -> Callable[[], None]:
    """A bar that is told of one step after the other."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done % 100 == 0:
            tell(done)

    return tick
