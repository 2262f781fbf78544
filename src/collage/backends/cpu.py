"""The CPU backend: compiled kernels (``csrc/``), one call per batch, bit for bit what the reference computes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from collage.backends import Batch, Region, Share, reference
from collage.constants import Constants
from collage.formats import Planes
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
GRADIENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def step(batch: Batch) -> None:
    """Carry out the batch on `torch.get_num_threads()` threads, with no temporary of a parameter's size."""
    shares = [share for share in batch.shares if share.grad.numel()]
    if not shares:
        return
    constants, rows = _constants(batch, [share.step for share in shares])
    planes = [[plane for slot in share.slots for plane in slot] for share in shares]
    increment_version(list(chain.from_iterable(planes)))  # as any in-place operation would
    stochastic = batch.strategy.stochastic
    stepper(instruction_set(), batch.rule.name, batch.strategy, shares[0].grad.dtype).step(
        numel=[share.grad.numel() for share in shares],
        planes=[plane.data_ptr() for plane in chain.from_iterable(planes)],
        gradients=[share.grad.data_ptr() for share in shares],
        constants=constants,
        rows=rows,
        streams=[batch.stream(share).base for share in shares] if stochastic else [],
        shards=[_flat(share.region) for share in shares] if stochastic else [],
        layouts=_layouts(planes, [share.grad for share in shares]),
        sums=[share.sums.data_ptr() for share in shares if share.sums is not None],
        maximize=batch.maximize,
        threads=torch.get_num_threads(),
    )


def broken(strategy: Strategy, slots: Sequence[Planes]) -> int:
    """How many elements of theta have planes that no step could have left."""
    planes = [plane for slot in slots for plane in slot]
    if not all(plane.is_contiguous() for plane in planes):
        return reference.broken(strategy, slots)
    kernel = stepper(instruction_set(), "adamw", strategy, strategy.dtype)  # of any rule: only theta is read
    count: int = kernel.broken(
        [planes[0].numel()], [plane.data_ptr() for plane in planes], threads=torch.get_num_threads()
    )
    return count


@cache
def stepper(instructions: str, rule: str, strategy: Strategy, gradient: torch.dtype) -> Any:
    """The kernel of one rule, strategy and gradient dtype."""
    formats = [strategy.param, strategy.momentum, strategy.variance]
    return native.Stepper(instructions, rule, formats, strategy.arithmetic == "bfloat16", GRADIENTS[gradient])


@cache
def instruction_set() -> str:
    """The best one that this machine has."""
    best: str = native.instruction_sets()[0]
    return best


def _constants(batch: Batch, steps: list[int]) -> tuple[list[list[float]], list[int]]:
    """(folded constants of each distinct step, which of them each parameter takes)."""
    distinct = sorted(set(steps))
    folded: list[Constants] = [batch.constants(step) for step in distinct]
    position = {step: k for k, step in enumerate(distinct)}
    return [constants.row() for constants in folded], [position[step] for step in steps]


def _flat(region: Region | None) -> list[int]:
    return [] if region is None else [*region.sizes, *region.starts, *region.strides]


def _layouts(planes: list[list[Tensor]], grads: list[Tensor]) -> list[list[int]]:
    """Sizes and strides of the tensors that are not all contiguous; nothing if all are."""
    tensors = [[*own, grad] for own, grad in zip(planes, grads, strict=True)]
    strided = [not all(t.is_contiguous() for t in own) for own in tensors]
    if not any(strided):
        return []
    return [
        [*own[0].shape, *chain.from_iterable(t.stride() for t in own)] if odd else []
        for own, odd in zip(tensors, strided, strict=True)
    ]


def stream(rule: Rule, strategy: Strategy, shares: Sequence[Share]) -> None:
    """Read and write all planes of contiguous shares without arithmetic: the time below which no step can be."""
    stepper(instruction_set(), rule.name, strategy, shares[0].grad.dtype).stream(
        numel=[share.grad.numel() for share in shares],
        planes=[plane.data_ptr() for share in shares for slot in share.slots for plane in slot],
        gradients=[share.grad.data_ptr() for share in shares],
        threads=torch.get_num_threads(),
    )
