"""Backends: what a step is made of, who carries it out, and why one of them cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from collage.formats import Planes
from collage.rng import Stream
from collage.rules import Rule
from collage.strategies import Strategy


class Region(NamedTuple):
    """Where a shard lies in the unsharded tensor: per dimension its size, first index and the global stride."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    strides: tuple[int, ...]

    def indices(self, device: torch.device) -> Tensor:
        """int64 row-major index in the unsharded tensor, of every local element."""
        total = torch.zeros((), dtype=torch.int64, device=device)
        for size, start, stride in zip(self.sizes, self.starts, self.strides, strict=True):
            total = total.unsqueeze(-1) + (torch.arange(size, device=device) + start) * stride
        return total


class Share(NamedTuple):
    """One parameter's share of a step. Tensors are local (never DTensors); planes are written in place."""

    slots: tuple[Planes, ...]  # planes of theta, then of the rule's other slots
    grad: Tensor  # the parameter's dtype or float32
    step: int  # t, from 1
    key: int  # of the parameter's random bits, below 2**64
    region: Region | None = None  # None: not sharded
    sums: Tensor | None = None  # [5] float64, on the CPU: `reference.SUMS` are added to it


@dataclass(frozen=True, slots=True)
class Batch:
    """All parameters of one group, strategy, device and gradient dtype, as columns: one call of a backend."""

    rule: Rule
    strategy: Strategy
    lr: float
    hyper: Sequence[float]  # the rule's other hyper-parameters
    maximize: bool
    seed: int  # of stochastic rounding, below 2**64
    planes: Sequence[Tensor]  # of every parameter in turn: those of theta, then of the rule's other slots
    grads: Sequence[Tensor]
    steps: Sequence[int]
    keys: Sequence[int]  # none: nothing is random
    regions: Sequence[Region]  # none: nothing is sharded
    sums: Sequence[Tensor]  # none: not measured

    def constants(self, step: int) -> Any:
        """The folded constants of a step, as floats."""
        return self.rule.fold(self.lr, self.hyper, step, self.strategy.register)

    def shares(self) -> Iterator[Share]:
        """Parameter after parameter."""
        ends = list(accumulate((len(fmt.dtypes) for fmt in self.strategy.formats), initial=0))
        for k, grad in enumerate(self.grads):
            own = self.planes[k * ends[-1] : (k + 1) * ends[-1]]
            yield Share(
                tuple(own[i:j] for i, j in pairwise(ends)), grad, self.steps[k], self.keys[k] if self.keys else 0,
                self.regions[k] if self.regions else None, self.sums[k] if self.sums else None,
            )  # fmt: skip

    def stream(self, share: Share) -> Stream:
        """The random bits of one parameter at this step."""
        return Stream(self.seed, share.step, share.key)

    def take(self, positions: Sequence[int]) -> Batch:
        """The same step of these parameters only, in order."""
        if len(positions) == len(self.grads):
            return self
        width = len(self.planes) // len(self.grads)

        def taken(column: Sequence[Any]) -> list[Any]:
            return [column[k] for k in positions] if column else []

        return replace(
            self, planes=[self.planes[k * width + i] for k in positions for i in range(width)],
            grads=taken(self.grads), steps=taken(self.steps), keys=taken(self.keys), regions=taken(self.regions),
            sums=taken(self.sums),
        )  # fmt: skip


class Backend(Protocol):
    """Carries out a batch, in place; `broken` counts elements of theta whose planes no step could have left."""

    def step(self, batch: Batch) -> None: ...

    def broken(self, strategy: Strategy, params: Sequence[Sequence[Planes]]) -> int: ...


BACKENDS = ("auto", "cpu", "reference")


def require(name: str) -> str | None:
    """Why "auto" has no kernels for the CPU; None if it has, or if others are asked for.

    Raises ValueError for an unknown backend, RuntimeError, saying why, for one that is not there.
    """
    from collage.backends import cpu

    if name not in BACKENDS:
        raise ValueError(f"backend: unknown {name!r}; known: {', '.join(BACKENDS)}")
    if name == "cpu" and cpu.native is None:
        raise RuntimeError(f"backend: 'cpu' is not available: {cpu.MISSING}")
    return cpu.MISSING if name == "auto" and cpu.native is None else None


def choose(name: str, device: torch.device) -> Backend:
    """The backend of that name for tensors on a device. "auto" takes the fastest there is."""
    from collage.backends import cpu, reference

    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' cannot update parameters on {device}; use 'auto' or 'reference'")
    native = name != "reference" and device.type == "cpu" and cpu.native is not None
    return cpu if native else reference
