"""How many bytes of tensors are alive at once, of those that were made while somebody looked."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _python_dispatch
from torch.utils._pytree import tree_leaves

_Mode: Any = _python_dispatch.TorchDispatchMode  # torch has not typed it


class Peak(_Mode):  # type: ignore[misc]
    """Counts the memory of every tensor that an operation returns for the first time, until nobody has it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.most = 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given | self._seen:
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage: Any = tensor.untyped_storage()
        self._seen.add(storage._cdata)
        self.alive += storage.nbytes()
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, place: int, nbytes: int) -> None:
        self._seen.discard(place)
        self.alive -= nbytes


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that a call has alive at once, beside what there was before."""
    peak = Peak()
    with peak:
        call()
    return peak.most
