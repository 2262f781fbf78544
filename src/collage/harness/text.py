"""Numbers as people read them, one way for the terminal, the page and the plots. What was not measured is a dash."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collage.monitor.quality import jsonable
from collage.numerals import MISSING, fixed, listed, percent, scientific, short

__all__ = [
    "MISSING",
    "Column",
    "fixed",
    "listed",
    "number",
    "percent",
    "present",
    "scientific",
    "short",
    "size",
    "to_json",
]


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def hundredths(share: float | None, sign: str = "") -> str:
    """A share in percent, to the second digit after the point: one example of some hundreds shows.

    >>> hundredths(0.97222), hundredths(-0.00278, "+")
    ('97.22', '−0.28')
    """
    return fixed(None if share is None else 100 * share, 2, sign)


def size(count: float | None) -> str:
    """Bytes, in MiB or GiB.

    >>> size(3 * 2**20), size(1.5 * 2**30)
    ('3 MiB', '1.50 GiB')
    """
    if count is None:
        return MISSING
    return f"{fixed(count / 2**20, 0)} MiB" if count < 2**30 else f"{fixed(count / 2**30, 2)} GiB"


def duration(seconds: float) -> str:
    """As people say it.

    >>> duration(4.2), duration(89), duration(372), duration(9000)
    ('4 s', '89 s', '6 min', '2 h 30 min')
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text; a number that is not finite becomes null."""
    return json.dumps(jsonable(value), indent=indent, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Column:
    """One column of a table, wherever it is shown.

    Args:
        key: of the number in a row.
        heading: above it.
        unit: what stands smaller beneath the heading.
        text: how the number is shown; see `cell` for one that was not measured.
        spread: key of what stands behind ±.
        optional: left out where no row has it.
    """

    key: str
    heading: str
    unit: str
    text: Callable[[float | None], str]
    spread: str = ""
    optional: bool = False

    def cell(self, row: Mapping[str, Any]) -> str:
        """A row's number, a dash if it was not measured; words stand for themselves."""
        if isinstance(row.get(self.key), str):
            return str(row[self.key])
        noise = number(row.get(self.spread))
        return self.text(number(row.get(self.key))) + ("" if noise is None else f" ± {self.text(noise).lstrip('+')}")


def present(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Those that these rows fill."""
    return [c for c in columns if not c.optional or any(number(row.get(c.key)) is not None for row in rows)]
