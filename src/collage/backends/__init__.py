"""Backends: what a step is made of, who carries it out, and why one of them cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
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
    lr: float | Tensor
    hyper: Sequence[float]  # the rule's other hyper-parameters
    maximize: bool
    seed: int  # of stochastic rounding, below 2**64
    planes: Sequence[Tensor]  # of every parameter in turn: those of theta, then of the rule's other slots
    grads: Sequence[Tensor]
    steps: Sequence[int]  # t, from 1
    keys: Sequence[int]  # none: nothing is random
    regions: Sequence[Region]  # none: nothing is sharded
    sums: Sequence[Tensor]  # none: not measured
    counters: Sequence[Tensor] = ()  # 0-d int64: t, where the backend is to read it and lr on the device; then no steps

    def constants(self, step: int) -> Any:
        """The folded constants of a step, as floats."""
        return self.rule.fold(float(self.lr), self.hyper, step, self.strategy.register)

    def own(self, k: int) -> Sequence[Tensor]:
        """The planes of one parameter."""
        width = len(self.planes) // len(self.grads)
        return self.planes[k * width : (k + 1) * width]

    def shares(self) -> Iterator[Share]:
        """Parameter after parameter."""
        ends = list(accumulate((len(fmt.dtypes) for fmt in self.strategy.formats), initial=0))
        for k, grad in enumerate(self.grads):
            own = self.own(k)
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

        def taken(column: Sequence[Any]) -> list[Any]:
            return [column[k] for k in positions] if column else []

        return replace(
            self, planes=[plane for k in positions for plane in self.own(k)],
            grads=taken(self.grads), steps=taken(self.steps), keys=taken(self.keys), regions=taken(self.regions),
            sums=taken(self.sums), counters=taken(self.counters),
        )  # fmt: skip


class Backend(Protocol):
    """Carries out a batch, in place.

    `broken` counts elements of theta whose planes no step could have left. `stream` reads and writes all planes of
    contiguous tensors without arithmetic: the time below which no step can be.
    """

    FOLDS_ON_DEVICE: bool  # whether it can take t and lr as tensors, and so be captured in a graph

    def step(self, batch: Batch) -> None: ...

    def broken(self, strategy: Strategy, thetas: Sequence[Planes]) -> int: ...

    def stream(self, rule: Rule, strategy: Strategy, planes: Sequence[Tensor], grads: Sequence[Tensor]) -> None: ...


BACKENDS = ("auto", "cpu", "triton", "reference")


def missing(name: str) -> str | None:
    """Why a backend is not available on this machine; None if it is."""
    from collage.backends import cpu

    if name == "cpu" and cpu.native is None:
        return cpu.MISSING
    if name == "triton" and find_spec("triton") is None:
        return "Triton is not installed; torch's builds for GPUs bring it (or pip install triton)"
    if name == "triton" and not torch.cuda.is_available() and not interpreted():
        return "torch sees no GPU: torch.cuda.is_available() is False (TRITON_INTERPRET=1 runs the kernels in Python)"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def require(name: str) -> None:
    """Raise ValueError for an unknown backend, RuntimeError, saying why, for one that is not there."""
    if name not in BACKENDS:
        raise ValueError(f"backend: unknown {name!r}; known: {', '.join(BACKENDS)}")
    reason = missing(name)
    if reason:
        raise RuntimeError(f"backend: {name!r} is not available: {reason}")


def fastest(device: torch.device) -> str:
    """The backend with kernels for a device, whether or not it is available."""
    return {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")


def choose(name: str, device: torch.device) -> Backend:
    """The backend of that name for tensors on a device. "auto" takes the fastest there is."""
    from collage.backends import cpu, reference

    if name not in BACKENDS or (name == "cpu" and cpu.native is None):
        require(name)  # raises; here only if it was set after the optimizer was made
    wanted = fastest(device) if name == "auto" else name
    if name == "auto" and missing(wanted):
        wanted = "reference"
    if wanted == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' cannot update parameters on {device}; use 'auto' or 'reference'")
    if wanted == "triton":
        if device.type == "cpu" and not interpreted():
            raise ValueError("backend: 'triton' cannot update parameters on cpu; move them to a GPU or use 'auto'")
        from collage.backends import triton  # takes its time

        return triton
    return cpu if wanted == "cpu" else reference
