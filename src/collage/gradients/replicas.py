"""DistributedDataParallel modules within a model: whose gradients they average, and how to keep them from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def replicas(model: nn.Module) -> list[DistributedDataParallel]:
    """The model itself, or those within it."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def replicated(model: nn.Module) -> set[Tensor]:
    """The parameters whose gradients DDP averages over ranks, in buckets of its own."""
    return {p for module in replicas(model) for p in module.parameters() if p.requires_grad}


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Inside, DDP averages nothing."""
    with ExitStack() as stack:
        for module in replicas(model):
            stack.enter_context(module.no_sync())
        yield


def anywhere(flags: Sequence[bool], module: DistributedDataParallel) -> list[bool]:
    """Which of these flags are set on any rank. A collective."""
    found = torch.tensor(flags, dtype=torch.int32, device=next(module.parameters()).device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=module.process_group)
    return list(map(bool, found.tolist()))


def average_(tensors: Sequence[Tensor], module: DistributedDataParallel) -> None:
    """The mean over the ranks of each, in place and in its own dtype. A collective."""
    under_way = [dist.all_reduce(x, group=module.process_group, async_op=True) for x in tensors]
    for x, work in zip(tensors, under_way, strict=True):
        work.wait()
        x.div_(dist.get_world_size(module.process_group))
