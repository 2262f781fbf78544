"""Warnings that point at the caller's line: the first one outside this package and torch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import cache


def warn(text: str) -> None:
    """Warn where the user's own code is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("collage", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, RuntimeWarning, stacklevel=level)


@cache
def warn_once(text: str) -> None:
    """The same, once for each text."""
    warn(text)


def several(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are.

    >>> several(["w"]), several(["w", "x", "y"])
    ("'w'", "'w' and 2 more")
    """
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if names[1:] else "")
