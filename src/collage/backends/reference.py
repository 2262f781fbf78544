"""The reference backend: the definition of a step, in plain PyTorch, on any device.

Pure functions on whole tensors; `step` and `encode` walk them piece by piece and are the only ones that write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from collage import mcf
from collage.backends.batch import Batch, Noise, Row, cut, indices
from collage.formats import Format, format_of, split
from collage.layout import PIECE, Planes, aligned
from collage.rules.folding import tensors

FOLDS_ON_DEVICE = False
CHUNK = 1 << 15  # elements, a multiple of BLOCK: stays in cache, and below what torch splits over threads
BLOCK = 1024  # elements summed by pairwise halving
SUMS = ("dot", "dot_visible", "norm2", "nonzero", "lost")


def step(batch: Batch) -> None:
    """Carry out the batch, parameter after parameter."""
    increment_version(written(batch))  # once, as by any in-place operation; the writes below count for nothing
    constants: dict[tuple[int, torch.device], Any] = {}
    for row in batch.rows():
        device = row.slots[0][0].device
        if (row.step, device) not in constants:
            constants[row.step, device] = tensors(batch.constants(row.step), batch.register, device)
        for slots, grad, random in _chunks(batch, row):
            g = gradient(batch, grad) if grad is not None else torch.zeros((), dtype=batch.register, device=device)
            delta, new = advance(batch, slots, g, constants[row.step, device], random)
            if row.sums is not None and delta is not None:
                in_rows = delta.shape if not all(fmt.elementwise for fmt in batch.layouts) else (1, delta.numel())
                measure(batch.layouts[0], slots[0], new[0], delta, row.sums, in_rows)
            for slot, planes, fresh in zip(batch.rule.slots, slots, new, strict=True):
                for plane, value in zip(planes if slot.written else (), fresh, strict=False):
                    plane.copy_(value)


def written(batch: Batch) -> list[Tensor]:
    """What a step writes to and others may look at: the weights, or what stands in the first slot of a rule."""
    return list(batch.visible())


def count_up(steps: Sequence[Tensor], addresses: Sequence[int] | None = None, read: bool = True) -> list[int]:
    """Every counter plus one; the counts, if they are to be read."""
    torch._foreach_add_(list(steps), 1)
    return [int(step) for step in steps] if read else []


def decode(format: str, planes: Sequence[Planes], out: Sequence[Tensor]) -> None:
    """out[k] <- the float32 number that planes[k] stand for."""
    fmt = format_of(format)
    for own, result in zip(planes, out, strict=True):
        numbers = result if fmt.elementwise else torch.empty(result.shape, dtype=torch.float32, device=result.device)
        for *piece, part in aligned([fmt], [own], [numbers], PIECE):
            part.copy_(fmt.value(piece))
        if numbers is not result:
            result.copy_(numbers)


def encode(format: str, values: Sequence[Tensor], planes: Sequence[Planes], noise: Noise | None = None) -> None:
    """planes[k] <- values[k], float32, rounded to nearest, or stochastically with noise."""
    fmt = format_of(format)
    for k, (own, x) in enumerate(zip(planes, values, strict=True)):
        if x.numel() == 0:
            continue  # its rows have scales nevertheless, which stay
        drawn = [noise.of(k, x.shape, x.device)] if noise and fmt.stochastic else []
        for piece in aligned([fmt], [own], [x, *drawn], PIECE):
            for plane, value in zip(piece, split(fmt, *piece[len(own) :]), strict=False):
                plane.copy_(value)


def broken(format: str, thetas: Sequence[Planes]) -> int:
    """How many elements of all parameters' theta have planes that no step could have left."""
    fmt = format_of(format)
    return sum(int(fmt.broken(piece).sum()) for own in thetas for piece in aligned([fmt], [own], [], PIECE))


def squares(grads: Sequence[Tensor]) -> Tensor:
    """The sums of the squares of each gradient's elements, float64, in an order that is the same on every backend.

    Blocks of BLOCK elements are halved pairwise, their sums again in blocks of BLOCK; what is left is added in turn.
    """
    sums = torch.zeros(len(grads), dtype=torch.float64, device="cpu")
    for k, grad in enumerate(grads):
        pieces = [
            _halved(piece.double().square().reshape(1, -1)) for (piece,) in aligned([], [], [grad.detach()], PIECE)
        ]
        _add_in_blocks(torch.cat(pieces).view(1, -1), sums, k)
    return sums.to(grads[0].device if grads else "cpu")


def stream(formats: tuple[str, ...], planes: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Read all planes and gradients, and write the planes, without arithmetic."""
    for tensor in (*planes, *grads):
        tensor.copy_(tensor.clone())


def advance(
    batch: Batch,
    slots: Sequence[Planes],
    g: Tensor,
    constants: Any,  # the rule's, as tensors
    random: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[tuple[Tensor, ...]]]:
    """(intended update, new planes of every slot). Pure."""
    numbers = tuple(fmt.load(planes, batch.register) for fmt, planes in zip(batch.layouts, slots, strict=True))
    grown, delta = batch.rule.update(numbers, g, constants)
    return delta, [fmt.encode(x, bits) for fmt, x, bits in zip(batch.layouts, grown, random, strict=True)]


def measure(
    fmt: Format,
    old: Planes,
    new: Planes,
    delta: Tensor,
    sums: Tensor,
    in_rows: Sequence[int],  # as blocks are cut
) -> None:
    """Add one chunk's SUMS to ``sums``: three float64 sums and two counts.

    Intended update Delta; arrived update = sum over components, last first, of new - old, each in float64.
    """
    intended = delta.double()
    arrived = torch.zeros_like(intended)
    for before, after in reversed(list(zip(fmt.components(old), fmt.components(new), strict=True))):
        arrived += after.double() - before.double()
    visible = fmt.visible(new).double() - fmt.visible(old).double()
    for k, terms in enumerate((intended * arrived, intended * visible, intended * intended)):
        _add_in_blocks(terms.reshape(*in_rows), sums, k)
    sums[3] += (delta != 0).sum().item()
    sums[4] += ((delta != 0) & ~fmt.moved(old, new)).sum().item()


def _add_in_blocks(terms: Tensor, sums: Tensor, k: int) -> None:
    """sums[k] += terms [rows, columns] in fixed order: halving pairwise in blocks of BLOCK of a row, then in turn."""
    total = sums[k].item()
    for block in _halved(terms).tolist():
        total += block
    sums[k] = total


def _halved(terms: Tensor) -> Tensor:
    """The sums of all blocks of BLOCK of terms [rows, columns], row after row, each by pairwise halving."""
    blocks = torch.nn.functional.pad(terms, (0, -terms.shape[1] % BLOCK)).view(-1, BLOCK)
    while blocks.shape[1] > 1:
        half = blocks.shape[1] // 2
        blocks = blocks[:, :half] + blocks[:, half:]
    return blocks.flatten()


def _chunks(batch: Batch, row: Row) -> Iterator[tuple[tuple[Planes, ...], Tensor | None, list[Tensor | None]]]:
    """(planes per slot, gradient, random bits per slot), chunk by chunk in row-major order."""
    if row.shape.numel() == 0:
        return
    planes = [[plane.data for plane in own] for own in row.slots]
    others = [] if row.grad is None else [row.grad]
    if batch.stochastic:
        others.append(indices(row.region, row.shape, planes[0][0].device))
    for tensors_ in aligned(batch.layouts, planes, others, CHUNK):
        rest = tensors_[batch.width :]
        grad = rest[0] if row.grad is not None else None
        yield cut(batch.formats, tensors_[: batch.width]), grad, _random(batch, row, rest[-1] if rest else None)


def gradient(batch: Batch, grad: Tensor) -> Tensor:
    """As a rule reads it: unscaled in float32, then rounded to a register."""
    g = grad.float()
    if isinstance(batch.scale, Tensor) or batch.scale != 1.0:
        g = g / torch.as_tensor(batch.scale, dtype=torch.float32, device=g.device)
    g = mcf.rn(g, batch.register)
    return -g if batch.maximize else g


def _random(batch: Batch, row: Row, index: Tensor | None) -> list[Tensor | None]:
    return [
        batch.stream(row).bits(index, slot.prefix) if fmt.stochastic and slot.written and index is not None else None
        for slot, fmt in zip(batch.rule.slots, batch.layouts, strict=True)
    ]
