"""Which elements of a parameter the shadow follows: one in ``stride``, in runs of neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from collage.layout import as_rows

RUN = 16  # neighbours: elements far apart would each cost a cache line
BLOCK = 128  # neighbours of a row, where a format may have a scale for so many


class Sampling(NamedTuple):
    """Of one parameter, row-major. Where it may have a scale for a block of a row, runs are whole blocks or whole rows.

    shape: of its local part; small: whether its formats have no blocks.
    """

    shape: torch.Size
    small: bool
    stride: int

    @property
    def width(self) -> int:
        """Elements of a run; 0 for a small parameter, whose elements stand for themselves."""
        columns = as_rows(self.shape)[1]
        return 0 if self.small else columns if self.stride == 1 else min(BLOCK, columns)

    def take(self, plane: Tensor, per: int | None = 1) -> Tensor:
        """Of a plane with a word for ``per`` elements: [runs, words], [runs] for a word per row, [words] if small.

        A view where that can be.
        """
        width, (rows, columns) = self.width, as_rows(self.shape)
        if width == 0:
            return self._flat(plane)
        if per == 1 and columns % width == 0 and plane.is_contiguous():
            return plane.view(-1, width)[:: self.stride]
        each = columns // width
        runs = torch.arange(0, rows * each, self.stride, device=plane.device)
        if per is None:
            return plane.take(runs // each)
        first = runs // each * -(-columns // per) + runs % each * width // per
        return plane.take(first[:, None] + torch.arange(-(-width // per), device=plane.device))

    def _flat(self, plane: Tensor) -> Tensor:
        if self.stride == 1 or plane.numel() <= RUN:
            return plane.reshape(-1)
        if plane.is_contiguous():
            return plane.view(-1).unfold(0, RUN, RUN * self.stride).reshape(-1)
        first = torch.arange(0, plane.numel() - RUN + 1, RUN * self.stride, device=plane.device)
        return plane.take((first[:, None] + torch.arange(RUN, device=plane.device)).view(-1))
