"""Steps of DTensors beside those of plain tensors: in one process, or under torchrun on as many ranks as it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collage.formats import format_of
from collage.harness.bench.contestants import Contestant, Kind, Row, Shapes, parameters
from collage.strategies import Strategy

SUFFIX = ", sharded"


@contextmanager
def ranks(wanted: bool) -> Iterator[int]:
    """A process group, torchrun's or one of this process alone, while it is wanted. Gives the number of this rank."""
    if not wanted:
        yield 0
        return
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather() -> None:
    """Wait for the other ranks, so that all are timed while all are busy."""
    if count() > 1:
        dist.barrier()


def share(line: dict[str, Any], table: Sequence[dict[str, Any]]) -> float:
    """How much of the bytes that the plain tensors have a row moves on this rank; 1 where it is not sharded."""
    plain = line["name"].removesuffix(SUFFIX)
    moved = next((other["bytes_moved"] for other in table if other["name"] == plain), line["bytes_moved"])
    return float(line["bytes_moved"] / moved)


def sharded(kind: Kind, name: str) -> Row:
    """A strategy of this package on parameters that are sharded by rows over the ranks."""
    strategy = Strategy.parse(name)

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        params = [_by_rows(param, mesh) for param in parameters(shapes, device, strategy.dtype)]
        opt = kind.make(((f"{name}{SUFFIX}, {k}", param) for k, param in enumerate(params)), lr, strategy)

        def values() -> list[Tensor]:
            return [format_of(opt.strategy_of(own).param).value(opt.theta(own)) for own in opt.parameters()]

        return Contestant(list(map(_local, params)), opt.step, values)

    return Row(name + SUFFIX, build, partial(_on_this_rank, partial(kind.moved, strategy)),
               partial(_on_this_rank, partial(kind.kept, strategy)))  # fmt: skip


def _by_rows(param: Tensor, mesh: Any) -> Tensor:
    """The same parameter and its gradient, sharded."""
    from torch.distributed.tensor import Shard, distribute_tensor

    result = nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)], src_data_rank=None))
    result.grad = distribute_tensor(param.grad, mesh, [Shard(0)], src_data_rank=None)  # type: ignore[arg-type]
    return result


@torch.no_grad()
def _local(param: Any) -> Tensor:
    """This rank's part of a parameter, with its part of the gradient."""
    part: Tensor = param.to_local()
    part.grad = param.grad.to_local()
    return part


def _on_this_rank(size: Any, shapes: Shapes) -> float:
    """A size, of what this rank has of tensors of these shapes."""
    parts, rank = dist.get_world_size(), dist.get_rank()
    return float(size([(max(0, min(-(-n // parts), n - rank * -(-n // parts))), *rest) for n, *rest in shapes]))
