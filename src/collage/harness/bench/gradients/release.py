"""The update in backward beside the update after it: time, and how many gradients are alive at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from collage.casting import to_bf16
from collage.gradients.release import release_gradients
from collage.harness.ledger import peak_of
from collage.optimizers.adamw import AdamW

SHAPES = {  # what a model is made of: (how many tensors, elements of each)
    "400 tensors of 1,000": (400, 1000),
    "24 tensors of 1,048,576": (24, 1 << 20),
}


class _Given(nn.Module):
    """Tensors whose gradients are others that it has: backward costs next to nothing."""

    def __init__(self, tensors: int, numel: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(numel)) for _ in range(tensors)])
        self.slopes = [torch.randn(numel).bfloat16() for _ in range(tensors)]

    def forward(self) -> Tensor:
        """A loss: one after the other, so that gradients come one after the other."""
        loss = torch.zeros((), dtype=torch.bfloat16)
        for weight, slope in zip(self.weights, self.slopes, strict=True):
            loss = loss + torch.dot(weight, slope)
        return loss


def measure(rounds: int, tick: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """A row for each model."""
    rows = {}
    for k, (name, (tensors, numel)) in enumerate(SHAPES.items()):
        pairs = []
        for release in (False, True):
            model = _Given(tensors, numel)
            to_bf16(model)
            opt = AdamW(model.named_parameters(), lr=1e-5)
            if release:
                release_gradients(model, opt)
            pairs.append((model, opt))
        rows[name] = _row(pairs, rounds)
        tick((k + 1) * rounds)
    return rows


def _row(pairs: list[tuple[_Given, AdamW]], rounds: int) -> dict[str, Any]:
    whole = sum(p.nbytes for p in pairs[0][0].parameters())
    after, inside = (partial(_step, *pair) for pair in pairs)
    for call in (after, inside):
        call()  # makes the states
    timed = [(after(), inside()) for _ in range(rounds)]
    backward, update = (median(seconds[k] for seconds, _ in timed) for k in (0, 1))
    released, finish = (median(seconds[k] for _, seconds in timed) for k in (0, 1))
    return {
        "after_ms": update * 1e3,
        "inside_ms": (released + finish - backward) * 1e3,
        "ratio": (released + finish - backward) / update,
        "alive_after": peak_of(after) / whole,
        "alive_inside": peak_of(inside) / whole,
    }


def _step(model: _Given, opt: AdamW) -> tuple[float, float]:
    """Seconds of backward, and of what comes after it."""
    loss: Any = model()
    start = time.perf_counter()
    loss.backward()
    middle = time.perf_counter()
    opt.step()
    opt.zero_grad()
    return middle - start, time.perf_counter() - middle
