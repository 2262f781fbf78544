"""What `collage sweep` prints: strategies down, values across."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console

from collage.harness import console
from collage.harness.report.results import REFERENCE
from collage.harness.sweep.grid import Cell, Grid
from collage.harness.sweep.losing import DIVERGED, Measure
from collage.harness.text import Column, fixed, short

Shown = Callable[[Cell], tuple[Any, float | None]]  # what stands in a cell, and behind ±


def print_grid(screen: Console, grid: Grid) -> None:
    """A table for each measure, one of EDQ ratios, and where each strategy loses."""
    for measure in grid.measures:
        title = f"{measure.title} minus {REFERENCE}'s, on the same seed: mean ± spread over seeds"
        _print(screen, title, grid, partial(measure.text, sign="+"), partial(_difference, measure=measure))
    _print(screen, "EDQ ratio: the share of the update that arrived", grid, partial(fixed, digits=4), _edq)
    for line in grid.sentences():
        console.say(screen, line, "bold")


def _print(screen: Console, title: str, grid: Grid, text: Callable[[float | None], str], shown: Shown) -> None:
    columns = [Column(f"{v}", f"{grid.axis} {short(v, 6)}", "", text, f"± {v}") for v in grid.cells]
    console.print_table(screen, title, columns, {name: _row(grid, name, shown) for name in grid.strategies}, "strategy")


def _row(grid: Grid, strategy: str, shown: Shown) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for value, cells in grid.cells.items():
        row[f"{value}"], row[f"± {value}"] = shown(cells[strategy])
    return row


def _difference(cell: Cell, measure: Measure) -> tuple[Any, float | None]:
    found = cell.differences[measure.key]
    return (DIVERGED, None) if cell.state == DIVERGED else (found.mean, found.spread)


def _edq(cell: Cell) -> tuple[Any, float | None]:
    return cell.means["edq_ratio"], None
