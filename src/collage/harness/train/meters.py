"""What a run is measured by besides its loss: bytes, milliseconds, tokens, and the sizes of its updates."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from collage.backends import Batch, Row
from collage.formats import format_of
from collage.monitor import Monitor
from collage.monitor.following import intended
from collage.monitor.sampling import Sampling, in_rows
from collage.monitor.shadow import Stepping, followed
from collage.optimizers.base import PrecisionOptimizer
from collage.rules.assign import ASSIGN


def bytes_by_slot(optimizer: PrecisionOptimizer) -> dict[str, int]:
    """Bytes of the live tensors: "gradient", "param", and every plane of the state under its key.

    What is one number for a whole tensor, as the step counter is, is left out.
    """
    result = {"gradient": 0, "param": 0}
    for parameter in optimizer.parameters():
        result["param"] += parameter.tensor.nbytes
        result["gradient"] += 0 if parameter.tensor.grad is None else parameter.tensor.grad.nbytes
    for state in optimizer.state_dict()["state"].values():
        for key, value in state.items():
            held = _held(value)
            if held:
                result[key] = result.get(key, 0) + held
    return result


def _held(value: Any) -> int:
    """Bytes of the tensors in a state's value, which other packages' optimizers keep in lists, too."""
    if isinstance(value, Tensor):
        return value.nbytes if value.dim() else 0
    return sum(map(_held, value)) if isinstance(value, list | tuple) else 0


class PeakMemory:
    """The largest memory in use since creation: of the GPU's allocator, or else of this process.

    Where the system keeps no resettable high-water mark, that of the process since its start.
    """

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def device_bytes(self) -> int | None:
        """Peak of torch's allocator on the GPU; None on a CPU."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

    def rss_bytes(self) -> int:
        """Peak resident set of the whole process: Python, libraries, activations and all."""
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            unit = 1 if sys.platform == "darwin" else 1024
            return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Timed(NamedTuple):
    """Seconds of one step, without the monitor's own."""

    optimizer: float
    whole: float  # forward, backward, clipping, optimizer


class StepMeter(TrainerCallback):
    """Times the steps that are not monitored, and weighs the live tensors once, while the gradients are there.

    A first step that a GradScaler skips makes no state: then they are weighed again.
    """

    def __init__(self, optimizer: PrecisionOptimizer) -> None:
        self.bytes: dict[str, int] = {}
        self.steps: list[Timed] = []
        self._optimizer = optimizer
        self._began = self._before = self._optimizer_seconds = self._monitoring = 0.0
        self._plain = self._stated = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._plain = not any(monitor.due for monitor in self._optimizer.monitors)
        self._monitoring = self._monitored()
        _synchronize()
        self._before = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _synchronize()
        self._optimizer_seconds = time.perf_counter() - self._before
        stated = bool(self._optimizer.state)
        if not self.bytes or stated > self._stated:
            self.bytes, self._stated = bytes_by_slot(self._optimizer), stated

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        whole = time.perf_counter() - self._began
        monitoring = self._monitored() - self._monitoring
        if self._plain:
            self.steps.append(Timed(self._optimizer_seconds - monitoring, whole - monitoring))

    def _monitored(self) -> float:
        """Seconds that the monitors have taken so far: a shadow follows every step."""
        return sum(monitor.seconds for monitor in self._optimizer.monitors)

    @property
    def optimizer_ms(self) -> float | None:
        """Median milliseconds of the optimizer's step."""
        return 1e3 * median(step.optimizer for step in self.steps) if self.steps else None

    def tokens_per_second(self, tokens_per_step: int) -> float | None:
        """Of the median step, so without evaluation, checkpoints, monitoring and waiting."""
        return tokens_per_step / median(step.whole for step in self.steps) if self.steps else None


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class UpdateSizes(Monitor):
    """A histogram of log2(|Delta| / ulp(theta)), Delta the update that the rule intends, ulp that of bf16.

    Over one weight in `stride`, at every `every`-th step of the optimizer. Of rules that make a weight's update of
    its own numbers alone; a wrapped optimizer's is made elsewhere.
    """

    EDGES = tuple(k / 2 for k in range(-60, 21))

    def __init__(self, optimizer: PrecisionOptimizer, every: int = 10, stride: int = 61) -> None:
        super().__init__(every, lambda: None, lambda: optimizer.param_groups)
        self.counts = torch.zeros(len(self.EDGES) - 1, dtype=torch.int64)
        self._stride = stride
        optimizer.monitors.append(self)

    @property
    def due(self) -> bool:
        """Never: it needs none of the step's sums."""
        return False

    def before(self, stepping: Sequence[Stepping], changed: Mapping[str, int]) -> None:
        if (self._coming[0] + 1) % self.every == 0:
            for parameters, batch in (own for own in followed(stepping) if own[1].rule.name != ASSIGN.name):
                for k, (parameter, row) in enumerate(zip(parameters, batch.rows(), strict=True)):
                    self._count(batch.take([k]), row, Sampling(parameter.tensor, self._stride))

    def _count(self, batch: Batch, row: Row, sampling: Sampling) -> None:
        slots = [
            in_rows(fmt, [sampling.take(plane, of.per) for plane, of in zip(planes, fmt.planes, strict=True)])
            for planes, fmt in zip(row.slots, batch.layouts, strict=True)
        ]
        delta = intended(batch, slots, sampling.take(batch.grads[0]).view(slots[0][0].shape)).double()
        theta = format_of(batch.formats[0]).value(slots[0]).double()
        seen = (theta != 0) & (delta != 0)
        exponent = torch.frexp(theta[seen]).exponent.clamp(min=-125) - 8  # ulp = 2**exponent
        logs = delta[seen].abs().log2() - exponent
        inside = logs.clamp(self.EDGES[0], self.EDGES[-1]).float()
        self.counts += torch.histc(inside.cpu(), len(self.counts), self.EDGES[0], self.EDGES[-1]).long()

    def to_dict(self) -> dict[str, list[float]] | None:
        """None: no update was seen."""
        if not self.counts.any():
            return None
        return {"edges": list(self.EDGES), "counts": self.counts.tolist()}
