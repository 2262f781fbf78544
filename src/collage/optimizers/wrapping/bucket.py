"""A few parameters as another optimizer is given them: float32 numbers, in one piece of memory that lasts as long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from collage.sharding import in_rows, is_dtensor, local

ALIGNED = 16  # numbers: so torch's own memory begins, and by where they begin matrix products choose how they sum


class Memory:
    """What the buckets of a step lie in, one after the other: memory that is touched anew for each costs time."""

    def __init__(self) -> None:
        self._of: dict[torch.device, Tensor] = {}

    def take(self, numel: int, device: torch.device) -> Arena:
        """So many numbers, of which the last bucket has none any more."""
        if device not in self._of or self._of[device].numel() < numel:
            self._of.pop(device, None)  # before there is more
            self._of[device] = torch.empty(numel, dtype=torch.float32, device=device)
        return Arena(self._of[device])

    def release(self, most: int) -> None:
        """Give back what is more than so many numbers, or is on a device, whose allocator keeps it at hand."""
        self._of = {at: own for at, own in self._of.items() if at.type == "cpu" and own.numel() <= most}


class Arena:
    """Memory of one bucket, from which tensors like parameters are cut."""

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._used = memory, 0

    def like(self, param: Any) -> Any:
        """A float32 tensor of its shape and strides, sharded as it is. What is in it is not said."""
        part = local(param.detach())
        end = self._used + part.numel()
        if not part.is_contiguous() or end > self._memory.numel():
            return torch.empty_like(param.detach(), dtype=torch.float32)
        taken, self._used = self._memory[self._used : end].view(part.shape), aligned(end)
        return in_rows(taken, param.shape, param) if is_dtensor(param) else taken

    def holds(self, value: object) -> bool:
        """Whether a tensor lies in it, and so cannot stay."""
        if not isinstance(value, Tensor):
            return False
        return local(value).untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr()


def aligned(numel: int) -> int:
    """How many numbers of an arena a tensor takes."""
    return numel + -numel % ALIGNED


def buckets(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Positions of those that are taken together: as many as fit, at least one."""
    taken: list[int] = []
    held = 0
    for k, size in enumerate(sizes):
        if taken and held + size > most:
            yield taken
            taken, held = [], 0
        taken.append(k)
        held += size
    if taken:
        yield taken
