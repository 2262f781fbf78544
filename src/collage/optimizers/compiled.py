"""What torch.compile and CUDA graphs ask of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collage.optimizers.parameters import Group
from collage.sharding import any_dtensor


def numbers(settings: Sequence[float | Tensor]) -> Tensor:
    """Settings as a float64 tensor on the CPU.

    In a graph they are added to a constant, which torch.compile leaves open for the values of later steps; it would
    compile anew for each value of a tensor made of them.
    """
    if torch.compiler.is_compiling():
        return torch.stack([torch.zeros((), dtype=torch.float64, device="cpu") + x for x in settings])
    return torch.tensor(list(map(float, settings)), dtype=torch.float64, device="cpu")


def require_compilable(planes: Sequence[Tensor], monitored: bool, scaled: bool) -> None:
    """Raise RuntimeError for a step that torch.compile would get wrong."""
    if scaled:
        raise RuntimeError("GradScaler: a compiled step takes no grad_scale; call scaler.step(opt) uncompiled")
    if monitored:
        raise RuntimeError("monitor: it measures in Python, outside a compiled step; call opt.step() uncompiled")
    if any_dtensor(planes):
        raise RuntimeError("params: a compiled step takes no DTensors; call opt.step() uncompiled")
    storages = [plane.untyped_storage().data_ptr() for plane in planes if plane.numel()]
    if len(set(storages)) < len(storages):
        raise RuntimeError(
            "params: some are views of one buffer, which torch.compile is known to mix up; call opt.step() "
            "uncompiled, or give each parameter memory of its own"
        )


def require_capturable(groups: Sequence[Group]) -> None:
    """Raise RuntimeError where a graph is being captured that would repeat one step number for ever."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if capturing and not all(group["capturable"] for group in groups):
        raise RuntimeError("capturable: a step in a CUDA graph needs AdamW(..., capturable=True)")
