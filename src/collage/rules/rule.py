"""What an update rule is: its slots, settings, constants, and the update itself, over the verbs of a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.accumulators import Accumulator


class Advance(NamedTuple):
    """What a rule returns: every slot's new number, and the intended update of theta, if it has one."""

    slots: tuple[Accumulator, ...]
    delta: Tensor | None = None


class Slot(NamedTuple):
    """A number that a rule keeps per element: the prefix of its state keys, and the role that gives its format.

    read, written: False for an output, and for planes that are only looked at.
    """

    prefix: str
    role: str
    read: bool = True
    written: bool = True


class Setting(NamedTuple):
    """A hyper-parameter of a group: a finite number >= least and < below, or so many of them."""

    name: str
    least: float = 0.0
    below: float = math.inf
    numbers: int = 1

    def checked(self, value: Any) -> Any:
        """The value as Python's floats; a tensor stays. Raises TypeError or ValueError, naming the setting."""
        if self.numbers > 1 and not isinstance(value, Iterable):
            raise TypeError(f"{self.name}: needs {self.numbers} numbers, got {value!r}")
        values = tuple(map(self._number, value)) if self.numbers > 1 else (self._number(value),)
        if len(values) != self.numbers or not all(map(self._is_inside, values)):
            some = "a finite number" if self.numbers == 1 else f"{'two' if self.numbers == 2 else self.numbers} numbers"
            bound = f">= {max(self.least, 0):g}" if self.below == math.inf else f"in [{self.least:g}, {self.below:g})"
            raise ValueError(f"{self.name}: needs {some} {bound}, got {value}")
        return values if self.numbers > 1 else values[0]

    def _number(self, x: Any) -> float | Tensor:
        """As Python's float, which a checkpoint can hold, or a tensor."""
        if isinstance(x, Tensor):
            if x.numel() != 1:
                raise ValueError(f"{self.name}: a tensor needs one element, got shape {tuple(x.shape)}")
            return x
        try:
            return float(x)
        except (TypeError, ValueError):
            raise TypeError(f"{self.name}: needs a number, got {x!r:.50} ({type(x).__name__})") from None

    def _is_inside(self, x: float | Tensor) -> bool:
        elsewhere = isinstance(x, Tensor) and x.device.type != "cpu"  # reading it would wait
        return elsewhere or self.least <= float(x) < self.below


@dataclass(frozen=True)
class Rule:
    """A rule is a row: everything that an optimizer, a backend and a monitor have to know of it.

    name: which backends know it by.
    slots: of the numbers it keeps; theta ("param") first where it has one.
    settings: its hyper-parameters but lr, in the order that ``fold`` takes them.
    update: (slots' numbers, gradient, constants) -> Advance.
    fold: (lr, hyper-parameters, step from 1, dtype of the arithmetic) -> constants, a named tuple of floats.
    constants: how many they are in a kernel's row.
    gradient: whether it reads one.
    elementwise: whether an element's step depends on that element alone. A shadow follows no parameter of other rules.
    title: what people call the optimizer of this rule.
    torch: why a group of one of torch's optimizers, whose states have these keys, is not this rule's; "" if it is.
    torch_counts: whether torch's optimizer of this rule has a step counter.
    """

    name: str
    slots: tuple[Slot, ...]
    settings: tuple[Setting, ...]
    update: Callable[[tuple[Accumulator, ...], Tensor, Any], Advance]
    fold: Callable[[float, Sequence[float], int, torch.dtype], Any]
    constants: int
    gradient: bool = True
    elementwise: bool = True
    title: str = ""
    torch: Callable[[Mapping[str, Any], set[str]], str] = lambda group, keys: "torch has no optimizer of this rule"
    torch_counts: bool = True

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(slot.role for slot in self.slots)

    @property
    def prefixes(self) -> tuple[str, ...]:
        return tuple(slot.prefix for slot in self.slots)

    @property
    def has_delta(self) -> bool:
        """Whether it intends an update of theta, which a monitor can measure."""
        return self.slots[0].prefix == "param" and self.slots[0].written

    def slot_of(self, role: str) -> int | None:
        """Position of the first slot of a role: what a shadow compares as "momentum" and as "variance"."""
        return self.roles.index(role) if role in self.roles else None

    def hyper(self, group: Mapping[str, Any]) -> list[Any]:
        """A group's settings but lr, in the order that `fold` takes them."""
        values: list[Any] = []
        for setting in self.settings:
            values += group[setting.name] if setting.numbers > 1 else (group[setting.name],)
        return values
