"""theta becomes a number that is given, as a wrapped optimizer made it in float32: nothing is scaled, nothing grows."""

from __future__ import annotations

from torch import Tensor

from collage.accumulators import Accumulator, Register
from collage.rules.accumulate import Constants, fold
from collage.rules.rule import Advance, Rule, Setting, Slot


def update(slots: tuple[Accumulator, ...], g: Tensor, c: Constants) -> Advance:
    """g: the new number, which is taken `weight` times. What is intended is its difference to the old one."""
    new = c.weight * g
    return Advance((Register(new),), new - slots[0].value)


ASSIGN = Rule("assign", (Slot("param", "param"),), (Setting("weight"),), update, fold, 1)
