"""What `collage compare` prints: the table, the floors, the advice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from collage.harness.report.results import percent

DASH = "–"
WIDE = 140  # columns of a terminal


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else format(round(value, 9), form).replace("-", "−")


def _share(value: float | None) -> str:
    return DASH if value is None else percent(value)


def _difference(row: dict[str, Any]) -> str:
    spread = row["difference_spread"]
    return _number(row["difference"], "+.4f").replace("−0.0000", "+0.0000") + (
        "" if spread is None else f" ± {spread:.4f}"
    )


def _megabytes(value: float | None) -> str:
    return DASH if value is None else f"{value / 1e6:.1f} MB"


COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("validation\nloss", lambda row: _number(row["val_loss"], ".4f")),
    ("− fp32-master\n(paired)", _difference),
    ("gain\nkept", lambda row: _share(row["kept"])),
    ("EDQ\nratio", lambda row: _number(row["edq_ratio"], ".4f")),
    ("updates\nlost", lambda row: _share(row["lost"])),
    ("frozen\nparams", lambda row: str(row["frozen"])),
    ("v over\nshadow", lambda row: _number(row["v_ratio"], ".3f")),
    ("bytes per\nparam", lambda row: _number(row["bytes_per_param"], ".1f")),
    ("peak\nmemory", lambda row: _megabytes(row["peak_memory_bytes"])),
    ("optimizer\nms/step", lambda row: _number(row["optimizer_ms"], ".1f")),
    ("tokens/s", lambda row: _number(row["tokens_per_s"], ",.0f")),
)


def print_comparison(screen: Console, summary: dict[str, Any]) -> None:
    """The table, the floors, the advice."""
    title = f"{summary['title']} ({summary['steps']} steps, lr {summary['lr']:g})"
    screen.print(_table(title, summary["table"], wide=screen.width >= WIDE))
    floors = Table(title="Floors: increments of a weight at 1.0 up to this size are dropped", header_style="bold")
    for header in ("format", "away from 0", "towards 0"):
        floors.add_column(header, justify="left" if header == "format" else "right")
    for name, floor in summary["floors"].items():
        floors.add_row(name, _floor(floor["up"]), _floor(floor["down"]))
    screen.print(floors)
    screen.print(summary["advice"], style="bold", highlight=False, soft_wrap=True)


def _table(title: str, rows: list[dict[str, Any]], wide: bool) -> Table:
    """A row for each strategy, or a column where the terminal is too narrow for that."""
    cells = [["", *(heading for heading, _ in COLUMNS)]]
    cells += [[row["strategy"], *(cell(row) for _, cell in COLUMNS)] for row in rows]
    if not wide:
        cells = [[text.replace("\n", " ") for text in line] for line in zip(*cells, strict=True)]
    table = Table(title=title, header_style="bold")
    for k, heading in enumerate(cells[0]):
        table.add_column(heading, justify="right" if k else "left", overflow="fold")
    for line in cells[1:]:
        table.add_row(*line)
    return table


def _floor(value: float) -> str:
    return "none" if value == 0 else f"{value:.1e}"
