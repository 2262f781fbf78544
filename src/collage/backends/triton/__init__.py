"""The Triton backend: one launch per batch on a GPU, bit for bit what the reference computes.

Under TRITON_INTERPRET=1 the same kernels run on tensors of the CPU, which is how they are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from collage.backends import Batch, Region
from collage.backends.triton import fold, walk
from collage.backends.triton.arithmetic import bf16, same
from collage.backends.triton.formats import BF16, FORMATS, FP16, FP32
from collage.backends.triton.language import static
from collage.backends.triton.rules import RULES
from collage.backends.triton.walk import MASKED, STRIDED, Slot
from collage.formats import Planes
from collage.rng import bases, mix64, signed
from collage.rules import Rule
from collage.rules.adamw import ADAMW
from collage.strategies import Strategy

BLOCK: int = walk.BLOCK.value
NUMEL, FIRST, ROW, OFFSET, ALIGNED, LAYOUT, DIMS, REGION, REGION_DIMS, WIDTH, ADDRESSES = range(
    walk.ADDRESSES.value + 1
)
FOLDS_ON_DEVICE = True
GRADIENTS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}
WARP = 64 if torch.version.hip else 32
STEP = ("RULE", "SLOTS", "GRADIENT", "ROUND", "MAXIMIZE", "RANDOM", "TENSORS", "BY_ROWS")
OPTIONS = {"num_warps": BLOCK // WARP // 8, "enable_fp_fusion": False}  # 8 elements a thread: 16 bytes of bfloat16


def step(batch: Batch) -> None:
    """Carry out the batch in one launch. Does not wait for the device, unless it is measured."""
    first = _first_blocks(batch.grads)
    if first[-1] == 0:
        return
    increment_version(batch.planes)  # as any in-place operation would
    device, measured = batch.grads[0].device, len(batch.sums) > 0
    tables, rest = _tables(batch, first, device)
    sums = torch.empty(first[-1] if measured else 0, 5, dtype=torch.float64, device=device)
    constants, streams = _fold(batch, device) if batch.counters else _folded(batch, device)
    with _current(device):
        kernel = _compiled_for(batch, *STEP, *OPTIONS)
        walk.step[(first[-1],)](*tables, constants, streams, sums, **kernel, REST=rest, MEASURED=measured)
    if measured:
        totals = _to(device, torch.stack(list(batch.sums)))
        with _current(device):
            walk.add_up[(len(batch.grads),)](sums, _to(device, _table_of(first)), totals)
        for own, total in zip(batch.sums, totals.cpu(), strict=True):
            own.copy_(total)


def broken(strategy: Strategy, thetas: Sequence[Planes]) -> int:
    """How many elements of all parameters' theta have planes that no step could have left."""
    if len(strategy.formats[0].dtypes) == 1:
        return 0  # one plane cannot disagree
    visible = [planes[0] for planes in thetas]
    batch = _reading(ADAMW, strategy, [plane for planes in thetas for plane in planes], visible)
    device, first = visible[0].device, _first_blocks(visible)
    if first[-1] == 0:
        return 0
    tables, rest = _tables(batch, first, device)
    counts = torch.empty(first[-1], dtype=torch.int32, device=device)
    with _current(device):
        formats = _compiled_for(batch)
        walk.broken[(first[-1],)](
            *tables, counts, SLOT=formats["SLOTS"][0], TENSORS=1 + len(thetas[0]), **OPTIONS, REST=rest
        )
    return int(counts.sum())


def _reading(rule: Rule, strategy: Strategy, planes: Sequence[Tensor], grads: Sequence[Tensor]) -> Batch:
    """No step: only where things lie."""
    return Batch(rule, strategy, 0.0, (), False, 0, planes, grads, (), (), (), ())


def stream(rule: Rule, strategy: Strategy, planes: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Read and write all planes without arithmetic."""
    batch = _reading(rule, strategy, planes, grads)
    device, first = grads[0].device, _first_blocks(grads)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    formats = _compiled_for(batch, "SLOTS", "GRADIENT", "TENSORS", *OPTIONS)
    (rows, owners, _), _ = _tables(batch, first, device)
    with _current(device):
        walk.stream[(first[-1],)](rows, owners, zero, **formats)


def _tables(batch: Batch, first: tuple[int, ...], device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """(table, blocks and shapes of `walk.step`, on the device; its REST)."""
    rows, shapes = _table(batch, first)
    rest: int = (STRIDED if len(shapes) > 1 else MASKED).value
    return (_to(device, rows), _owners(device, first), _to(device, shapes)), rest


def _first_blocks(grads: Sequence[Tensor]) -> tuple[int, ...]:
    """Number of the first block of each tensor, and of all blocks."""
    return tuple(accumulate((-(-grad.numel() // BLOCK) for grad in grads), initial=0))


def _owners(device: torch.device, first: tuple[int, ...]) -> Tensor:
    """Which tensor each block is of. What a capture makes belongs to its graph."""
    return _make_owners(device, first) if _capturing(device) else _kept_owners(device, first)


@lru_cache(maxsize=16)  # 4 bytes per block, for every set of sizes that steps together
def _kept_owners(device: torch.device, first: tuple[int, ...]) -> Tensor:
    return _make_owners(device, first)


def _make_owners(device: torch.device, first: tuple[int, ...]) -> Tensor:
    return _to(device, torch.repeat_interleave(_table_of(first).diff()).to(torch.int32))


def _compiled_for(batch: Batch, *wanted: str) -> dict[str, Any]:
    """What makes one kernel differ from another: all of it, or what is wanted."""
    names = batch.strategy.param, batch.strategy.momentum, batch.strategy.variance
    narrow = batch.strategy.arithmetic == "bfloat16"
    everything = {
        "RULE": RULES[batch.rule.name], "SLOTS": slots(names), "TENSORS": 1 + len(batch.planes) // len(batch.grads),
        "GRADIENT": GRADIENTS[batch.grads[0].dtype], "ROUND": bf16 if narrow else same, "NARROW": narrow,
        "MAXIMIZE": batch.maximize, "RANDOM": batch.strategy.stochastic, "BY_ROWS": False, **OPTIONS,
    }  # fmt: skip
    return {key: everything[key] for key in wanted} if wanted else everything


def slots(names: Sequence[str]) -> tuple[Any, ...]:
    """A rule's slots, as kernels take them."""
    firsts = accumulate((len(FORMATS[name].words) for name in names), initial=1)
    return tuple(
        static(Slot(static(FORMATS[name]), first, k))
        for k, (name, first) in enumerate(zip(names, firsts, strict=False))
    )


def _folded(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """(constants, stream of random bits) of every tensor, folded on the host."""
    rows = {step: batch.constants(step).row() for step in set(batch.steps)}
    streams = bases(batch.seed, batch.steps, batch.keys) if batch.keys else []
    return (
        _to(device, _table_of([rows[step] for step in batch.steps], torch.float32)),
        _to(device, _table_of(list(map(signed, streams)))),
    )


def _fold(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same, folded on the device from its own step and lr."""
    n = len(batch.counters)
    constants = torch.empty(n, batch.rule.constants, dtype=torch.float32, device=device)
    streams = torch.empty(n if batch.keys else 0, dtype=torch.int64, device=device)
    tables = (
        _table_of([counter.data_ptr() for counter in batch.counters]),
        _table_of(list(map(signed, batch.keys))),
        _table_of([signed(mix64(batch.seed))]),
        batch.lr.double() if isinstance(batch.lr, Tensor) else _table_of(batch.lr, torch.float64),
        _table_of(list(batch.hyper), torch.float64),
    )
    with _current(device):
        fold.fold[(n,)](
            *(_to(device, table) for table in tables), constants, streams,
            FOLD=fold.FOLDS[batch.rule.name], **_compiled_for(batch, "RULE", "NARROW", "RANDOM", *OPTIONS),
        )  # fmt: skip
    return constants, streams


def _table(batch: Batch, first: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(a row per tensor, as walk.py describes it; sizes and strides that rows point into)."""
    n, width = len(batch.grads), len(batch.planes) // len(batch.grads)
    rows = torch.zeros(n, ADDRESSES + 1 + width, dtype=torch.int64, device="cpu")
    rows[:, ADDRESSES] = _table_of(list(map(Tensor.data_ptr, batch.grads)))
    rows[:, ADDRESSES + 1 :] = _table_of(list(map(Tensor.data_ptr, batch.planes))).view(n, width)
    rows[:, NUMEL] = _table_of(list(map(Tensor.numel, batch.grads)))
    rows[:, FIRST] = _table_of(first[:-1])
    rows[:, ROW] = _table_of(range(n))
    rows[:, ALIGNED] = (rows[:, ADDRESSES:] % 16 == 0).all(1).long()
    shapes: list[int] = [0]
    if batch.regions or not all(map(Tensor.is_contiguous, (*batch.planes, *batch.grads))):
        for k, row in enumerate(rows):
            in_memory, region = _layout(batch, k), batch.regions[k] if batch.regions else None
            _describe(row, in_memory, *(_place(region) if region else (0, [])), shapes)
    return rows, _table_of(shapes)


def _describe(row: Tensor, layout: list[int], offset: int, place: list[int], shapes: list[int]) -> None:
    """Where a tensor's elements lie in memory, and from which index on in the unsharded tensor, if not in order."""
    row[OFFSET] = offset
    row[LAYOUT], row[DIMS] = len(shapes), len(layout) // (len(row) - ADDRESSES + 1)
    shapes += layout
    row[REGION], row[REGION_DIMS] = len(shapes), len(place) // 2
    shapes += place
    if layout or place:
        _require_small(int(row[NUMEL]))
        row[ALIGNED] = 0


def _layout(batch: Batch, k: int) -> list[int]:
    """Sizes, then the strides of the gradient and of every plane; nothing if all are contiguous."""
    tensors = [batch.grads[k], *batch.own(k)]
    if all(map(Tensor.is_contiguous, tensors)):
        return []
    return [*tensors[0].shape, *chain.from_iterable(map(Tensor.stride, tensors))]


def _place(region: Region) -> tuple[int, list[int]]:
    """(index of the first element in the unsharded tensor, sizes and strides there; none if it is one run)."""
    offset = sum(start * stride for start, stride in zip(region.starts, region.strides, strict=True))
    run = 1
    for size, stride in reversed(list(zip(region.sizes, region.strides, strict=True))):
        if size != 1 and stride != run:
            return offset, [*region.sizes, *region.strides]
        run *= size
    return offset, []


def _require_small(numel: int) -> None:
    if numel >= 2**31:
        raise ValueError(
            f"params: a tensor of {numel} elements that is not contiguous, or sharded by columns; from 2**31 on the "
            "Triton backend needs contiguous ones (p.data = p.data.contiguous()), or use backend='reference'"
        )


def _current(device: torch.device) -> Any:
    """Triton launches on torch's current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_kept: list[Tensor] = []  # what captured graphs read again at every replay


def _table_of(numbers: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """A table on the host, whatever torch's default device and dtype are."""
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def _to(device: torch.device, table: Tensor) -> Tensor:
    """On the device, without waiting for it."""
    if device.type != "cuda" or table.device.type != "cpu":
        return table.to(device)
    pinned = table.pin_memory()
    if _capturing(device):
        _kept.append(pinned)
    return pinned.to(device, non_blocking=True)
