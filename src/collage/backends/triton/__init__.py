"""The Triton backend: one launch per batch on a GPU, bit for bit what the reference computes.

Under TRITON_INTERPRET=1 the same kernels run on tensors of the CPU, which is how they are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from collage.backends import Batch, reference
from collage.backends.triton import walk
from collage.backends.triton.formats import CODES
from collage.backends.triton.rules import RULES
from collage.formats import Planes
from collage.rng import bases
from collage.strategies import Strategy

BLOCK: int = walk.BLOCK.value
GRADIENTS = {torch.float32: CODES["fp32"], torch.bfloat16: CODES["bf16"], torch.float16: CODES["fp16"]}


def step(batch: Batch) -> None:
    """Carry out the batch in one launch. Does not wait for the device, unless it is measured."""
    numel = [grad.numel() for grad in batch.grads]
    blocks = [-(-n // BLOCK) for n in numel]
    device = batch.grads[0].device
    if sum(blocks) == 0:
        return
    increment_version(batch.planes)  # as any in-place operation would
    first = list(accumulate(blocks, initial=0))
    table, shapes, constants = _tables(batch, numel, first)
    owner = torch.repeat_interleave(torch.tensor(blocks)).to(torch.int32)
    measured = len(batch.sums) > 0
    sums = torch.empty(sum(blocks) if measured else 0, 5, dtype=torch.float64, device=device)
    walk.step[(sum(blocks),)](
        _to(device, table), owner.to(device), _to(device, shapes), _to(device, constants), sums,
        **_constant_arguments(batch), MEASURED=measured, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    if measured:
        totals = torch.stack(list(batch.sums)).to(device)
        walk.add_up[(len(numel),)](sums, torch.tensor(first, device=device), totals, num_warps=1)
        for own, total in zip(batch.sums, totals.cpu(), strict=True):
            own.copy_(total)


def broken(strategy: Strategy, params: Sequence[Sequence[Planes]]) -> int:
    """How many elements of theta, in all parameters' slots, have planes that no step could have left."""
    return reference.broken(strategy, params)


def _constant_arguments(batch: Batch) -> dict[str, Any]:
    """What a kernel is compiled for."""
    theta, m, v = (CODES[name] for name in (batch.strategy.param, batch.strategy.momentum, batch.strategy.variance))
    return {
        "UPDATE": RULES[batch.rule.name], "CONSTANTS": len(batch.constants(1).row()), "THETA": theta, "M": m, "V": v,
        "GRADIENT": GRADIENTS[batch.grads[0].dtype], "NARROW": batch.strategy.arithmetic == "bfloat16",
        "MAXIMIZE": batch.maximize, "RANDOM": batch.strategy.stochastic,
    }  # fmt: skip


def _tables(batch: Batch, numel: list[int], first: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(a row of `walk.COLUMNS` per tensor, sizes and strides that rows point into, rows of constants)."""
    steps = {step: k for k, step in enumerate(dict.fromkeys(batch.steps))}
    streams = bases(batch.seed, batch.steps, batch.keys) if batch.keys else [0] * len(numel)
    shapes: list[int] = [0]
    rows = []
    for k, grad in enumerate(batch.grads):
        own = _own(batch, k)
        tensors = [*(t for t in own if t is not None), grad]
        addresses = [0 if t is None else t.data_ptr() for t in (*own, grad)]
        layout, dims = len(shapes), 0
        if not all(map(Tensor.is_contiguous, tensors)):
            dims = grad.dim()
            shapes += [*grad.shape, *chain.from_iterable((t if t is not None else grad).stride() for t in (*own, grad))]
        region, region_dims = len(shapes), 0
        if batch.regions:
            region_dims = len(batch.regions[k].sizes)
            shapes += chain.from_iterable(batch.regions[k])
        whole = not dims and not region_dims and not any(address % 16 for address in addresses)
        base = streams[k] - 2**64 if streams[k] >= 2**63 else streams[k]
        rows.append(
            [*addresses, numel[k], first[k], steps[batch.steps[k]], base, int(whole), layout, dims, region, region_dims]
        )
    constants = [batch.constants(step).row() for step in steps]
    return torch.tensor(rows), torch.tensor(shapes), torch.tensor(constants, dtype=torch.float32)


def _own(batch: Batch, k: int) -> list[Tensor | None]:
    """Two planes per slot; None where a slot has one."""
    width = len(batch.planes) // len(batch.grads)
    rest = iter(batch.planes[k * width : (k + 1) * width])
    own: list[Tensor | None] = []
    for fmt in batch.strategy.formats:
        own += [next(rest), next(rest) if len(fmt.dtypes) == 2 else None]
    return own


def _to(device: torch.device, table: Tensor) -> Tensor:
    """On the device, without waiting for it."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
