"""Which strategy to take of the rows of an advice, and the sentence that says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from collage.advised.words import LOSES, SAFE, UNKNOWN
from collage.numerals import listed, percent

Row = Mapping[str, Any]


def chosen(rows: Sequence[Row]) -> tuple[str | None, str]:
    """The cheapest of those that are safe and fit, or None; and the sentence."""
    safe = [row for row in rows if row["verdict"] == SAFE]
    fit = [row for row in safe if row["fits"] is not False]
    if not fit:
        return None, _nothing_fits(safe) if safe else _nothing_is_safe(rows)
    best = min(fit, key=lambda row: (row["bytes_per_param"], row["seconds_per_step"]))
    arrives = f"{percent(best['arrived'])} of float32's movement arrives"
    told = f"{arrives} at {best['bytes_per_param']:.4g} bytes per parameter{_cited(best)}"
    return best["strategy"], f"Take {best['strategy']}: {told}{_unlike(best, rows)}."


def _cited(row: Row) -> str:
    return f" ({row['evidence']})" if row["evidence"] else ""


def _unlike(best: Row, rows: Sequence[Row]) -> str:
    """What the first of those that are about as cheap loses."""
    near = [row for row in rows if row["bytes_per_param"] <= best["bytes_per_param"] + 1]
    worse = next((row for row in near if row["verdict"] == LOSES), None)
    return f"; under {worse['strategy']} {worse['because']}{_cited(worse)}" if worse else ""


def _nothing_fits(safe: Sequence[Row]) -> str:
    least = min(safe, key=lambda row: row["gigabytes"])
    return (
        f"No safe strategy fits: {least['strategy']}, the smallest, needs {least['gigabytes']:.3g} GB; shard over more "
        "ranks, release gradients (collage.release_gradients), or take a smaller model."
    )


def _nothing_is_safe(rows: Sequence[Row]) -> str:
    doubtful = [row["strategy"] for row in rows if row["verdict"] == UNKNOWN]
    if doubtful:
        return f"None of these strategies is surely safe: run {listed(doubtful)} beside fp32-master (collage compare)."
    return "None of these strategies is safe: add others, such as collage-plus-sr or fp32-master."
