"""Update rules: what an optimizer intends, written once over the verbs of a number. RULES is the table."""

from __future__ import annotations

from collage.rules.accumulate import ACCUMULATE
from collage.rules.adam import ADAM, ADAM_AMSGRAD
from collage.rules.adamw import ADAMW, ADAMW_AMSGRAD
from collage.rules.apply import APPLY
from collage.rules.assign import ASSIGN
from collage.rules.average import AVERAGE
from collage.rules.lion import LION
from collage.rules.momentum import MOMENTUM, MOMENTUM_NESTEROV
from collage.rules.muon import MUON
from collage.rules.rule import Advance, Rule, Setting, Slot
from collage.rules.sgd import SGD, SGD_MOMENTUM, SGD_NESTEROV

__all__ = ["RULES", "Advance", "Rule", "Setting", "Slot"]

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        *(ADAMW, ADAMW_AMSGRAD, ADAM, ADAM_AMSGRAD, SGD, SGD_MOMENTUM, SGD_NESTEROV, LION, MUON),
        *(AVERAGE, ACCUMULATE, MOMENTUM, MOMENTUM_NESTEROV, APPLY, ASSIGN),
    )
}
