"""Backends: who carries out a step, for which devices, and why one of them cannot. BACKENDS is the table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from collage.backends.batch import Batch, Noise, Region, Row
from collage.layout import Planes

__all__ = ["BACKENDS", "Backend", "Batch", "Noise", "Region", "Row", "choose", "fastest", "missing", "require"]


LOWEST_TRITON = (3, 6)


class Backend(Protocol):
    """Carries out a batch, in place, and turns planes into numbers and numbers into planes, of many tensors at once.

    FOLDS_ON_DEVICE: whether it can take t, lr, scale and skip as tensors, and so be captured in a graph.
    step: one step of a batch.
    count_up: every 0-d int64 counter plus one, and the counts, if they are to be read.
    decode: out[k] <- the float32 number that planes[k] stand for.
    encode: planes[k] <- values[k], float32, rounded to nearest, or stochastically with noise.
    broken: how many elements have planes that no step could have left.
    squares: of each gradient (local and strided; bfloat16, float16 or float32) the sum of the squares of its elements,
        float64 [gradients] on their device, which nothing waits for: its root is their norm, and it is finite exactly
        if all of them are. For the square of a float32 other than 0 lies between 2**-298 and 2**256, where float64
        holds it exactly, and to leave float64's range would take 2**768 of them; and no sum of squares cancels a NaN
        or an Inf. Every backend has the same bits: blocks of 1,024 elements in row-major order are halved pairwise,
        their sums again in blocks of 1,024, and what is left is added in turn. So of n elements the relative error is
        at most (20 + n / 2**20) 2**-53.
    stream: reads and writes all planes of contiguous tensors of these formats, and reads grads, without arithmetic: the
        time below which no step can be.
    """

    FOLDS_ON_DEVICE: bool

    def step(self, batch: Batch) -> None: ...

    def count_up(
        self, steps: Sequence[Tensor], addresses: Sequence[int] | None = None, read: bool = True
    ) -> list[int]: ...

    def decode(self, format: str, planes: Sequence[Planes], out: Sequence[Tensor]) -> None: ...

    def encode(
        self, format: str, values: Sequence[Tensor], planes: Sequence[Planes], noise: Noise | None = None
    ) -> None: ...

    def broken(self, format: str, thetas: Sequence[Planes]) -> int: ...

    def squares(self, grads: Sequence[Tensor]) -> Tensor: ...

    def stream(self, formats: tuple[str, ...], planes: Sequence[Tensor], grads: Sequence[Tensor]) -> None: ...


class Known(NamedTuple):
    """A row of the table: the module of a backend, the types of device it has kernels for, why it is missing here.

    other: what to say of any other device; "": it takes them all.
    """

    module: str
    devices: tuple[str, ...]
    missing: Callable[[], str]
    other: Callable[[], str] = lambda: ""


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _cpu_missing() -> str:
    from collage.backends import cpu

    return "" if cpu.native is not None else cpu.MISSING


def _triton_missing() -> str:
    if find_spec("triton") is None:
        return "Triton is not installed; torch's builds for GPUs bring it (or pip install triton)"
    if not torch.cuda.is_available() and not interpreted():
        return "torch sees no GPU: torch.cuda.is_available() is False (TRITON_INTERPRET=1 runs the kernels in Python)"
    release = import_module("triton").__version__
    if tuple(map(int, release.split(".")[:2])) < LOWEST_TRITON:
        lowest = ".".join(map(str, LOWEST_TRITON))
        return f"Triton {release} is too old: the kernels need {lowest}, which torch 2.11 brings; pip install -U torch"
    return ""


def _triton_elsewhere() -> str:
    return "" if interpreted() else "move them to a GPU or use 'auto'"


BACKENDS: dict[str, Known] = {  # "auto" takes the first that has kernels for a device
    "cpu": Known("collage.backends.cpu", ("cpu",), _cpu_missing, lambda: "use 'auto' or 'reference'"),
    "triton": Known("collage.backends.triton", ("cuda",), _triton_missing, _triton_elsewhere),
    "reference": Known("collage.backends.reference", (), lambda: ""),
}


def missing(name: str) -> str:
    """Why a backend is not available on this machine; "" if it is."""
    return BACKENDS[name].missing() if name in BACKENDS else ""


def require(name: str) -> None:
    """Raise ValueError for an unknown backend, RuntimeError, saying why, for one that is not there."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend: unknown {name!r}; known: {', '.join(('auto', *BACKENDS))}")
    reason = missing(name)
    if reason:
        raise RuntimeError(f"backend: {name!r} is not available: {reason}")


def fastest(device: torch.device) -> str:
    """The backend with kernels for a device, whether or not it is available."""
    return next((name for name, known in BACKENDS.items() if device.type in known.devices), "reference")


def choose(name: str, device: torch.device) -> Backend:
    """The backend of that name for tensors on a device. "auto" takes the fastest there is."""
    wanted = fastest(device) if name == "auto" else name
    if name == "auto" and missing(wanted):
        wanted = "reference"
    known = BACKENDS.get(wanted)
    instead = known.other() if known and device.type not in known.devices else ""
    if instead:
        raise ValueError(f"backend: '{wanted}' cannot update parameters on {device}; {instead}")
    require(wanted)  # raises only if it was set after the optimizer was made
    backend: Backend = import_module(BACKENDS[wanted].module)
    return backend
