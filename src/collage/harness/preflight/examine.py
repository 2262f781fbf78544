"""What a step of a given size cannot move in a model's weights, before any training: counted by kind of layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from collage.advice.counting import Tally, count, one_thread
from collage.harness.tasks.weights import KINDS, kind_of, read


@dataclass(slots=True)
class Preflight:
    """What `examine` found."""

    model: Path
    lr: float
    weight_decay: float
    kinds: dict[str, Tally] = field(default_factory=dict)  # only those that occur, in the order of KINDS
    skipped_tensors: int = 0
    skipped_values: int = 0
    not_finite: int = 0

    @property
    def total(self) -> Tally:
        return sum(self.kinds.values(), Tally())


def examine(model: Path, lr: float, weight_decay: float = 0.0) -> Preflight:
    """Read a model tensor by tensor and count what a step of lr cannot move in each format that holds weights.

    Raises:
        FileNotFoundError: no such model. ValueError: no model, nothing to train in it, or a senseless lr or decay.
    """
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"--lr: must be a positive number, got {lr:g}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"--weight-decay: must be zero or positive, got {weight_decay:g}")
    found = Preflight(model, lr, weight_decay)
    tallies = {kind: Tally() for kind in KINDS}
    with one_thread():
        for name, numel, tensor in read(model):
            if tensor is None:
                found.skipped_tensors += 1
                found.skipped_values += numel
            else:
                kind = kind_of(name)
                found.not_finite += count(tensor, tallies[kind], lr, lr * weight_decay, kind == "norm")
    found.kinds = {kind: tally for kind, tally in tallies.items() if tally.weights}
    if not found.kinds:
        raise ValueError(f"{model}: no floating-point weights in it ({found.skipped_tensors} other tensors)")
    return found
