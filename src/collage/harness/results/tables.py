"""The tables of the page, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from collage.harness.report.results import REFERENCE
from collage.harness.sweep.grid import Cell, Grid
from collage.harness.sweep.losing import DIVERGED, Measure
from collage.harness.text import MISSING, Column, fixed, percent, present, short


def markdown(columns: Sequence[Column], rows: Mapping[str, Mapping[str, Any]], first: str) -> str:
    """A line for each row, under its name."""
    shown = present(columns, list(rows.values()))
    lines = [[first, *(f"{c.heading} {c.unit}".strip() for c in shown)], ["---", *["---:"] * len(shown)]]
    lines += [[name, *(c.cell(row) for c in shown)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_strategies(grid: Grid) -> str:
    """Of a study without an axis: what each strategy came to, and how far from the reference."""
    (cells,) = grid.cells.values()
    rows = {name: _row(cells[name], grid.measures, name == REFERENCE) for name in grid.strategies}
    columns = [column for measure in grid.measures for column in _columns(measure)]
    return markdown([*columns, *_COMMON], rows, "strategy")


_COMMON = (
    Column("edq_ratio", "EDQ ratio", "", partial(fixed, digits=4)),
    Column("lost", "updates lost", "", percent),
    Column("bytes_per_param", "bytes per parameter", "", short),
)


def _columns(measure: Measure) -> list[Column]:
    key = measure.key
    return [
        Column(key, measure.name, "", measure.text, f"{key} spread"),
        Column(f"{key} difference", "difference", f"to {REFERENCE}", partial(measure.text, sign="+"), f"{key} noise"),
        Column(f"{key} interval", "95 % interval", "", measure.text),
        Column(f"{key} p", "p", "", probability),
    ]


def _row(cell: Cell, measures: Sequence[Measure], is_reference: bool) -> dict[str, Any]:
    row: dict[str, Any] = {key: cell.means[key] for key in ("edq_ratio", "lost", "bytes_per_param")}
    for measure in measures:
        key, found = measure.key, cell.differences[measure.key]
        row |= {key: cell.means[key], f"{key} spread": cell.spreads[key]}
        if cell.state == DIVERGED:
            row[key] = DIVERGED
        elif not is_reference:
            row |= {f"{key} difference": found.mean, f"{key} noise": found.spread, f"{key} p": found.p}
            row[f"{key} interval"] = _interval(measure, found.mean, found.within)
    return row


def _interval(measure: Measure, mean: float | None, within: float | None) -> str:
    if mean is None or within is None:
        return MISSING
    return f"{measure.text(mean - within, sign='+')} … {measure.text(mean + within, sign='+')}"


def probability(p: float | None) -> str:
    """Of chance; none so small that three digits cannot say it.

    >>> probability(0.5), probability(0.0123), probability(1e-7)
    ('0.50', '0.012', '<0.001')
    """
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else fixed(p, 2 if p >= 0.1 else 3)


def along_an_axis(grid: Grid) -> str:
    """Strategies down, values across: the difference to the reference by the first measure, and the EDQ ratio."""
    measure = grid.measures[0]
    columns = [Column(f"{value}", f"{grid.axis} {short(value, 6)}", "", short) for value in grid.cells]
    rows = {
        name: {f"{value}": _told(cells[name], measure, name == REFERENCE) for value, cells in grid.cells.items()}
        for name in grid.strategies
    }
    return markdown(columns, rows, "strategy")


def _told(cell: Cell, measure: Measure, is_reference: bool) -> str:
    """One cell: the reference's own mean, another's difference to it, with the EDQ ratio."""
    if cell.state == DIVERGED:
        return DIVERGED
    found = cell.differences[measure.key]
    mean, spread, sign = (cell.means[measure.key], cell.spreads[measure.key], "") if is_reference else (
        found.mean, found.spread, "+")  # fmt: skip
    noise = "" if spread is None else f" ± {measure.text(spread)}"
    return f"{measure.text(mean, sign=sign)}{noise} (EDQ {fixed(cell.means['edq_ratio'], 3)})"
