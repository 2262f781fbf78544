"""The progress bars in the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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


def bar(bars: Progress, label: str, steps: int) -> Callable[[int], None]:
    """A new bar; the returned function is given the number of finished steps."""
    task = bars.add_task(label, total=steps)
    return lambda done: bars.update(task, completed=done)
