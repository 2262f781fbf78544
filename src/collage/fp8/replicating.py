"""DistributedDataParallel of models with e4m3 weights: these are sent as bytes, and their gradients averaged as such.

DDP sends weights and averages gradients in the weights' own dtype, which no backend has for float8, and asks nobody
about it. So one of a model with layers of ours begins otherwise, whoever makes it: Accelerate, Trainer, Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from collage.fp8.owning import remainder_of

IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks for names


@cache
def teach_ddp() -> None:
    """Have `DistributedDataParallel` take converted models, from now on; with all others it does as before."""
    if not torch.distributed.is_available():
        return
    from torch.nn.parallel import DistributedDataParallel

    kind: Any = DistributedDataParallel
    begin = kind.__init__

    @wraps(begin)
    def init(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        layers = layers_of(module)
        if layers:
            _begin(begin, self, layers, signature(begin).bind(self, module, *args, **kwargs).arguments)
        else:
            begin(self, module, *args, **kwargs)

    kind.__init__ = init


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The layers with e4m3 weights by their names."""
    from collage.fp8.linear import Float8Linear

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Float8Linear)}


def _begin(begin: Any, parallel: Any, layers: dict[str, Any], given: dict[str, Any]) -> None:
    """What DDP does, but for how weights are sent and in which dtype gradients are averaged."""
    settings = {key: value for key, value in given.items() if key not in ("self", "kwargs")} | given.get("kwargs", {})
    model = settings["module"]
    dtype = _gradients_dtype(model)
    if settings.get("find_unused_parameters") and not settings.get("static_graph"):
        raise ValueError(
            "find_unused_parameters: needs static_graph=True where weights are e4m3; set it to False, of Trainer with "
            "TrainingArguments(ddp_find_unused_parameters=False), or use fully_shard"
        )
    if settings.get("init_sync", True):
        _send(model, layers, settings.get("process_group"))
    scales = [f"{name}.weight_scale".lstrip(".") for name in layers]  # replicas change them alike
    setattr(model, IGNORED, [*getattr(model, IGNORED, ()), *scales])
    begin(parallel, **{**settings, "init_sync": False})
    _average_in(dtype, parallel.reducer)


def _average_in(dtype: torch.dtype, reducer: Any) -> None:
    """Buckets of a dtype. Those that there are keep views in the weights' own, so they are made anew."""
    reducer._set_mixed_precision_param_dtype(dtype)
    reducer._push_all_rebuilt_params()
    reducer._rebuild_buckets()


def _gradients_dtype(model: nn.Module) -> torch.dtype:
    found: dict[torch.dtype, str] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            found.setdefault(param.grad_dtype or param.dtype, name)
    if len(found) > 1:
        listed = ", ".join(f"{str(dtype).removeprefix('torch.')} ('{name}')" for dtype, name in found.items())
        raise ValueError(
            f"DistributedDataParallel averages the gradients of a model with e4m3 weights in one dtype, and they have "
            f"{listed}; cast the others before collage.fp8.convert, or use fully_shard"
        )
    return next(iter(found), torch.bfloat16)


def _send(model: nn.Module, layers: dict[str, Any], group: Any) -> None:
    """Have every rank take the first one's weights and buffers."""
    from torch import distributed

    first = distributed.get_global_rank(group, 0) if group is not None else 0
    _keep_common_remainders(list(layers.values()), group)
    for tensor in _states(model, layers):
        distributed.broadcast(tensor, first, group=group)


def _keep_common_remainders(layers: list[Any], group: Any) -> None:
    """Let go of what e4m3 cut off of a weight that any rank has loaded or written to since."""
    from torch import distributed

    kept = [remainder_of(layer.weight) is not None for layer in layers]
    known = torch.tensor(kept, dtype=torch.uint8, device=layers[0].weight.device)
    distributed.all_reduce(known, distributed.ReduceOp.MIN, group=group)
    for layer, common in zip(layers, known.tolist(), strict=True):
        layer.remainder = layer.remainder if common else None


def _states(model: nn.Module, layers: dict[str, Any]) -> Iterator[Tensor]:
    """Weights, buffers, and what e4m3 cut off of the weights; as bytes what is float8 or int16."""
    held = [*model.parameters(), *model.buffers(), *(layer.remainder for layer in layers.values())]
    for own in (tensor.detach() for tensor in held if tensor is not None):
        yield own.view(torch.uint8) if own.dtype in (torch.float8_e4m3fn, torch.int16) else own
