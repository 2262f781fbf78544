"""The tables of a comparison: of its strategies, and of the floors, in the terminal and on the page."""

from __future__ import annotations

from functools import partial

from collage.harness.report.results import REFERENCE, ULP_AT_ONE
from collage.harness.text import Column, fixed, percent, scientific, short, size

COLUMNS = (
    Column("val_loss", "Loss", "validation, nats", partial(fixed, digits=4)),
    Column("difference", "Difference", f"to {REFERENCE}", partial(fixed, digits=4, sign="+"), "difference_spread"),
    Column("kept", "Kept", "of its gain", percent),
    Column("edq_ratio", "EDQ", "ratio", partial(fixed, digits=4)),
    Column("lost", "Lost", "updates", percent),
    Column("frozen", "Frozen", "params", partial(fixed, digits=0)),
    Column("v_ratio", "v", "over shadow", partial(fixed, digits=3), optional=True),
    Column("bytes_per_param", "Bytes", "per param", short),
    Column("peak_memory_bytes", "Peak", "memory", size),
    Column("optimizer_ms", "Optimizer", "ms/step", partial(fixed, digits=1)),
    Column("tokens_per_s", "Speed", "tokens/s", partial(fixed, digits=0)),
)

FLOORS = (
    Column("down", "down", "towards 0", scientific),
    Column("up", "up", "away from 0", scientific),
    Column("up", "up", "bf16 ulps of 1.0", lambda up: short(up and up / ULP_AT_ONE, 2)),
)
