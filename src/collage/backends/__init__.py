"""Backends: what a step is made of, and who carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from collage.constants import Constants
from collage.formats import Planes
from collage.rng import Stream
from collage.rules import Rule
from collage.strategies import Strategy


@dataclass(frozen=True, slots=True)
class Region:
    """Where a local tensor lies in the unsharded one: per dimension its size, first index and the global stride."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    strides: tuple[int, ...]

    def index(self, device: torch.device) -> Tensor:
        """int64 row-major index in the unsharded tensor, of every local element."""
        total = torch.zeros((), dtype=torch.int64, device=device)
        for size, start, stride in zip(self.sizes, self.starts, self.strides, strict=True):
            total = total.unsqueeze(-1) + (torch.arange(size, device=device) + start) * stride
        return total


@dataclass(frozen=True, slots=True)
class Update:
    """One parameter's share of a step. Tensors are local (never DTensors); planes are written in place."""

    strategy: Strategy
    slots: tuple[Planes, ...]  # planes of theta, then of the rule's other slots
    grad: Tensor  # the parameter's dtype or float32
    constants: Constants
    maximize: bool
    stream: Stream
    region: Region
    sums: Tensor | None = None  # [5] float64, on the CPU: what `quality.measure` adds to


class Backend(Protocol):
    """Carries out the updates of one group, device and gradient dtype, all in one call."""

    def step(self, rule: Rule, updates: Sequence[Update]) -> None: ...


BACKENDS = ("auto", "reference")


def choose(name: str) -> Backend:
    """The backend of that name. "auto" takes the fastest there is for the parameters' device."""
    if name not in BACKENDS:
        raise ValueError(f"backend: unknown {name!r}; known: {', '.join(BACKENDS)}")
    from collage.backends import reference

    return reference
