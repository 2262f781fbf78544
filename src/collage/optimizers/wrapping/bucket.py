"""A few parameters as another optimizer is given them: float32 numbers, in one piece of memory that lasts as long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from collage.sharding import in_rows, is_dtensor, local

NUMBERS = 4  # float32 numbers of an element while its optimizer steps: theta, gradient, and what that makes beside them


class Arena:
    """Memory for so many float32 numbers, from which tensors like parameters are cut."""

    def __init__(self, numel: int, device: torch.device) -> None:
        self._memory = torch.empty(numel, dtype=torch.float32, device=device)
        self._used = 0

    def like(self, param: Any) -> Any:
        """A float32 tensor of its shape and strides, sharded as it is. What is in it is not said."""
        part = local(param.detach())
        end = self._used + part.numel()
        if not part.is_contiguous() or end > self._memory.numel():
            return torch.empty_like(param.detach(), dtype=torch.float32)
        taken, self._used = self._memory[self._used : end].view(part.shape), end
        return in_rows(taken, param.shape, param) if is_dtensor(param) else taken

    def holds(self, value: object) -> bool:
        """Whether a tensor lies in it, and so cannot stay."""
        if not isinstance(value, Tensor):
            return False
        return local(value).untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr()


def numbers_of(param: Tensor, states: int) -> int:
    """How many float32 numbers it takes while its optimizer, which keeps so many states of its shape, steps."""
    return local(param).numel() * (NUMBERS + states)


def buckets(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Positions of those that are taken together: as many as fit, at least one."""
    taken: list[int] = []
    for k, size in enumerate(sizes):
        if taken and sum(sizes[j] for j in taken) + size > most:
            yield taken
            taken = []
        taken.append(k)
    if taken:
        yield taken
