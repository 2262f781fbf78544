"""The CPU backend: compiled kernels (``csrc/``), one call per batch, bit for bit what the reference computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from collage.backends import reference
from collage.backends.batch import Batch
from collage.formats import Planes
from collage.rng import bases
from collage.rules.folding import row

MISSING = (
    "this installation was built without them; install a C++17 compiler and reinstall the package "
    "(pip install --force-reinstall --no-deps, with -v to see why a build failed)"
)


def _load() -> Any:
    try:
        return import_module("collage._native")
    except ImportError:
        return None


native = _load()
FOLDS_ON_DEVICE = False
GRADIENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def step(batch: Batch) -> None:
    """Carry out the batch on `torch.get_num_threads()` threads, with no temporary of a parameter's size."""
    if batch.rule.name != "adamw" or not set(batch.formats) <= FORMATS or batch.scale != 1.0:
        return reference.step(batch)
    constants, rows = _constants(batch)
    increment_version(batch.planes)  # as any in-place operation would
    kernel = stepper(instruction_set(), batch.rule.name, batch.formats, batch.register, batch.grads[0].dtype)
    kernel.step(
        numel=_each(Tensor.numel, batch.grads),
        planes=_each(Tensor.data_ptr, batch.planes),
        gradients=_each(Tensor.data_ptr, batch.grads),
        constants=constants,
        rows=rows,
        streams=bases(batch.seed, batch.steps, batch.keys) if batch.stochastic else [],
        shards=[[*region.sizes, *region.starts, *region.strides] for region in batch.regions]
        if batch.stochastic
        else [],
        layouts=_layouts(batch),
        sums=_each(Tensor.data_ptr, batch.sums),
        maximize=batch.maximize,
        threads=torch.get_num_threads(),
    )
    return None


FORMATS = {"fp32", "bf16", "fp16", "bf16x2", "bf16+fp32", "bf16+kahan", "bf16:sr", "bf16x2:sr"}
decode, encode = reference.decode, reference.encode


def _each(method: Callable[[Tensor], int], tensors: Sequence[Tensor]) -> list[int]:
    return list(map(method, tensors))


def broken(format: str, thetas: Sequence[Planes]) -> int:
    """How many elements of all parameters' theta have planes that no step could have left."""
    planes = [plane for own in thetas for plane in own]
    if not all(map(Tensor.is_contiguous, planes)) or format not in FORMATS:
        return reference.broken(format, thetas)
    others = ("fp32", "fp32") if format != "bf16+kahan" else ("bf16", "bf16")
    register = torch.float32 if format != "bf16+kahan" else torch.bfloat16
    kernel = stepper(instruction_set(), "adamw", (format, *others), register, thetas[0][0].dtype)
    count: int = kernel.broken(
        [own[0].numel() for own in thetas], _each(Tensor.data_ptr, planes), threads=torch.get_num_threads()
    )
    return count


@cache
def stepper(
    instructions: str, rule: str, formats: tuple[str, ...], register: torch.dtype, gradient: torch.dtype
) -> Any:
    """The kernel of one rule, strategy and gradient dtype."""
    return native.Stepper(instructions, rule, list(formats), register == torch.bfloat16, GRADIENTS[gradient])


@cache
def instruction_set() -> str:
    """The best one that this machine has."""
    best: str = native.instruction_sets()[0]
    return best


def _constants(batch: Batch) -> tuple[list[list[float]], list[int]]:
    """(folded constants of each distinct step, which of them each parameter takes)."""
    distinct = {step: k for k, step in enumerate(dict.fromkeys(batch.steps))}
    return [row(batch.constants(step)) for step in distinct], [distinct[step] for step in batch.steps]


def _layouts(batch: Batch) -> list[list[int]]:
    """Sizes and strides of the tensors that are not all contiguous; nothing if all are."""
    if all(map(Tensor.is_contiguous, batch.planes)) and all(map(Tensor.is_contiguous, batch.grads)):
        return []
    tensors = [[*batch.own(k), grad] for k, grad in enumerate(batch.grads)]
    return [
        [] if all(map(Tensor.is_contiguous, own)) else [*own[0].shape, *chain.from_iterable(map(Tensor.stride, own))]
        for own in tensors
    ]


def stream(formats: tuple[str, ...], planes: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Read and write all planes without arithmetic."""
    register = torch.float32 if "bf16+kahan" not in formats else torch.bfloat16
    if len(formats) != 3 or not set(formats) <= FORMATS:
        return reference.stream(formats, planes, grads)
    stepper(instruction_set(), "adamw", formats, register, grads[0].dtype).stream(
        numel=_each(Tensor.numel, grads),
        planes=_each(Tensor.data_ptr, planes),
        gradients=_each(Tensor.data_ptr, grads),
        threads=torch.get_num_threads(),
    )
    return None
