"""torch's random generators, to compute the same gradients twice."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class Randomness:
    """The generators as they are now: the CPU's, and those of the devices that these tensors are on."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(*(x for x in tensors if x.device.type not in ("cpu", "meta")))

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        set_device_states(self._devices, self._states)
