"""Parameters of many shapes, laid over the ranks of a gloo group in every way: rows, columns, replicas, both."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from collage.sharding import as_bytes, from_bytes

# Of one element, of one dimension, small, of rows that blocks do not fill, of whole blocks, of three dimensions.
SHAPES = {
    "one": (1,),
    "few": (3,),
    "long": (5003,),
    "small": (64, 48),
    "rows": (37, 130),
    "blocks": (33, 256),
    "cube": (5, 40, 24),
    "plain": (9, 8),  # no DTensor: every rank has it
}


def numbers(name: str, seed: int, dtype: torch.dtype) -> torch.Tensor:
    key = 100 * seed + list(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(key)).to(dtype)


def alone(name: str, whole: torch.Tensor) -> torch.Tensor:
    """The layout of one process."""
    return whole


class Layout:
    """A mesh, and how parameters lie on it: those that are named, and all others."""

    def __init__(self, sizes: tuple[int, ...], others, **named) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh, self.others, self.named = init_device_mesh("cpu", sizes), others, named

    def __call__(self, name: str, whole: torch.Tensor):
        from torch.distributed.tensor import distribute_tensor

        return whole if name == "plain" else distribute_tensor(whole, self.mesh, self.named.get(name, self.others))


def layouts(blocks: bool) -> Iterator[tuple[str, Layout]]:
    """Those of this many ranks, by name. blocks: for strategies whose blocks shards must not cut."""
    from torch.distributed.tensor import Replicate, Shard

    world = dist.get_world_size()
    rows, columns, replica = Shard(0), Shard(1), Replicate()
    yield "rows", Layout((world,), [rows])
    cut = {} if blocks else {"rows": [columns], "cube": [Shard(2)]}
    if world <= 2 or not blocks:
        cut["blocks"] = [columns]
    yield "columns", Layout((world,), [rows], small=[columns], few=[replica], **cut)
    if world == 4:
        yield "replicas of rows", Layout((2, 2), [replica, rows])
        cut = {} if blocks else {"rows": [rows, columns], "cube": [columns, rows]}
        both = [rows, columns]
        yield "rows and columns", Layout((2, 2), [rows, replica], small=both, blocks=both, **cut)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, sharded or not."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return from_bytes(as_bytes(tensor).full_tensor()) if tensor.dtype == torch.int16 else tensor.full_tensor()
