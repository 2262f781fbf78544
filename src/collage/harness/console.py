"""What the commands share in the terminal: progress bars, tables, lines that are left as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from collage.harness.text import Column, present

Tick = Callable[[int], None]  # is given how much is done


def progress(screen: Console) -> Progress:
    """One bar per run; on something that is not a terminal, only the finished bars."""
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=screen,
    )


def bar(bars: Progress, label: str, steps: int) -> Tick:
    """A new bar; the returned function is given the number of finished steps."""
    task = bars.add_task(label, total=steps)
    return lambda done: bars.update(task, completed=done)


@contextmanager
def passing_bars(bars: Progress, where: str) -> Iterator[Callable[[str, int], Tick]]:
    """Bars of one run of many, by name and steps: gone once it has ended."""
    tasks: list[TaskID] = []

    def made(name: str, steps: int) -> Tick:
        tasks.append(bars.add_task(f"{name}, {where}", total=steps))
        return lambda done, task=tasks[-1]: bars.update(task, completed=done)  # type: ignore[misc]

    try:
        yield made
    finally:
        for task in tasks:
            bars.remove_task(task)


def say(screen: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is: not coloured by its numbers, not wrapped, brackets and all."""
    screen.print(line, style=style, soft_wrap=True, highlight=False, markup=False)


def print_table(
    screen: Console, title: str, columns: Sequence[Column], rows: Mapping[str, Mapping[str, Any]], first: str = ""
) -> None:
    """A line for each row, under its name; a column for each where the terminal is too narrow for that."""
    shown = present(columns, list(rows.values()))
    lines = [[first, *(f"{c.heading}\n{c.unit}".strip() for c in shown)]]
    lines += [[name, *(c.cell(row) for c in shown)] for name, row in rows.items()]
    table = _table(lines)
    if Measurement.get(screen, screen.options.update(max_width=sys.maxsize), table).maximum > screen.width:
        table = _table([[text.replace("\n", " ") for text in line] for line in zip(*lines, strict=True)])
    say(screen, title, "bold")
    screen.print(table)


def _table(lines: Sequence[Sequence[str]]) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for k, heading in enumerate(lines[0]):
        table.add_column(heading, justify="right" if k else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*line)
    return table
