"""The machine a result was measured on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from collage.backends import cpu, fastest, missing

PLAIN = "plain PyTorch"


def machine(compute: torch.dtype, on_gpu: bool | None = None) -> dict[str, str]:
    """Processor, cores, versions, the optimizer's kernels, and the arithmetic of forward and backward."""
    gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    return {
        "cpu": torch.cuda.get_device_name() if gpu else _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": kernels(torch.device("cuda" if gpu else "cpu")),
        "compute": str(compute).removeprefix("torch."),
    }


def kernels(device: torch.device) -> str:
    """What an optimizer's step runs on: "triton", the CPU kernels' instruction set, or PLAIN without any."""
    backend = fastest(device)
    if missing(backend):
        return PLAIN
    return cpu.instruction_set() if backend == "cpu" else backend


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = said.get("model name", platform.machine())
    # A virtual machine may hide the model in the name, and another generation adds in another order.
    numbers = [said[key] for key in ("cpu family", "model") if key in said]
    return f"{name} ({'/'.join(numbers)})" if numbers else name
