"""Predictions beside what real steps on this machine take, each measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import torch

from collage.harness.plan.predict import Prediction
from collage.harness.plan.simulation import Work
from collage.harness.plan.trial import Measured, Trial
from collage.harness.text import size

# glibc keeps what is freed for itself, up to 32 MiB a block, so that the process holds more than is in use. For the
# peak that is told to return it; for the time it is left alone, because to return memory and take it again takes time.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
PROCESS = 1 << 30  # bytes: Python, torch and room for what the allocator keeps


@dataclass(frozen=True)
class Beside:
    """What was measured for a prediction. `lax`: its time, and the peak with the allocator as it is."""

    prediction: Prediction
    strict: Measured | None
    lax: Measured | None
    why: str = ""  # nothing was measured


def measure(model: str, optimizer: str, prediction: Prediction, work: Work, steps: int) -> Beside:
    """Run what was predicted, if it fits into the memory that is free."""
    free = available()
    if free is not None and prediction.peak + PROCESS > free:
        needed = f"{size(prediction.peak)} and {size(PROCESS)} for Python and torch"
        return Beside(prediction, None, None, f"needs {needed}; {size(free)} are free")
    trial = Trial(
        model=model, optimizer=optimizer, strategy=prediction.strategy, released=prediction.released,
        sequences=work.sequences, length=work.length, compute=str(work.compute).removeprefix("torch."), steps=steps,
    )  # fmt: skip
    strict = _run(replace(trial, steps=1), RETURNING)
    lax = _run(trial, {}) if isinstance(strict, Measured) else strict
    if isinstance(strict, Measured) and isinstance(lax, Measured):
        return Beside(prediction, strict, lax)
    return Beside(prediction, None, None, str(lax))


def available() -> int | None:
    """Bytes that are free, of the GPU's memory or the machine's; None: nobody knows."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _run(trial: Trial, settings: dict[str, str]) -> Measured | str:
    """What a process of its own measured, or why it ended without."""
    done = subprocess.run(
        [sys.executable, "-m", "collage.harness.plan.trial"], input=json.dumps(asdict(trial)), capture_output=True,
        text=True, check=False, env={**os.environ, **settings},
    )  # fmt: skip
    if done.returncode == 0:
        return Measured(**json.loads(done.stdout))
    if done.returncode == -9:
        return "its process was killed, as the system does when memory runs out"
    return (done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"])[-1]
