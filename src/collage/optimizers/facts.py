"""Where tensors lie that were checked, so that they need not be checked again while they lie there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

_shape, _dtype = attrgetter("shape"), attrgetter("dtype")
_expired: Any = torch.UntypedStorage._expired  # torch has not typed them
_free: Any = torch.UntypedStorage._free_weak_ref


class Facts:
    """What must not change of tensors that were checked, so that a kernel may be given their addresses again.

    thetas: the parameters themselves; planes: local ones, theta's first; steps: counters.
    """

    def __init__(self, thetas: Sequence[Tensor], planes: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
        self.thetas, self.planes, self.steps = thetas, planes, steps
        self.visible = planes[:: len(planes) // len(thetas)]
        self.storages = [theta.untyped_storage()._weak_ref() for theta in self.visible]
        self.found = self._look()
        self.addresses, self.counters = self.found[0][::3], self.found[1]

    def _look(self) -> tuple[list[Any], ...]:
        # All of one tensor before the next: there may be more of them than a cache holds.
        lying = zip(
            map(Tensor.data_ptr, self.planes), map(Tensor.numel, self.planes), map(Tensor.is_contiguous, self.planes),
            strict=True,
        )  # fmt: skip
        flat = list(chain.from_iterable(lying))
        strides = [] if all(flat[2::3]) else [(plane.shape, plane.stride()) for plane in self.planes]
        forms = chain.from_iterable(zip(map(_shape, self.thetas), map(_dtype, self.visible), strict=True))
        return flat, list(map(Tensor.data_ptr, self.steps)), strides, list(forms)

    @property
    def live(self) -> bool:
        """Whether no storage is gone, whose address another one may have by now."""
        return not any(map(_expired, self.storages))

    @property
    def place(self) -> tuple[Any, ...]:
        """Where the first parameter was."""
        return self.addresses[0], self.found[2], self.found[3]

    def hold(self) -> bool:
        """Whether everything is as it was."""
        return self._look() == self.found and self.live

    def __del__(self) -> None:
        for storage in getattr(self, "storages", ()):
            _free(storage)
