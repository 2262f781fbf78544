"""Real steps of one model under one strategy, in a process of their own: `python -m collage.harness.plan.trial`.

Reads the fields of a `Trial` as a JSON object from standard input, and writes those of a `Measured`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

import collage
from collage.harness.bench.contestants import KINDS
from collage.harness.bench.measure import wait
from collage.harness.plan.models import find
from collage.harness.plan.simulation import loss_of
from collage.harness.train.meters import PeakMemory
from collage.strategies import Strategy

LR = 1e-5


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What to run, for so many steps. The states are there before the first."""

    model: str
    optimizer: str
    strategy: str
    released: bool
    sequences: int
    length: int
    compute: str
    steps: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes: of the peak, beyond what the process held before there was a model, and of live tensors. Seconds: medians.

    seconds: of a whole step; optimizer_seconds: of its `opt.step()`; cpu_seconds: of all threads together, which a busy
    machine does not lengthen.
    """

    peak: int
    weights: int
    states: int
    seconds: float
    optimizer_seconds: float
    cpu_seconds: float
    loss: float


class _Timed(NamedTuple):
    whole: float
    optimizer: float
    cpu: float


class _Run:
    """A model with its optimizer, on random tokens."""

    def __init__(self, trial: Trial, model: str, sequences: int, length: int, device: str) -> None:
        self.compute: torch.dtype = getattr(torch, trial.compute)
        strategy = Strategy.parse(trial.strategy)
        self.model = find(model).build(device, strategy.dtype)
        self.optimizer = KINDS[trial.optimizer].make(self.model.named_parameters(), LR, strategy)
        if trial.released:
            collage.release_gradients(self.model, self.optimizer)
        for parameter in self.optimizer.parameters():
            self.optimizer.planes(parameter)
        words = next(iter(self.model.parameters())).shape[0]
        self.ids = torch.randint(0, words, (sequences, length), device=device)
        self.loss = 0.0

    def step(self) -> _Timed:
        start, cpu = time.perf_counter(), time.process_time()
        loss = loss_of(self.model, self.ids, self.compute)
        self.loss = float(loss.detach())
        loss.backward()  # type: ignore[no-untyped-call]
        wait()
        middle = time.perf_counter()
        self.optimizer.step()
        wait()
        end = time.perf_counter()
        self.optimizer.zero_grad()
        return _Timed(end - start, end - middle, time.process_time() - cpu)


def run(trial: Trial) -> Measured:
    """Train a few steps, after one of a tiny model, which brings the code into memory."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _Run(trial, "tiny-gpt", 1, 8, device).step()
    before = PeakMemory().rss_bytes()
    own = _Run(trial, trial.model, trial.sequences, trial.length, device)
    memory = PeakMemory()
    times = [own.step() for _ in range(trial.steps)]
    return Measured(
        peak=memory.device_bytes() or memory.rss_bytes() - before,
        weights=_bytes([*own.model.parameters(), *own.model.buffers()]),
        states=_bytes([x for state in own.optimizer.state.values() for x in state.values()]),
        seconds=median(timed.whole for timed in times),
        optimizer_seconds=median(timed.optimizer for timed in times),
        cpu_seconds=median(timed.cpu for timed in times),
        loss=own.loss,
    )


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


if __name__ == "__main__":
    json.dump(asdict(run(Trial(**json.load(sys.stdin)))), sys.stdout)
