"""FSDP2 of e4m3 weights: gathered as bytes, together with their row scales; their gradients keep 16 or 32 bits.

FSDP2 keeps a record per parameter (``FSDPParam``), and asks nobody about it: a weight of float8 would be gathered in a
dtype that gloo does not have, its gradient be rounded to float8, and 16-bit parameters beside it be refused. So the
record of a weight of ours is one of ours. What it adds are the row scales: a rank has those of its own rows, and gets
the others' in the collective that gathers the weight.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from collage.fp8.owning import register
from collage.fp8.replicating import teach_ddp


def enlist(module: nn.Module) -> None:
    """Let a module's e4m3 weight be found by its optimizer, and be sharded or replicated."""
    register(module)
    _teach_fsdp()
    teach_ddp()


@cache
def _teach_fsdp() -> None:
    """Have `fully_shard` keep records of ours of the weights of ours, and its own of all others, from now on."""
    if not torch.distributed.is_available():
        return
    from collage.fp8.records import Float8Shard

    base: Any = Float8Shard.__base__

    def new(cls: type, param: Tensor, module_info: Any, *args: Any, **kwargs: Any) -> Any:
        is_ours = module_info.param_name == "weight" and "weight_scale" in module_info.module._buffers
        return object.__new__(Float8Shard if is_ours else cls)

    base.__new__ = new
