"""What `collage bench` prints: the plan, or the table of its timings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

from rich.console import Console

from collage.harness.bench.contestants import Row, Shapes, count
from collage.harness.console import print_table, say
from collage.harness.text import Column, fixed, percent, short

TIMES = (
    Column("ns_per_param", "ns/", "param", partial(fixed, digits=3)),
    Column("spread", "±", "", percent),
    Column("bytes_moved", "bytes", "moved", short),
    Column("gb_per_s", "GB/s", "", partial(fixed, digits=1)),
    Column("of_limit", "of the", "limit", percent),
    Column("to_d", "time", "÷ D", partial(fixed, digits=2)),
    Column("to_a", "time", "÷ A", partial(fixed, digits=2)),
    Column("edq_ratio", "EDQ", "ratio", partial(fixed, digits=3)),
)


def show_plan(lines: Sequence[Row], shapes: Shapes, args: argparse.Namespace) -> int:
    """What would be measured, and below which time no step can be."""
    screen, bandwidth, numel = Console(width=max(100, Console().width)), args.bandwidth or 2000.0, count(shapes)
    columns = (
        Column("bytes", "bytes moved", "per parameter", short),
        Column("gb", "GB", "per step", partial(fixed, digits=2)),
        Column("ms", "floor in ms", f"at {short(bandwidth)} GB/s", partial(fixed, digits=3)),
    )
    planned = {
        row.name: {
            "bytes": row.moved(shapes) / numel,
            "gb": row.moved(shapes) / 1e9,
            "ms": row.moved(shapes) / bandwidth / 1e6,
        }
        for row in lines
        if not row.name.startswith("limit")
    }
    title = f"One step of {args.optimizer}, {numel:,} parameters, {args.device}: a plan"
    print_table(screen, title, columns, planned)
    say(
        screen,
        f"Nothing was measured. Without --plan: {args.rounds} interleaved rounds of these rows, their medians, and how "
        f"much of the intended update arrived (EDQ), into {args.out}.",
    )
    return 0


def show(result: dict[str, Any], screen: Console) -> None:
    """The table, and how noisy it is."""
    tensors = f"{result['tensors']:,} tensor{'s' * (result['tensors'] > 1)}"
    about = result["machine"]
    title = (
        f"One step of {result['optimizer']}, {result['parameters']:,} parameters in {tensors}, "
        f"threads: {about['threads']}, {about['kernels']}"
    )
    print_table(screen, title, TIMES, {line["name"]: line for line in result["rows"]})
    for name, reason in result["failed"].items():
        say(screen, f"not measured: {name}: {reason}", "yellow")
    for name, more in result["per_dtensor"].items():
        each = f", {fixed(more['us'], 1)} us more for each DTensor" if result["ranks"] == 1 else ""
        say(screen, f"{name}, sharded over {result['ranks']}: {fixed(more['times'], 2)} times as long{each}")
    if result["orthogonalisation"]:
        parts = ", ".join(f"{name} {percent(share)}" for name, share in result["orthogonalisation"].items())
        say(screen, f"Of a step's time the orthogonalisation takes: {parts}")
    spreads = [line["spread"] for line in result["rows"]]
    load = "" if result["load_before"] is None else f"; load before: {fixed(result['load_before'], 2)}"
    say(
        screen,
        f"Medians of {result['rounds']} interleaved rounds. Noise: the middle half of a row's timings spans "
        f"{percent(median(spreads))} of its median (worst row {percent(max(spreads))}){load}.",
    )
