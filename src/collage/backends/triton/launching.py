"""Launches: the tensors of one on the device, how many programs there are, and the constants of a step's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.backends.batch import Batch, Region
from collage.backends.triton.fold import fold
from collage.backends.triton.formats import FORMATS
from collage.backends.triton.memory import MASKED, STRIDED
from collage.backends.triton.rules import RULES
from collage.backends.triton.tables import BLOCK, Layout, bases_of, layout_of, owners_of, rows_of, table_of
from collage.formats import format_of
from collage.rng import mix64, signed
from collage.rules.folding import row

WARP = 64 if torch.version.hip else 32
OPTIONS = {"num_warps": BLOCK // WARP // 8, "enable_fp_fusion": False}  # 8 elements a thread: 16 bytes of bfloat16


@cache
def warps(formats: tuple[str, ...], plain: bool, warp: int = WARP) -> int:
    """Of a step's program. A thread has 8 elements, or 16 where planes of one byte prevail and registers suffice.

    They do not where a step is not plain, but measured or strided, nor with AMD's 64 threads to a warp; there a thread
    has 4 where rows are walked whole, or 2.
    """
    if warp == 64 and any(FORMATS[name].whole_rows for name in formats):
        return BLOCK // warp // (4 if plain else 2)
    return BLOCK // warp // (16 if plain and warp == 32 and narrow(formats) else 8)


def narrow(formats: tuple[str, ...]) -> bool:
    """Whether planes of one byte prevail."""
    sizes = [plane.dtype.itemsize for name in formats for plane in format_of(name).planes if plane.per == 1]
    return 2 * sizes.count(1) >= len(sizes)


@cache
def registers(formats: tuple[str, ...], generation: int) -> dict[str, int]:
    """The most that a thread may have, as an option, where NVIDIA's compiler is to be told.

    For sm_8x it aims at 168 for rows of e4m3 weights and their moments, and spills some; told to, it finds room.
    """
    rows = len(formats) > 2 and narrow(formats) and any(FORMATS[name].whole_rows for name in formats)
    return {"maxnreg": 168} if generation == 8 and rows else {}


def generation_of(device: torch.device) -> int:
    """8 for sm_80, say; 0 where it is not NVIDIA's."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and not torch.version.hip else 0


class Launch(NamedTuple):
    """Tensors on the device, and how many programs there are."""

    layout: Layout
    device: torch.device
    width: int  # planes of a tensor
    unit: int  # elements of a row that are not parted

    @property
    def blocks(self) -> int:
        return self.layout.first[-1]

    @property
    def in_order(self) -> bool:
        """Whether every element lies, and draws the bits, where its index says."""
        return len(self.layout.shapes) == 1

    @property
    def shape(self) -> dict[str, Any]:
        """What a kernel's plan has to know of them."""
        rest = MASKED if self.in_order else STRIDED
        return {"columns": self.layout.rows.shape[1], "rest": rest.value, "by_rows": self.unit > 1}

    def tables(self, fronts: Sequence[Tensor], which: Sequence[int] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """(table, owners, shapes)"""
        rows, shapes = rows_of(self.layout, fronts, which), self.layout.shapes
        return to_device(self.device, rows), self._owners(), to_device(self.device, shapes)

    def _owners(self) -> Tensor:
        """Kept; but what a capture makes belongs to its graph."""
        if capturing(self.device):
            return to_device(self.device, owners_of(self.layout))
        if self.layout.owners is None:
            self.layout.owners = to_device(self.device, owners_of(self.layout))
        return self.layout.owners


def launch_of(
    formats: tuple[str, ...], planes: Sequence[Tensor], fronts: Sequence[Tensor], regions: Sequence[Region] = (),
    kept: dict[str, Any] | None = None, unit: int | None = None,
) -> Launch:  # fmt: skip
    width = sum(len(FORMATS[name].words) for name in formats)
    unit = unit or unit_of(formats)
    return Launch(layout_of(planes, fronts, width, regions, unit, kept), planes[0].device, width, unit)


@cache
def unit_of(formats: tuple[str, ...], summed: bool = False) -> int:
    """How many elements of a row go together: those that share a word and, where some do, those that are summed."""
    unit = max(FORMATS[name].unit for name in formats)
    return max(unit, BLOCK) if summed and unit > 1 else unit


def folded_on_host(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Sequence[int]]:
    """(constants of every distinct step, streams of random bits, which constants each tensor takes)."""
    distinct = {step: k for k, step in enumerate(dict.fromkeys(batch.steps))}
    constants = torch.tensor([row(batch.constants(step)) for step in distinct], dtype=torch.float32, device="cpu")
    streams = bases_of(batch.seed, batch.steps, batch.keys) if batch.keys else table_of([0])
    which = [distinct[step] for step in batch.steps] if len(distinct) > 1 else ()
    return to_device(device, constants), to_device(device, streams), which


def folded_on_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Sequence[int]]:
    """The same, folded on the device from its own step and lr."""
    n, rule = len(batch.counters), RULES[batch.rule.name]
    constants = torch.empty(n, rule.columns, dtype=torch.float32, device=device)
    streams = torch.empty(n if batch.keys else 0, dtype=torch.int64, device=device)
    tables = (
        table_of([counter.data_ptr() for counter in batch.counters]),
        table_of(list(map(signed, batch.keys))),
        table_of([signed(mix64(batch.seed))]),
        scalar(batch.lr, torch.float64, device),
        torch.tensor(list(batch.hyper), dtype=torch.float64, device="cpu"),
    )
    with current(device):
        fold[(n,)](
            *(to_device(device, table) for table in tables), constants, streams, RULE=rule, SETTINGS=len(batch.hyper),
            NARROW=batch.register == torch.bfloat16, RANDOM=bool(batch.keys), **OPTIONS,
        )  # fmt: skip
    return constants, streams, range(n)


def scalar(x: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return to_device(device, x.to(dtype) if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype, device="cpu"))


def current(device: torch.device) -> Any:
    """Triton launches on torch's current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_kept: list[Tensor] = []  # what captured graphs read again at every replay


def to_device(device: torch.device, table: Tensor) -> Tensor:
    """On the device, without waiting for it."""
    if device.type != "cuda" or table.device.type != "cpu":
        return table.to(device)
    pinned = table.pin_memory()
    if capturing(device):
        _kept.append(pinned)
    return pinned.to(device, non_blocking=True)
