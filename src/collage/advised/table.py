"""Advice as text: a line for each strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from collage.advised.words import SAFE
from collage.numerals import MISSING, fixed, percent, short

Row = Mapping[str, Any]


def _share(key: str) -> Callable[[Row], str]:
    return lambda row: percent(None if row[key] is None else round(row[key], 3))


def _fixed(key: str, digits: int) -> Callable[[Row], str]:
    return lambda row: fixed(row[key], digits)


def _short(key: str, digits: int) -> Callable[[Row], str]:
    return lambda row: short(row[key], digits)


def _fits(row: Row) -> str:
    return MISSING if row["fits"] is None else "yes" if row["fits"] else "no"


def _seconds(row: Row) -> str:
    seconds = row["seconds_per_step"]
    if seconds is None:
        return MISSING
    return f"{short(seconds, 2)} s" if seconds >= 0.1 else f"{short(1e3 * seconds, 2)} ms"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("strategy", lambda row: row["strategy"]),
    ("bytes", _short("bytes_per_param", 4)),
    ("GB", _short("gigabytes", 3)),
    ("fits", _fits),
    ("cannot move", lambda row: percent(row["cannot_move"])),
    ("arrives", _share("arrived")),
    ("decay arrives", _share("decay_arrives")),
    ("v", _fixed("v_ratio", 2)),
    ("a step", _seconds),
    ("verdict", lambda row: row["verdict"]),
    ("because", lambda row: "" if row["verdict"] == SAFE else row["because"]),
)
_LEFT = ("strategy", "verdict", "because")


def table(rows: Sequence[Row]) -> str:
    """The rows beneath their headings."""
    columns = [[heading, *(cell(row) for row in rows)] for heading, cell in COLUMNS]
    kept = [column for column in columns if any(text not in (MISSING, "") for text in column[1:])]
    return "\n".join("  ".join(line).rstrip() for line in zip(*map(_padded, kept), strict=True))


def _padded(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    return [text.ljust(width) if column[0] in _LEFT else text.rjust(width) for text in column]
