"""Weights: what is left of equal increments, and how far weights stray from the float64 sum of noisy updates."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from collage.harness.bench.accuracy.entries import Entry

CONSTANT, NOISY = 2000, 1000  # steps
STARTS, INCREMENTS = (1.0, 0.02), (1e-5, 1e-6, 1e-7)
LRS = (1e-3, 1e-5, 1e-6)
WEIGHT, DRIFT = 0.02, 0.15  # of noisy updates: weights are N(0, WEIGHT**2), updates lr * (N(0, DRIFT**2) + N(0, 1))
ROWS, COLUMNS = 4, 256  # weights of one lr

STEPS = CONSTANT + NOISY  # that `measure` tells of


def measure(entry: Entry, tick: Callable[[], None]) -> dict[str, float]:
    """Shares kept, mean and standard deviation over weights, by `constant`; error / movement by `noisy`."""
    return _constant(entry, tick) | _noisy(entry, tick)


def constant(start: float, increment: float) -> str:
    """Key of the share that is left of an increment; " sd" behind it for its standard deviation."""
    return f"{start:g}{increment:+g}"


def noisy(lr: float) -> str:
    """Key of error / movement."""
    return f"noisy {lr:g}"


def _constant(entry: Entry, tick: Callable[[], None]) -> dict[str, float]:
    cases = [(start, sign * size) for start, size, sign in product(STARTS, INCREMENTS, (1, -1))]
    theta, increment = (torch.tensor(column).repeat(COLUMNS, 1).T for column in zip(*cases, strict=True))
    unit = min(INCREMENTS)
    held = entry.make(theta, unit)
    before, grad = (
        held.value("param").double(),
        -(increment / unit).round(),
    )  # 1, 10, 100: of which bfloat16 has all bits
    for _ in range(CONSTANT):
        held.step(grad)
        tick()
    kept = (held.value("param").double() - before) / (CONSTANT * increment.double())
    means, deviations = kept.mean(1).tolist(), kept.std(1).tolist()
    keys = [constant(*case) for case in cases]
    return dict(zip(keys, means, strict=True)) | {f"{k} sd": sd for k, sd in zip(keys, deviations, strict=True)}


def _noisy(entry: Entry, tick: Callable[[], None]) -> dict[str, float]:
    rng, unit = torch.Generator().manual_seed(0), min(LRS)
    sizes = torch.tensor([lr / unit for lr in LRS]).repeat_interleave(ROWS)[:, None]

    def normal() -> Tensor:
        return torch.empty(len(sizes), COLUMNS).normal_(generator=rng)

    theta, drift = (WEIGHT * normal()).bfloat16().float(), DRIFT * normal()
    held = entry.make(theta, unit)
    before, intended = held.value("param").double(), torch.zeros(theta.shape, dtype=torch.float64)
    for _ in range(NOISY):
        update = (sizes * (drift + normal())).bfloat16().float()
        held.step(-update)
        intended += unit * update.double()
        tick()
    error = held.value("param").double() - before - intended
    lost = [
        own.norm() / moved.norm()
        for own, moved in zip(torch.split(error, ROWS), torch.split(intended, ROWS), strict=True)
    ]
    return {noisy(lr): float(share) for lr, share in zip(LRS, lost, strict=True)}
