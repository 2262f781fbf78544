"""The tables of a comparison: of its strategies, and of the floors, in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from collage.formats import format_of
from collage.harness.report.results import REFERENCE, ULP_AT_ONE
from collage.harness.tasks.registry import Loss
from collage.harness.text import Column, fixed, hundredths, percent, scientific, short, size
from collage.strategies import Strategy

_COLUMNS = (
    Column("kept", "Kept", "of its gain", percent),
    Column("edq_ratio", "EDQ", "ratio", partial(fixed, digits=4)),
    Column("lost", "Lost", "updates", percent),
    Column("frozen", "Frozen", "params", partial(fixed, digits=0)),
    Column("v_ratio", "v", "over shadow", partial(fixed, digits=3), optional=True),
    Column("rescaled", "Scales", "moved a step", percent, optional=True),
    Column("mismatch", "Mismatch", "acts, trained", short, optional=True),
    Column("bytes_per_param", "Bytes", "per param", short),
    Column("peak_memory_bytes", "Peak", "memory", size),
    Column("optimizer_ms", "Optimizer", "ms/step", partial(fixed, digits=1)),
)


def columns(summary: Mapping[str, Any]) -> tuple[Column, ...]:
    """Of the strategies' table: the task's loss and score, then what every task has."""
    loss, score = Loss(**summary.get("loss", {})), summary.get("score")
    told = partial(fixed, digits=loss.digits)
    losses = (
        Column("val_loss", "Loss", f"{loss.says}, {loss.unit}", told),
        Column("difference", "Difference", f"to {REFERENCE}", partial(told, sign="+"), "difference_spread"),
    )
    speed = Column("tokens_per_s", "Speed", f"{loss.samples}/s", partial(fixed, digits=0))
    if not score:
        return (*losses, *_COLUMNS, speed)
    shown = hundredths if score["percent"] else partial(fixed, digits=1)
    own = (
        Column("score", score["name"].capitalize(), "at the end", shown),
        Column("score_difference", "Difference", f"of {score['name']}", partial(shown, sign="+"), "score_spread"),
    )
    return (*losses, *own, *_COLUMNS, speed)


FLOORS = (
    Column("down", "down", "towards 0", scientific),
    Column("up", "up", "away from 0", scientific),
    Column("up", "up", "bf16 ulps of 1.0", lambda up: short(up and up / ULP_AT_ONE, 2)),
)


def floorless(strategies: Iterable[str]) -> str:
    """Of which of these strategies there is no row in the table of floors, and why; "": all have one."""
    found = [name for name in strategies if not format_of(Strategy.parse(name).param).elementwise]
    if not found:
        return ""
    return f"No floors of {', '.join(found)}: what e4m3 weights drop depends on the scales of their rows."
