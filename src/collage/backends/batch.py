"""What a step is made of: a batch, which is the columns of one call of a backend, and a row of it, one parameter's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.formats import Format, format_of
from collage.layout import Planes
from collage.rng import Stream
from collage.rules import Rule


class Region(NamedTuple):
    """Where a shard lies in the unsharded tensor: per dimension its size, first index and the global stride."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    strides: tuple[int, ...]

    def indices(self, device: torch.device) -> Tensor:
        """int64 row-major index in the unsharded tensor, of every local element."""
        total = torch.zeros((), dtype=torch.int64, device=device)
        for size, start, stride in zip(self.sizes, self.starts, self.strides, strict=True):
            total = total.unsqueeze(-1) + (torch.arange(size, device=device) + start) * stride
        return total


class Row(NamedTuple):
    """One parameter's share of a step. Tensors are local (never DTensors); planes are written in place."""

    slots: tuple[Planes, ...]  # planes of each of the rule's slots
    grad: Tensor | None  # the parameter's dtype or float32
    step: int  # t, from 1
    key: int = 0  # of the parameter's random bits, below 2**64
    region: Region | None = None  # None: not sharded
    sums: Tensor | None = None  # [5] float64, on the CPU: `reference.SUMS` are added to it

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.slots[0][0].shape


@dataclass(frozen=True, slots=True)
class Batch:
    """All parameters of one group, strategy, device and gradient dtype, as columns: one call of a backend."""

    rule: Rule
    formats: tuple[str, ...]  # of each of the rule's slots
    register: torch.dtype  # of the arithmetic
    lr: float | Tensor
    hyper: Sequence[float]  # the rule's other settings
    maximize: bool
    seed: int  # of stochastic rounding, below 2**64
    planes: Sequence[Tensor]  # of every parameter in turn: those of each slot
    grads: Sequence[Tensor]  # none, if the rule reads none
    steps: Sequence[int]  # t, from 1
    keys: Sequence[int] = ()  # none: nothing is random
    regions: Sequence[Region] = ()  # none: nothing is sharded
    sums: Sequence[Tensor] = ()  # none: not measured
    counters: Sequence[Tensor] = ()  # 0-d int64: t, where the backend is to read it and lr on the device; then no steps
    scale: float | Tensor = 1.0  # the gradients are this many times what they should be
    skip: Tensor | None = None  # on the device: not 0 if nothing is to be done, nor counted
    kept: dict[str, Any] | None = None  # what backends keep from step to step of planes that are known to be the same

    @property
    def width(self) -> int:
        """Planes of one parameter."""
        return widths(self.formats)[-1]

    @property
    def layouts(self) -> tuple[Format, ...]:
        """The formats themselves."""
        return tuple(map(format_of, self.formats))

    @property
    def stochastic(self) -> bool:
        """Whether any slot that is written rounds stochastically."""
        return stochastic(self.rule, self.formats)

    def constants(self, step: int) -> Any:
        """The folded constants of a step, as floats."""
        return folded(self.rule, float(self.lr), tuple(self.hyper), step, self.register)

    def own(self, k: int) -> Sequence[Tensor]:
        """The planes of one parameter."""
        return self.planes[k * self.width : (k + 1) * self.width]

    def visible(self) -> Sequence[Tensor]:
        """The first plane of every parameter: it has their shape, device and strides."""
        return self.planes[:: self.width]

    def rows(self) -> Iterator[Row]:
        """Parameter after parameter."""
        for k in range(len(self.planes) // self.width):
            yield Row(
                cut(self.formats, self.own(k)), self.grads[k] if self.grads else None,
                self.steps[k] if self.steps else 0, self.keys[k] if self.keys else 0,
                self.regions[k] if self.regions else None, self.sums[k] if self.sums else None,
            )  # fmt: skip

    def stream(self, row: Row) -> Stream:
        """The random bits of one parameter at this step."""
        return Stream(self.seed, row.step, row.key)

    def counted(self, measured: bool = False) -> Batch:
        """The same with the numbers of the steps that its counters are about to make, and with sums if measured."""
        sums = torch.zeros(len(self.counters) if measured else 0, 5, dtype=torch.float64, device="cpu")
        return replace(self, steps=[int(counter) + 1 for counter in self.counters], sums=list(sums))

    def take(self, positions: Sequence[int]) -> Batch:
        """The same step of these parameters only, in order."""
        if len(positions) * self.width == len(self.planes):
            return self

        def taken(column: Sequence[Any]) -> list[Any]:
            return [column[k] for k in positions] if column else []

        return replace(
            self, planes=[plane for k in positions for plane in self.own(k)],
            grads=taken(self.grads), steps=taken(self.steps), keys=taken(self.keys), regions=taken(self.regions),
            sums=taken(self.sums), counters=taken(self.counters), kept=None,
        )  # fmt: skip


@lru_cache(maxsize=256)  # parameters that step one by one share them
def folded(rule: Rule, lr: float, hyper: tuple[float, ...], step: int, register: torch.dtype) -> Any:
    """The constants of a rule's step. Raises ValueError, naming the setting, where one would become 0 in a register."""
    return rule.fold(lr, hyper, step, register)


@cache
def widths(formats: tuple[str, ...]) -> tuple[int, ...]:
    """Where the planes of each slot begin among those of a parameter, and how many there are in all."""
    return tuple(accumulate((len(format_of(name).planes) for name in formats), initial=0))


@cache
def stochastic(rule: Rule, formats: tuple[str, ...]) -> bool:
    """Whether any slot that is written rounds stochastically."""
    return any(format_of(name).stochastic for slot, name in zip(rule.slots, formats, strict=True) if slot.written)


def cut(formats: tuple[str, ...], planes: Sequence[Tensor]) -> tuple[Planes, ...]:
    """A parameter's planes, slot by slot."""
    return tuple(planes[i:j] for i, j in pairwise(widths(formats)))


class Noise(NamedTuple):
    """The random bits for encoding tensors under one state prefix; columns as in a `Batch`."""

    prefix: str
    seed: int
    steps: Sequence[int]
    keys: Sequence[int]
    regions: Sequence[Region] = ()

    def of(self, k: int, shape: torch.Size, device: torch.device) -> Tensor:
        """16 bits for every element of the k-th tensor."""
        return Stream(self.seed, self.steps[k], self.keys[k]).bits(
            indices(self.regions[k] if self.regions else None, shape, device), self.prefix
        )


def indices(region: Region | None, shape: torch.Size, device: torch.device) -> Tensor:
    """int64 row-major index in the unsharded tensor, of every element of a (local) tensor."""
    if region is not None:
        return region.indices(device)
    return torch.arange(shape.numel(), device=device).view(shape)
