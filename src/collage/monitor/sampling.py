"""Which elements of a parameter the shadow follows: one in ``stride``, in runs of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from collage.backends import Region
from collage.formats import Format
from collage.layout import Layout, Planes, as_rows
from collage.sharding import cut_rows, local, region
from collage.strategies import is_small

RUN = 16  # neighbours: elements far apart would each cost a cache line
BLOCK = 128  # neighbours of a row, where a format may have a scale for so many


def in_rows(fmt: Layout, planes: Planes) -> Planes:
    """Sampled planes as a format, which may have a word for each row, is given them: flat elements are rows of one."""
    if planes[0].dim() > 1:
        return planes
    return [own[:, None] if plane.per == 1 else own for plane, own in zip(fmt.planes, planes, strict=True)]


def value(fmt: Format, planes: Planes) -> Tensor:
    """The numbers that sampled planes stand for, float32."""
    return fmt.value(in_rows(fmt, planes)).view(planes[0].shape)


def components(fmt: Format, planes: Planes) -> Planes:
    """What EDQ differences of sampled planes."""
    return [x.view(planes[0].shape) for x in fmt.components(in_rows(fmt, planes))]


class Sampling:
    """Of one parameter. Ranks that share it have of their parts, together, what one process has of the whole.

    Where formats may have a scale for a block of a row, runs are whole blocks or whole rows.

    flat: elements stand for themselves: the parameter is small, so that its formats have no blocks, or shards cut them.
    """

    def __init__(self, param: Tensor, stride: int) -> None:
        self.stride, self.shape = stride, local(param).shape
        self._small = is_small(param.shape)
        self.flat = self._small or cut_rows(param, BLOCK) is not None
        self._place, self._numel = region(param), param.numel()
        self._columns = as_rows(param.shape)[1]
        self._length = RUN if self._small else self._columns if stride == 1 else min(BLOCK, self._columns)
        self._all = stride == 1 or (self._small and self._numel <= RUN)
        self._indices: dict[tuple[int | None, torch.device], Tensor] = {}

    @property
    def run(self) -> tuple[int, ...]:
        """The shape of one of the things that a sample is a list of."""
        return () if self.flat else (as_rows(self.shape)[1] if self._all else self._length,)

    def take(self, plane: Tensor, per: int | None = 1) -> Tensor:
        """Of a plane with a word for ``per`` elements: [runs, words], [runs] for a word per row, [elements] if flat.

        A view where that can be.
        """
        if self._all and (per == 1 or not self.flat):
            return plane if per != 1 else plane.reshape(-1) if self.flat else plane.reshape(as_rows(self.shape))
        if per == 1 and plane.is_contiguous():
            if self._small and self.shape.numel() == self._numel:
                return plane.view(-1).unfold(0, RUN, RUN * self.stride).reshape(-1)
            if not self.flat and as_rows(self.shape)[1] == self._each * self._length:
                first = self._first * self.stride - self._place.starts[0] * self._each
                return plane.view(-1, self._length)[first :: self.stride]
        if (per, plane.device) not in self._indices:
            self._indices[per, plane.device] = self._index(per).to(plane.device)
        words = plane.view(torch.uint8) if plane.dtype == torch.float8_e4m3fn else plane  # which torch does not take
        return words.take(self._indices[per, plane.device]).view(plane.dtype)

    def drawn(self, shape: Sequence[int]) -> Region:
        """Where this rank's sample, of that shape, lies in that of the whole, so that it draws the same random bits.

        Not where rows are cut: then it is only where the first of it lies.
        """
        return Region(tuple(shape), (self._runs[0], 0)[: len(shape)], (torch.Size(self.run).numel(), 1)[: len(shape)])

    @property
    def _each(self) -> int:
        """Runs in a row of the whole."""
        return self._columns // self._length

    @property
    def _first(self) -> int:
        """How many runs of the whole's sample begin before those that may reach into this part."""
        if self._small:
            return sum(map(int.__mul__, self._place.starts, self._place.strides)) // (RUN * self.stride)
        return -(-self._place.starts[0] * self._each // self.stride)

    @property
    def _starts(self) -> Tensor:
        """Where they begin, row-major in the whole."""
        first = self._first * self.stride
        if self._small:
            end = self._numel if self._all else self._numel - RUN + 1
            return torch.arange(first * RUN, max(end, first * RUN), RUN * self.stride, device="cpu")
        end = (self._place.starts[0] + self._place.sizes[0]) * self._each
        runs = torch.arange(first, max(end, first), self.stride, device="cpu")
        return runs // self._each * self._columns + runs % self._each * self._length

    @cached_property
    def _runs(self) -> tuple[int, Tensor]:
        """(where the first thing of this rank's sample is in that of the whole, row-major index here of each)."""
        first, index = self._first, self._starts
        if self.flat:
            first *= self._length
            index = (index[:, None] + torch.arange(self._length, device="cpu")).view(-1)
        inside, here = torch.ones_like(index, dtype=torch.bool), torch.zeros_like(index)
        for size, start, stride in zip(*self._place, strict=True):
            at, index = index // stride - start, index % stride
            inside, here = inside & (at >= 0) & (at < size), here * size + at
        found = inside.nonzero()
        return first + (int(found[0]) if len(found) else 0), here[inside]

    def _index(self, per: int | None) -> Tensor:
        """Which words of a plane of this part are taken."""
        index, columns = self._runs[1], max(1, as_rows(self.shape)[1])
        if per is None:
            return index // columns
        if self.flat:
            return index
        first = index // columns * -(-columns // per) + index % columns // per
        return first[:, None] + torch.arange(-(-self._length // per), device="cpu")
