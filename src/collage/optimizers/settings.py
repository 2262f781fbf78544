"""Settings of a group that are no numbers of a rule, and those of torch's optimizers that are not kept here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def checked_seed(seed: Any) -> int:
    """A seed as Python's int. Raises ValueError."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= int(seed) < 2**64:
        raise ValueError(f"seed: needs an integer in [0, 2**64), got {seed!r}")
    return int(seed)


def known_settings(who: str, settings: Mapping[str, Any], known: Collection[str]) -> Mapping[str, Any]:
    """The settings. Raises TypeError for one that is not known."""
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise TypeError(f"{who}: cannot take {', '.join(unknown)}; it is unknown")
    return settings


def without_foreign(settings: Mapping[str, Any], who: str, foreign: Sequence[str]) -> dict[str, Any]:
    """The settings, without those of torch that are switched off, as frameworks pass them. Raises TypeError if on."""
    on = sorted(key for key in foreign if settings.get(key))
    if on:
        shown = ", ".join(f"{key}=True" for key in on)
        raise TypeError(f"{who}: cannot take {shown}; drop it: the step is one pass of its own")
    return {key: value for key, value in settings.items() if key not in foreign}
