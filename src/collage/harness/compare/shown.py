"""What `collage compare` prints: the table, the floors, the advice."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from collage.harness.console import print_table, say
from collage.harness.report.columns import FLOORS, columns, floorless
from collage.harness.text import short


def print_comparison(screen: Console, summary: dict[str, Any]) -> None:
    """The table, the floors, the advice."""
    title = f"{summary['title']} ({summary['steps']} steps, lr {short(summary['lr'])})"
    print_table(screen, title, columns(summary), {row["strategy"]: row for row in summary["table"]})
    floors = "Floors: increments of a weight at 1.0 up to this size are dropped"
    print_table(screen, floors, FLOORS, summary["floors"], "format")
    without = floorless(summary["strategies"])
    if without:
        say(screen, without)
    say(screen, summary["advice"], "bold")
