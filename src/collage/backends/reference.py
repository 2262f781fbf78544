"""The reference backend: the definition of a step, in plain PyTorch, on any device.

Pure functions on whole tensors; `step` walks them chunk by chunk and is the only one that writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from collage import mcf
from collage.accumulators import Accumulator
from collage.backends import Update
from collage.constants import Constants
from collage.formats import Planes
from collage.rules import Rule
from collage.strategies import Strategy

CHUNK = 1 << 15  # elements, a multiple of BLOCK: stays in cache, and below what torch splits over threads
BLOCK = 1024  # elements summed by pairwise halving
SUMS = ("dot", "dot_visible", "norm2", "nonzero", "lost")


def step(rule: Rule, updates: Sequence[Update]) -> None:
    """Carry out each update, in place."""
    for update in updates:
        for slots, grad, index in _chunks(update):
            g = _gradient(grad, update.strategy.register, update.maximize)
            random = _random(update, index)
            delta, new = advance(rule, update.strategy, slots, g, update.constants, random)
            if update.sums is not None:
                measure(update.strategy, slots[0], new[0], delta, update.sums)
            for planes, fresh in zip(slots, new, strict=True):
                for plane, value in zip(planes, fresh, strict=True):
                    plane.copy_(value)


def advance(
    rule: Rule,
    strategy: Strategy,
    slots: Sequence[Planes],
    g: Tensor,
    constants: Constants,
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


def _chunks(update: Update) -> Iterator[tuple[list[list[Tensor]], Tensor, Tensor | None]]:
    """(planes per slot, gradient, global index where random bits are needed), chunk by chunk in row-major order.

    A tensor that is not contiguous is one chunk: the operations are elementwise, so its strides do not matter.
    """
    tensors = [update.grad, *(plane for planes in update.slots for plane in planes)]
    index = update.region.index(update.grad.device) if update.strategy.stochastic else None
    if not all(t.is_contiguous() for t in tensors):
        yield [list(planes) for planes in update.slots], update.grad, index
        return
    for i in range(0, update.grad.numel(), CHUNK):
        chunk = slice(i, i + CHUNK)
        slots = [[plane.view(-1)[chunk] for plane in planes] for planes in update.slots]
        yield slots, update.grad.view(-1)[chunk], None if index is None else index.view(-1)[chunk]


def _gradient(grad: Tensor, register: torch.dtype, maximize: bool) -> Tensor:
    g = grad.float() if register == torch.float32 else mcf.rn(grad.float(), register)
    return -g if maximize else g


def _random(update: Update, index: Tensor | None) -> list[Tensor | None]:
    return [
        update.stream.bits(index, slot) if index is not None and fmt.stochastic else None
        for slot, fmt in enumerate(update.strategy.formats)
    ]
