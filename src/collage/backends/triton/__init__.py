"""The Triton backend: one launch per batch on a GPU, bit for bit what the reference computes.

Under TRITON_INTERPRET=1 the same kernels run on tensors of the CPU, which is how they are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from collage.backends import reference
from collage.backends.batch import Batch, Noise
from collage.backends.reference import written
from collage.backends.triton import planes as of_planes
from collage.backends.triton import walk
from collage.backends.triton.arithmetic import bf16, same
from collage.backends.triton.format import BF16, FP16, FP32
from collage.backends.triton.formats import FORMATS
from collage.backends.triton.language import static
from collage.backends.triton.launching import (
    OPTIONS,
    Launch,
    current,
    folded_on_device,
    folded_on_host,
    generation_of,
    launch_of,
    registers,
    scalar,
    to_device,
    unit_of,
    warps,
)
from collage.backends.triton.rules import RULES
from collage.backends.triton.sums import add_up, add_up_halved
from collage.backends.triton.tables import bases_of, layout_of, table_of
from collage.backends.triton.walk import Plan, Slot
from collage.layout import Planes
from collage.rng import draw_of
from collage.rules import Rule

FOLDS_ON_DEVICE = True
count_up = reference.count_up
WORDS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}


def step(batch: Batch) -> None:
    """Carry out the batch in one launch. Does not wait for the device, unless it is measured."""
    if not batch.planes:
        return
    measured = bool(batch.sums) and batch.rule.has_delta
    unit = unit_of(batch.formats, measured)
    launch = launch_of(batch.formats, batch.planes, batch.grads, batch.regions, batch.kept, unit)
    if launch.blocks == 0:
        return
    increment_version(written(batch))  # as any in-place operation would
    device = launch.device
    sums = torch.empty(launch.blocks if measured else 0, 5, dtype=torch.float64, device=device)
    constants, streams, which = folded_on_device(batch, device) if batch.counters else folded_on_host(batch, device)
    tables = launch.tables(batch.grads, which)
    scale = scalar(batch.scale, torch.float32, device) if _scaled(batch) else constants
    skip = constants if batch.skip is None else scalar(batch.skip, torch.float32, device)
    plan = _plan(
        batch.rule, batch.formats, batch.register, batch.grads[0].dtype if batch.grads else None, **launch.shape,
        maximize=batch.maximize, scaled=_scaled(batch), skips=batch.skip is not None, measured=measured,
    )  # fmt: skip
    options = OPTIONS | {"num_warps": warps(batch.formats, launch.in_order and not measured)}
    options |= registers(batch.formats, generation_of(device))
    with current(device):
        walk.step[(launch.blocks,)](*tables, constants, streams, scale, skip, sums, PLAN=plan, **options)
    if measured:
        _add_up(sums, launch, batch.sums)


def _scaled(batch: Batch) -> bool:
    return isinstance(batch.scale, Tensor) or batch.scale != 1.0


def _add_up(sums: Tensor, launch: Launch, totals: Sequence[Tensor]) -> None:
    """Waits for the device."""
    device = launch.device
    on_device = to_device(device, torch.stack(list(totals)))
    with current(device):
        add_up[(len(totals),)](sums, to_device(device, table_of(launch.layout.first)), on_device)
    for own, total in zip(totals, on_device.cpu(), strict=True):
        own.copy_(total)


@cache
def _plan(
    rule: Rule, formats: tuple[str, ...], register: torch.dtype, gradient: torch.dtype | None, **others: Any
) -> Plan:
    slots = slots_of(rule, formats)
    return Plan(
        slots=tuple(map(static, slots)), rule=static(RULES[rule.name]), gradient=WORDS[gradient] if gradient else None,
        ROUND=bf16 if register == torch.bfloat16 else same, shared=any(map(_shares, slots)),
        whole_rows=any(slot.takes_rows for slot in slots), **others,
    )  # fmt: skip


def slots_of(rule: Rule, formats: tuple[str, ...]) -> list[Slot]:
    """A rule's slots, as kernels know them."""
    slots: list[Slot] = []
    first = 1
    for slot, name in zip(rule.slots, formats, strict=True):
        slots.append(Slot(static(FORMATS[name]), first, slot.written, *draw_of(slot.prefix)))
        first += len(FORMATS[name].words)
    return slots


def _shares(slot: Slot) -> bool:
    """Whether it draws from the words that slots share."""
    return slot.stochastic and slot.written and slot.salt == 0


@cache
def _plan_of_one(format: str, random: bool, salt: int, part: int, **others: Any) -> Plan:
    """For the planes of one slot."""
    known = FORMATS[format] if random else FORMATS[format].nearest
    slot = Slot(static(known), 1, True, salt, part)
    return Plan(slots=(static(slot),), shared=_shares(slot), **others)


def decode(format: str, planes: Sequence[Planes], out: Sequence[Tensor]) -> None:
    """out[k] <- the float32 number that planes[k] stand for."""
    flat = [plane for own in planes for plane in own]
    launch = launch_of((format,), flat, out) if flat else None
    if launch is None or launch.blocks == 0:
        return
    increment_version(list(out))
    plan = _plan_of_one(format, False, 0, 0, **launch.shape)
    with current(launch.device):
        of_planes.decode[(launch.blocks,)](*launch.tables(out), PLAN=plan, **OPTIONS)


def encode(format: str, values: Sequence[Tensor], planes: Sequence[Planes], noise: Noise | None = None) -> None:
    """planes[k] <- values[k], float32, rounded to nearest, or stochastically with noise."""
    flat = [plane for own in planes for plane in own]
    launch = launch_of((format,), flat, values, noise.regions if noise else ()) if flat else None
    if launch is None or launch.blocks == 0:
        return
    increment_version(flat)
    random = noise is not None and FORMATS[format].stochastic
    streams = bases_of(noise.seed, noise.steps, noise.keys) if noise and random else table_of([0])
    salt, part = draw_of(noise.prefix) if noise and random else (0, 0)
    plan = _plan_of_one(format, random, salt, part, **launch.shape)
    tables, streams = launch.tables(values), to_device(launch.device, streams)
    tops = torch.zeros(launch.blocks if FORMATS[format].whole_rows else 0, dtype=torch.int32, device=launch.device)
    with current(launch.device):
        if FORMATS[format].whole_rows:
            of_planes.maxima[(launch.blocks,)](*tables, tops, PLAN=plan, **OPTIONS)
        of_planes.encode[(launch.blocks,)](*tables, streams, tops, PLAN=plan, **OPTIONS)


def broken(format: str, thetas: Sequence[Planes]) -> int:
    """How many elements of all parameters' theta have planes that no step could have left."""
    flat = [plane for own in thetas for plane in own]
    if FORMATS[format].broken is None or not flat:
        return 0  # one plane cannot disagree
    launch = launch_of((format,), flat, ())
    if launch.blocks == 0:
        return 0
    plan = _plan_of_one(format, True, 0, 0, **launch.shape)
    counts = torch.empty(launch.blocks, dtype=torch.int32, device=launch.device)
    with current(launch.device):
        of_planes.broken[(launch.blocks,)](*launch.tables(()), counts, PLAN=plan, **OPTIONS)
    return int(counts.sum())


def squares(grads: Sequence[Tensor]) -> Tensor:
    """The sums of the squares of each gradient's elements, float64. Does not wait for the device."""
    if not grads:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    dtypes = {grad.dtype for grad in grads}
    if len(dtypes) == 1:
        return _squares(grads)
    of_dtype = {dtype: iter(_squares([grad for grad in grads if grad.dtype == dtype])) for dtype in dtypes}
    return torch.stack([next(of_dtype[grad.dtype]) for grad in grads])


def _squares(grads: Sequence[Tensor]) -> Tensor:
    """Of one dtype, and one at least."""
    totals = torch.zeros(len(grads), dtype=torch.float64, device=grads[0].device)
    launch = Launch(layout_of(grads, (), 1, (), 1), totals.device, 1, 1)
    if launch.blocks == 0:
        return totals
    sums = torch.empty(launch.blocks, dtype=torch.float64, device=launch.device)
    plan = _plan_of_gradients(grads[0].dtype, **launch.shape)
    first = to_device(launch.device, table_of(launch.layout.first))
    with current(launch.device):
        of_planes.squares[(launch.blocks,)](*launch.tables(()), sums, PLAN=plan, **OPTIONS)
        add_up_halved[(len(grads),)](sums, first, totals)
    return totals


@cache
def _plan_of_gradients(dtype: torch.dtype, **others: Any) -> Plan:
    return Plan((), gradient=WORDS[dtype], **others)


def stream(formats: tuple[str, ...], planes: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Read and write all planes without arithmetic."""
    launch = launch_of(formats, planes, grads, unit=1)
    plan = _plan_of_all(formats, grads[0].dtype, **launch.shape)
    table, owners, _ = launch.tables(grads)
    zero = torch.zeros(1, dtype=torch.int32, device=launch.device)
    options = OPTIONS | {"num_warps": warps(formats, True)}
    with current(launch.device):
        of_planes.stream[(launch.blocks,)](table, owners, zero, PLAN=plan, **options)


@cache
def _plan_of_all(formats: tuple[str, ...], gradient: torch.dtype, **others: Any) -> Plan:
    slots, first = [], 1
    for name in formats:
        slots.append(static(Slot(static(FORMATS[name]), first)))
        first += len(FORMATS[name].words)
    return Plan(slots=tuple(slots), gradient=WORDS[gradient], **others)
