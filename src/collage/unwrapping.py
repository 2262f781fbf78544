"""The optimizer inside the wrappers of others."""

from __future__ import annotations

from typing import Any, TypeVar

_WITHIN = ("optimizer", "_optimizer", "optim")  # where wrappers keep theirs: Accelerate, Lightning, ZeRO
T = TypeVar("T")


def unwrapped(optimizer: Any, kind: type[T]) -> T:
    """The optimizer of this kind inside the wrappers of Accelerate, Lightning, Fabric, ZeroRedundancyOptimizer, ...

    The innermost one: a wrapper may pass for what it wraps, by attributes or by class, and keep what is set on it.

    Raises:
        TypeError: there is none, only an optimizer of somewhere else.
    """
    found: T | None = None
    inner = optimizer
    for _ in range(8):  # wrappers of wrappers; a bound, as one might name itself
        if isinstance(inner, kind):
            found = inner
        within = [x for name in _WITHIN if hasattr(x := getattr(inner, name, None), "param_groups")]
        if not within or not hasattr(inner, "param_groups"):  # a scheduler has an optimizer and is none
            break
        inner = within[0]
    if found is None:
        theirs = f"{type(inner).__module__}.{type(inner).__name__}"
        raise TypeError(f"optimizer: needs one of this package, such as collage.AdamW, got {theirs}")
    return found
