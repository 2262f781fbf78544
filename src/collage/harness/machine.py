"""The machine a result was measured on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine(compute: torch.dtype, on_gpu: bool | None = None) -> dict[str, str]:
    """Processor, cores, versions, and the arithmetic of forward and backward."""
    gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    return {
        "cpu": torch.cuda.get_device_name() if gpu else _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compute": str(compute).removeprefix("torch."),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
