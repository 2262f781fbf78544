"""Which strategy to take of the rows of an advice, and the sentence that says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from collage.advised.words import LOSES, SAFE, UNKNOWN
from collage.numerals import percent

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
    """Of those that are no dearer, or little: what the first loses, or why the nearest to float32 is in doubt."""
    near = [row for row in rows if row["bytes_per_param"] <= best["bytes_per_param"] + 1]
    worse = next((row for row in near if row["verdict"] == LOSES), None)
    if worse:
        return f"; under {worse['strategy']} {worse['because']}{_cited(worse)}"
    doubtful = _nearest(near)
    return f"; {doubtful['strategy']} is in doubt: {doubtful['because']}" if doubtful else ""


def _nearest(rows: Sequence[Row]) -> Row | None:
    """The one in doubt that is nearest to float32, to a percent, the cheapest of several."""
    known = [row for row in rows if row["verdict"] == UNKNOWN and row["arrived"] is not None]
    return min(known, key=lambda row: (round(abs(row["arrived"] - 1), 2), row["bytes_per_param"]), default=None)


def _nothing_fits(safe: Sequence[Row]) -> str:
    least = min(safe, key=lambda row: row["gigabytes"])
    return (
        f"No safe strategy fits: {least['strategy']}, the smallest, needs {least['gigabytes']:.3g} GB; shard over more "
        "ranks, release gradients (collage.release_gradients), or take a smaller model."
    )


def _nothing_is_safe(rows: Sequence[Row]) -> str:
    nearest, doubtful = _nearest(rows), [row for row in rows if row["verdict"] == UNKNOWN]
    if nearest is None and doubtful:
        return f"None of these strategies can be judged: {doubtful[0]['because']}."
    if nearest is None:
        return "None of these strategies is safe: add others, such as collage-plus or fp32-master."
    return (
        f"None of these strategies is surely safe; {nearest['strategy']} is nearest to float32, but "
        f"{nearest['because']}: run it beside fp32-master (collage compare)."
    )
