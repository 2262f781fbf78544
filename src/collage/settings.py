"""Settings of a group: numbers as Python has them, and those of torch's optimizers that are not kept here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FOREIGN = ("amsgrad", "foreach", "fused", "differentiable")


def number(key: str, x: Any) -> float:
    """A setting as Python's float, which a checkpoint can hold. Raises TypeError, naming it, for what is no number."""
    try:
        return float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{key}: needs a number, got {x!r:.50} ({type(x).__name__})") from None


def without_foreign(settings: Mapping[str, Any], who: str) -> dict[str, Any]:
    """The settings, without those of torch that are switched off, as frameworks pass them. Raises TypeError if on."""
    on = sorted(key for key in FOREIGN if settings.get(key))
    if on:
        shown = ", ".join(f"{key}=True" for key in on)
        raise TypeError(f"{who}: cannot take {shown}; drop it: the step is one pass of its own")
    return {key: value for key, value in settings.items() if key not in FOREIGN}
