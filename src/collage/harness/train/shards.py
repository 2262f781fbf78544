"""FSDP2: a model split over the processes, and what is gathered from it so that checkpoints stay those of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from collage import sharding
from collage.sharding import any_dtensor, local


def shard(model: nn.Module, compute: torch.dtype, device: torch.device) -> None:
    """Split each layer, and the rest, over all processes, in place. They compute and reduce gradients as said here.

    compute: dtype of forward and backward. Gradients are averaged in float32 and rounded once, to the weights' dtype.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model.to(device)
    for part in (
        *layers_of(model),
        model,
    ):  # the root too gives its gathered weights back after a forward pass: others read them
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model._is_accelerate_prepared = True  # type: ignore[assignment]  # accelerate would wrap it in DDP


def layers_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered at once: the modules of its lists."""
    return [layer for part in model.modules() if isinstance(part, nn.ModuleList) for layer in part]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was here."""
    return any_dtensor(model.parameters())


def whole(saved: Any) -> Any:
    """A state_dict with each DTensor gathered, on the CPU. A collective; only the first process has what it gathers."""
    if any_dtensor([saved]):
        full = sharding.whole(local(saved), saved)
        return full.cpu() if torch.distributed.get_rank() == 0 else None
    if isinstance(saved, Mapping):
        return {key: whole(value) for key, value in saved.items()}
    return saved


def load(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a sharded model its parts of whole tensors, which every process has."""
    own = model.state_dict()
    parts = {name: sharding.placed(value, own[name]) if name in own else value for name, value in values.items()}
    model.load_state_dict(parts, strict=False)
