"""The update rules, as in rules/*.py. RULES is the table."""

from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

import triton
import triton.language as tl  # noqa: F401

from collage.backends.triton.arithmetic import minus, sqrt
from collage.backends.triton.language import Row

Expansion = tuple[Any, Any]  # a constant of two components


@dataclass(frozen=True, repr=False)
class Rule(Row):
    """update: (slots' numbers, gradient, constants) -> (intended update, or None; new numbers)."""

    update: Any
    constants: type

    @property
    def widths(self) -> tuple[int, ...]:
        """How many components each constant has in a kernel's row."""
        return tuple(2 if hint == Expansion else 1 for hint in get_type_hints(self.constants).values())

    @property
    def columns(self) -> int:
        """Numbers in a kernel's row of constants."""
        return sum(self.widths)


class Adam(NamedTuple):
    beta1: Expansion
    one_minus_beta1: Any
    beta2: Expansion
    one_minus_beta2: Any
    a: Any
    e: Any
    w: Any


@triton.jit
def adamw(slots, g, c):
    """AdamW as in Collage's Algorithm 2."""
    theta, m, v = slots
    m = m.scaled(c.beta1).grown(c.one_minus_beta1 * g)
    v = v.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g))
    delta = minus((c.a * m.value()) / (sqrt(v.value()) + c.e) + c.w * theta.value())
    return delta, (theta.grown(delta), m, v)


RULES = {"adamw": Rule(adamw, Adam)}
