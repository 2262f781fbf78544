"""The reference backend: the definition of a step, in plain PyTorch, on any device.

Pure functions on whole tensors; `step` walks them chunk by chunk and is the only one that writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from collage import mcf
from collage.accumulators import Accumulator
from collage.backends import Batch, Share
from collage.formats import Planes, pieces
from collage.rules import Rule
from collage.strategies import Strategy

FOLDS_ON_DEVICE = False
CHUNK = 1 << 15  # elements, a multiple of BLOCK: stays in cache, and below what torch splits over threads
BLOCK = 1024  # elements summed by pairwise halving
SUMS = ("dot", "dot_visible", "norm2", "nonzero", "lost")


def step(batch: Batch) -> None:
    """Carry out the batch, parameter after parameter."""
    increment_version(batch.planes)  # once, as by any in-place operation; the writes below count for nothing
    constants: dict[tuple[int, torch.device], Any] = {}
    for share in batch.shares():
        at = share.step, share.grad.device
        if at not in constants:
            constants[at] = batch.constants(share.step).on(batch.strategy.register, share.grad.device)
        for slots, grad, index in _chunks(batch, share):
            g = _gradient(grad, batch.strategy.register, batch.maximize)
            random = _random(batch, share, index)
            delta, new = advance(batch.rule, batch.strategy, slots, g, constants[at], random)
            if share.sums is not None:
                measure(batch.strategy, slots[0], new[0], delta, share.sums)
            for planes, fresh in zip(slots, new, strict=True):
                for plane, value in zip(planes, fresh, strict=True):
                    plane.copy_(value)


def broken(strategy: Strategy, thetas: Sequence[Planes]) -> int:
    """How many elements of all parameters' theta have planes that no step could have left."""
    return sum(int(strategy.formats[0].broken(piece).sum()) for planes in thetas for piece in pieces(planes))


def stream(rule: Rule, strategy: Strategy, planes: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Read all planes and gradients, and write the planes, without arithmetic."""
    for tensor in (*planes, *grads):
        tensor.copy_(tensor.clone())


def advance(
    rule: Rule,
    strategy: Strategy,
    slots: Sequence[Planes],
    g: Tensor,
    constants: Any,  # the rule's, as tensors
    random: Sequence[Tensor | None],
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """(intended update, new planes of every slot). Pure."""
    numbers: tuple[Accumulator, ...] = tuple(
        fmt.load(planes, strategy.register) for fmt, planes in zip(strategy.formats, slots, strict=True)
    )
    delta, grown = rule.update(numbers, g, constants)
    new = [fmt.encode(x, bits) for fmt, x, bits in zip(strategy.formats, grown, random, strict=True)]
    return delta, new


def measure(strategy: Strategy, old: Planes, new: Planes, delta: Tensor, sums: Tensor) -> None:
    """Add one chunk's SUMS to ``sums``: three float64 sums and two counts.

    Intended update Delta; arrived update = sum over components, last first, of new - old, each in float64.
    """
    fmt = strategy.formats[0]
    intended = delta.double()
    arrived = torch.zeros_like(intended)
    for before, after in reversed(list(zip(fmt.components(old), fmt.components(new), strict=True))):
        arrived += after.double() - before.double()
    visible = new[0].double() - old[0].double()
    for k, terms in enumerate((intended * arrived, intended * visible, intended * intended)):
        _add_in_blocks(terms, sums, k)
    moved = torch.zeros_like(delta, dtype=torch.bool)
    for before, after in zip(old, new, strict=True):
        moved |= before != after
    sums[3] += (delta != 0).sum().item()
    sums[4] += ((delta != 0) & ~moved).sum().item()


def _add_in_blocks(terms: Tensor, sums: Tensor, k: int) -> None:
    """sums[k] += terms in a fixed order: halving pairwise inside blocks of BLOCK elements, then block after block."""
    flat = terms.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    while blocks.shape[1] > 1:
        half = blocks.shape[1] // 2
        blocks = blocks[:, :half] + blocks[:, half:]
    total = sums[k].item()
    for block in blocks.flatten().tolist():
        total += block
    sums[k] = total


def _chunks(batch: Batch, share: Share) -> Iterator[tuple[list[list[Tensor]], Tensor, Tensor | None]]:
    """(planes per slot, gradient, global index where random bits are needed), chunk by chunk in row-major order.

    A tensor that is not contiguous is one chunk: the operations are elementwise, so its strides do not matter.
    """
    share = share._replace(slots=tuple(tuple(plane.data for plane in planes) for planes in share.slots))
    tensors = [share.grad, *(plane for planes in share.slots for plane in planes)]
    index = _index(share) if batch.strategy.stochastic else None
    if not all(t.is_contiguous() for t in tensors):
        yield [list(planes) for planes in share.slots], share.grad, index
        return
    for i in range(0, share.grad.numel(), CHUNK):
        chunk = slice(i, i + CHUNK)
        slots = [[plane.view(-1)[chunk] for plane in planes] for planes in share.slots]
        yield slots, share.grad.view(-1)[chunk], None if index is None else index.view(-1)[chunk]


def _index(share: Share) -> Tensor:
    """Row-major index in the unsharded tensor, of every element."""
    if share.region is not None:
        return share.region.indices(share.grad.device)
    return torch.arange(share.grad.numel(), device=share.grad.device).view(share.grad.shape)


def _gradient(grad: Tensor, register: torch.dtype, maximize: bool) -> Tensor:
    g = grad.float() if register == torch.float32 else mcf.rn(grad.float(), register)
    return -g if maximize else g


def _random(batch: Batch, share: Share, index: Tensor | None) -> list[Tensor | None]:
    return [
        batch.stream(share).bits(index, slot) if index is not None and fmt.stochastic else None
        for slot, fmt in enumerate(batch.strategy.formats)
    ]
