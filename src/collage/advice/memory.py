"""What an optimizer keeps for a model, and what its step moves: bytes, counted from shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from collage.formats import Master, format_of
from collage.optimizers.planes import nbytes
from collage.rules import Rule
from collage.strategies import Strategy

UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
COUNTER = 8  # bytes of a step counter; every parameter has one

Shape = tuple[int, ...]


def share(shape: Sequence[int], ranks: int) -> Shape:
    """The shape of what the first of so many ranks, which has most, holds of a parameter under FSDP2.

    >>> share((50257, 768), 4)
    (12565, 768)
    """
    return (-(-shape[0] // ranks), *shape[1:]) if shape else ()


def state_bytes(rule: Rule, strategy: Strategy, shapes: Sequence[Shape], ranks: int = 1) -> int:
    """Bytes of an optimizer's state for parameters of these shapes, on the first of so many ranks."""
    total = 0
    for shape in shapes:
        own, part = strategy.of(shape), share(shape, ranks)
        total += nbytes(rule, own, part) - own.dtype.itemsize * torch.Size(part).numel() + COUNTER
    return total


def planes_bytes(rule: Rule, strategy: Strategy, shapes: Sequence[Shape], ranks: int = 1) -> int:
    """Bytes of all planes, weights among them, likewise."""
    return sum(nbytes(rule, strategy.of(shape), share(shape, ranks)) for shape in shapes)


def total_bytes(rule: Rule, strategy: Strategy, shapes: Sequence[Shape], ranks: int = 1) -> int:
    """Bytes of weights, gradients (in the weights' dtype, of 8-bit ones 2) and state, on the first of so many ranks."""
    each = strategy.dtype.itemsize + strategy.beside.dtype.itemsize
    return each * sum(math.prod(share(shape, ranks)) for shape in shapes) + state_bytes(rule, strategy, shapes, ranks)


def moved_bytes(strategy: Strategy, planes: int, count: int) -> int:
    """Bytes that a step reads and writes, of `count` parameters whose planes take so many.

    Planes are read and written, gradients read; of a master's 16-bit copy it only writes.
    """
    unread = 2 * count if isinstance(format_of(strategy.param), Master) else 0
    return 2 * planes - unread + strategy.beside.dtype.itemsize * count


def amount(size: float | str) -> int:
    """Bytes of a number of them, or of a text: 24GB is 24 * 10**9, 24GiB 24 * 2**30.

    Raises:
        ValueError: another text, or nothing above 0.
    """
    text = f"{size}B" if isinstance(size, int | float) else size
    unit = next((unit for unit in UNITS if text.upper().endswith(unit)), "")
    try:
        number = float(text[: len(text) - len(unit)])
    except ValueError:
        number = 0.0
    if not unit or not 0 < number < math.inf:
        raise ValueError(f"memory: needs a size such as 24GB, 22.5GiB or 80GB, got {size!r}")
    return int(number * UNITS[unit])
