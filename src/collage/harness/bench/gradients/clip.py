"""Clipping by the norm of all gradients: torch's and ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from collage.gradients.clip import clip_grad_norm_

TENSORS, NUMEL = 32, 1 << 20
WAYS: dict[str, Callable[..., Tensor]] = {
    "torch.nn.utils.clip_grad_norm_": nn.utils.clip_grad_norm_,
    "collage.clip_grad_norm_": clip_grad_norm_,
}


def measure(rounds: int, tick: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """A row for each: error of the norm of bfloat16 gradients, time with and without anything to clip."""
    params = [nn.Parameter(torch.zeros(NUMEL, dtype=torch.bfloat16)) for _ in range(TENSORS)]
    generator = torch.Generator().manual_seed(0)
    for p in params:
        p.grad = torch.randn(NUMEL, generator=generator).bfloat16()
    exact = sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None) ** 0.5
    rows = {name: {"error": abs(float(clip(params, 1e9)) / exact - 1)} for name, clip in WAYS.items()}
    times: dict[tuple[str, str], list[float]] = {(name, what): [] for name in WAYS for what in ("kept", "clipped")}
    for k in range(rounds):
        for (name, what), own in times.items():
            own.append(_seconds(WAYS[name], params, 1e9 if what == "kept" else 0.999 * exact))
        tick(k + 1)
    for (name, what), own in times.items():
        rows[name][f"ns_{what}"] = median(own) / NUMEL / TENSORS * 1e9
    return rows


def _seconds(clip: Callable[..., Tensor], params: list[nn.Parameter], max_norm: float) -> float:
    start = time.perf_counter()
    clip(params, max_norm)
    return time.perf_counter() - start
