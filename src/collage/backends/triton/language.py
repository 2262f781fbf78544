"""What Triton's compiler and its interpreter do not have in common, and what ties a compiled kernel to its sources."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from typing import Any, TypeVar

import triton.language as tl

from collage.backends import interpreted

INTERPRETED = interpreted()  # jit, too, decides when a function is defined
_C = TypeVar("_C", bound=type)


def aggregate(cls: _C) -> _C:
    """A class whose fields are tensors, tuples, aggregates or constexprs, and whose methods are jit functions.

    For the compiler it is Triton's own aggregate, for the interpreter a Python class: there jit functions do not bind.
    """
    kinds = dict(cls.__annotations__)

    def fill(self: Any, *values: Any) -> None:
        for (name, kind), value in zip(kinds.items(), values, strict=True):
            setattr(self, name, tl.constexpr(value) if kind is tl.constexpr and not INTERPRETED else value)

    fill.__triton_builtin__ = True  # type: ignore[attr-defined]  # not a function that Triton need hash
    cls.__init__ = fill
    if not INTERPRETED:
        return tl.core._aggregate(cls)  # type: ignore[no-any-return]
    for name, method in list(vars(cls).items()):
        if hasattr(method, "rewrite"):
            setattr(cls, name, _method(method))
    return cls


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: function(self, *args)


def static(row: Any) -> Any:
    """A row inside another one or a tuple. The compiler wants a constexpr; the interpreter's have no attributes."""
    return row if INTERPRETED else tl.constexpr(row)


class Row:
    """Base of what kernels take as constants: a frozen dataclass of functions, numbers and other rows.

    Triton names compiled kernels by the text of their constants. So the text holds the hash of every function's source:
    an edited one is compiled anew.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._digest}"

    def __deepcopy__(self, memo: Any) -> Row:
        return self  # Triton compares copies of globals with the globals, and functions have no copies

    @cached_property
    def _digest(self) -> str:
        text = ", ".join(_text(getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    return str(getattr(value, "cache_key", None) or value)
