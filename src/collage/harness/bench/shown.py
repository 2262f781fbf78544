"""What `collage bench` prints: the plan, or the table of its timings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from collage.harness.bench.rows import Row


def show_plan(lines: Sequence[Row], numel: int, args: argparse.Namespace) -> int:
    """What would be measured, and below which time no step can be."""
    screen, bandwidth = Console(width=max(100, Console().width)), args.bandwidth or 2000.0
    table = Table(
        header_style="bold", box=SIMPLE, title=f"One step of AdamW, {numel:,} parameters, {args.device}: a plan"
    )
    table.add_column("")
    for header in ("bytes moved\nper parameter", "GB\nper step", f"floor in ms\nat {bandwidth:g} GB/s"):
        table.add_column(header, justify="right")
    for row in (row for row in lines if not row.name.startswith("limit")):
        total = row.moved * numel / 1e9
        table.add_row(row.name, f"{row.moved:g}", f"{total:.2f}", f"{total / bandwidth * 1e3:.3f}")
    screen.print(table)
    screen.print(
        f"Nothing was measured. Without --plan: {args.rounds} interleaved rounds of these rows, their medians, and how "
        f"much of the intended update arrived (EDQ), into {args.out}.", highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def show(result: dict[str, Any], screen: Console) -> None:
    """The table, and how noisy it is."""
    tensors = f"{result['tensors']:,} tensor{'s' * (result['tensors'] > 1)}"
    about = result["machine"]
    table = Table(
        title=f"One step of AdamW, {result['parameters']:,} parameters in {tensors}, threads: {about['threads']}, "
        f"{about['kernels']}",
        header_style="bold",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    headers = ("ns/\nparam", "±", "bytes\nmoved", "GB/s", "of the\nlimit", "time\n÷ D", "time\n÷ A", "EDQ\nratio")
    table.add_column("", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for line in result["rows"]:
        table.add_row(
            line["name"], f"{line['ns_per_param']:.3f}", f"{line['spread']:.0%}", f"{line['bytes_moved']:g}",
            f"{line['gb_per_s']:.1f}", *(_cell(line[key], form) for key, form in
            (("of_limit", ".0%"), ("to_d", ".2f"), ("to_a", ".2f"), ("edq_ratio", ".3f"))),
        )  # fmt: skip
    screen.print(table)
    for name, reason in result["failed"].items():
        screen.print(f"not measured: {name}: {reason}", style="yellow", highlight=False, soft_wrap=True)
    spreads = [line["spread"] for line in result["rows"]]
    load = "" if result["load_before"] is None else f"; load before: {result['load_before']:.2f}"
    screen.print(
        f"Medians of {result['rounds']} interleaved rounds. Noise: the middle half of a row's timings spans "
        f"{median(spreads):.0%} of its median (worst row {max(spreads):.0%}){load}.",
        highlight=False,
        soft_wrap=True,
    )


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
