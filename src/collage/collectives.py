"""What ranks tell one another: sums over the parts of a tensor, and that one of them refuses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.sharding import layouts_of


class Spread(NamedTuple):
    """The ranks that hold the parts of a tensor: those along these dimensions of a mesh. Along others are replicas."""

    mesh: Any
    dims: tuple[int, ...]


def spreads_of(tensors: Sequence[Any]) -> list[Spread | None]:
    """Who holds the parts of each; None: this rank holds the whole."""
    return [layout and _spread_of(*layout) for layout in layouts_of(tensors)]


def _spread_of(mesh: Any, placements: Sequence[Any]) -> Spread | None:
    dims = tuple(k for k, p in enumerate(placements) if not p.is_replicate() and mesh.size(k) > 1)
    return Spread(mesh, dims) if dims else None


def summed(values: Tensor, tensors: Sequence[Any], largest: bool = False) -> Tensor:
    """[tensors] numbers of this rank's parts -> those of the wholes: added up over all parts, or the largest.

    A collective where one is sharded. The same bits on every rank; replicas count once.
    """
    spreads = spreads_of(tensors)
    return torch.cat(totals(torch.split(values, 1), spreads, largest)) if any(spreads) else values


def totals(parts: Sequence[Tensor], spreads: Sequence[Spread | None], largest: bool = False) -> list[Tensor]:
    """Each vector added up over the ranks of its spread, at once for all of one spread; as it is where there is none.

    largest: the largest of each element instead.

    A collective of the ranks of every spread, which all give vectors of the same sizes in the same order.
    """
    found = list(parts)
    for spread in dict.fromkeys(spreads):
        if spread is not None:
            alike = [k for k, other in enumerate(spreads) if other == spread]
            whole = _reduced(torch.cat([parts[k] for k in alike]), spread, largest)
            for k, total in zip(alike, torch.split(whole, [len(parts[k]) for k in alike]), strict=True):
                found[k] = total
    return found


def _reduced(part: Tensor, spread: Spread, largest: bool) -> Tensor:
    from torch import distributed

    total = part.to(spread.mesh.device_type, copy=True)
    how = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
    for dim in spread.dims:
        distributed.all_reduce(total, how, group=spread.mesh.get_group(dim))
    return total.to(part.device)


def on_any_rank(flag: Tensor) -> Tensor:
    """Whether a 0-d flag is not 0 on any rank of the default process group, if there is one. A collective then."""
    distributed: Any = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return flag
    found = flag.to(torch.int32)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found


@contextmanager
def together(tensors: Iterable[Any], what: str) -> Iterator[None]:
    """What one rank refuses inside (ValueError), every rank with another part of one of these tensors refuses too.

    A collective where any is sharded; inside there must be none. what: of this rank's part, for the message.
    """
    error: ValueError | None = None
    try:
        yield
    except ValueError as raised:
        error = raised
    spreads = list(dict.fromkeys(spreads_of(list(tensors))))
    flag = torch.tensor([error is not None], dtype=torch.float64, device="cpu")
    refused = any(map(bool, totals([flag] * len(spreads), spreads)))
    if error is not None:
        raise error
    if refused:
        raise ValueError(f"{what} could be taken, but another rank refuses its part, and says why; nothing is changed")
