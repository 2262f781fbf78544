"""What tensors have in memory, counted as they are made and freed. It needs none: fake tensors will do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from collage.sharding import local

# What bytes are for. COPIES are those of weights: gathered from other ranks, or cast to what is computed in.
KINDS = WEIGHTS, GRADIENTS, ACTIVATIONS, COPIES, TEMPORARY = (
    "weights", "gradients", "activations", "copies", "temporary",
)  # fmt: skip


@dataclass(slots=True)
class _Entry:
    """A storage that is alive."""

    kind: str
    nbytes: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that are alive, by what they are for; `peak` is a copy from when they were most.

    It sees what operations make while it is entered, and what it is told of. Kinds: saved for backward under `saving`,
    the others by `note`; TEMPORARY is all that nobody claimed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = dict.fromkeys(KINDS, 0)
        self.peak = dict(self.live)
        self._entries: dict[int, _Entry] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = _tensors(out)
        given = {_key(tensor) for tensor in _tensors((args, kwargs))} if made else set()
        for tensor in made:
            if _key(tensor) not in given:  # no view of what was there before
                self._enter(tensor)
        return out

    def note(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor's memory is for, if nobody has."""
        entry = self._enter(tensor)
        if entry.kind == TEMPORARY:
            self.live[TEMPORARY] -= entry.nbytes
            self.live[kind] += entry.nbytes
            entry.kind = kind

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Meanwhile what is saved for backward is an activation."""

        def pack(tensor: Tensor) -> Tensor:
            self.note(tensor, ACTIVATIONS)
            return tensor.detach()  # of the same storage; the tensor itself would keep its own graph alive

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    @contextmanager
    def watching_sizes(self) -> Iterator[None]:
        """Meanwhile storages may change their size, as FSDP2 frees gathered weights: no operation tells of it."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: Any, nbytes: int) -> Any:
            result, entry = resize(storage, nbytes), self._entries.get(storage._cdata)
            if entry is not None:
                self._count(entry.kind, nbytes - entry.nbytes)
                entry.nbytes = nbytes
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize_):
            yield

    def _enter(self, tensor: Tensor) -> _Entry:
        storage, key = local(tensor).untyped_storage(), _key(tensor)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(TEMPORARY, storage.nbytes())
            weakref.finalize(storage, self._leave, key)
            self._count(TEMPORARY, entry.nbytes)
        return entry

    def _leave(self, key: int) -> None:
        entry = self._entries.pop(key)
        self.live[entry.kind] -= entry.nbytes

    def _count(self, kind: str, nbytes: int) -> None:
        self.live[kind] += nbytes
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that a call has alive at once, beside what there was before."""
    with Ledger() as ledger:
        call()
    return sum(ledger.peak.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    key: int = local(tensor).untyped_storage()._cdata
    return key
