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

from collage.backends import Batch, reference
from collage.formats import Planes
from collage.rng import bases
from collage.rules import Rule
from collage.strategies import Strategy

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
    constants, rows = _constants(batch)
    increment_version(batch.planes)  # as any in-place operation would
    stochastic = batch.strategy.stochastic
    _operation(instruction_set(), batch.rule.name, batch.strategy, batch.grads[0].dtype).run(
        numel=_each(Tensor.numel, batch.grads),
        planes=_each(Tensor.data_ptr, batch.planes),
        gradients=_each(Tensor.data_ptr, batch.grads),
        constants=constants,
        rows=rows,
        streams=bases(batch.seed, batch.steps, batch.keys) if stochastic else [],
        shards=[[*region.sizes, *region.starts, *region.strides] for region in batch.regions] if stochastic else [],
        layouts=_layouts(batch),
        sums=_each(Tensor.data_ptr, batch.sums),
        maximize=batch.maximize,
        threads=torch.get_num_threads(),
    )


def _each(method: Callable[[Tensor], int], tensors: Sequence[Tensor]) -> list[int]:
    return list(map(method, tensors))


def broken(strategy: Strategy, thetas: Sequence[Planes]) -> int:
    """How many elements of all parameters' theta have planes that no step could have left."""
    planes = [plane for own in thetas for plane in own]
    if not all(map(Tensor.is_contiguous, planes)):
        return reference.broken(strategy, thetas)
    count: int = native.Operation(instruction_set(), "broken", [strategy.param]).run(
        [own[0].numel() for own in thetas], _each(Tensor.data_ptr, planes), threads=torch.get_num_threads()
    )
    return count


@cache
def _operation(instructions: str, name: str, strategy: Strategy, gradient: torch.dtype) -> Any:
    """The kernel of one rule, strategy and gradient dtype; or the stream of its planes."""
    return native.Operation(
        instructions, name, [strategy.param, strategy.momentum, strategy.variance],
        random=[(0, slot) for slot in range(3)], bfloat16_arithmetic=strategy.arithmetic == "bfloat16",
        gradient=GRADIENTS[gradient],
    )  # fmt: skip


@cache
def instruction_set() -> str:
    """The best one that this machine has."""
    best: str = native.instruction_sets()[0]
    return best


def _constants(batch: Batch) -> tuple[list[list[float]], list[int]]:
    """(folded constants of each distinct step, which of them each parameter takes)."""
    distinct = {step: k for k, step in enumerate(dict.fromkeys(batch.steps))}
    return [batch.constants(step).row() for step in distinct], [distinct[step] for step in batch.steps]


def _layouts(batch: Batch) -> list[list[int]]:
    """Sizes and strides of the tensors that are not all contiguous; nothing if all are."""
    if all(map(Tensor.is_contiguous, batch.planes)) and all(map(Tensor.is_contiguous, batch.grads)):
        return []
    tensors = [[*batch.own(k), grad] for k, grad in enumerate(batch.grads)]
    return [
        [] if all(map(Tensor.is_contiguous, own)) else [*own[0].shape, *chain.from_iterable(map(Tensor.stride, own))]
        for own in tensors
    ]


def stream(rule: Rule, strategy: Strategy, planes: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Read and write all planes without arithmetic."""
    _operation(instruction_set(), "stream", strategy, grads[0].dtype).run(
        numel=_each(Tensor.numel, grads),
        planes=_each(Tensor.data_ptr, planes),
        gradients=_each(Tensor.data_ptr, grads),
        threads=torch.get_num_threads(),
    )
