"""DistributedDataParallel of a model with e4m3 weights: they are sent as bytes, and their gradients averaged as such.

DDP averages gradients in the dtype of their weights. Here it is told which one they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from collage.fp8.linear import Float8Linear
from collage.fp8.owning import remainder_of


def replicate(model: nn.Module, **settings: Any) -> nn.Module:
    """``DistributedDataParallel(model, **settings)``, for a converted model.

    Raises ValueError if not all gradients have one dtype, and for find_unused_parameters, unless the graph is static.

    >>> model = collage.fp8.replicate(collage.fp8.convert(model), gradient_as_bucket_view=True)  # doctest: +SKIP
    """
    from torch.nn.parallel import DistributedDataParallel

    dtype = _gradients_dtype(model)
    if settings.get("find_unused_parameters") and not settings.get("static_graph"):
        raise ValueError("find_unused_parameters: needs static_graph=True where weights are e4m3; or use fully_shard")
    if settings.pop("init_sync", True):
        _send(model, settings.get("process_group"))
    kind: Any = DistributedDataParallel
    kind._set_params_and_buffers_to_ignore_for_model(model, _scales(model))
    parallel = kind(model, init_sync=False, **settings)
    _average_in(dtype, parallel.reducer)
    return parallel  # type: ignore[no-any-return]


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


def _send(model: nn.Module, group: Any) -> None:
    """Have every rank take the first one's weights and buffers."""
    from torch import distributed

    first = distributed.get_global_rank(group, 0) if group is not None else 0
    _keep_common_remainders(model, group)
    for tensor in _states(model):
        distributed.broadcast(tensor, first, group=group)


def _keep_common_remainders(model: nn.Module, group: Any) -> None:
    """Let go of what e4m3 cut off of a weight that any rank has loaded or written to since."""
    from torch import distributed

    layers = _layers(model)
    if layers:
        known = torch.tensor([remainder_of(layer.weight) is not None for layer in layers], dtype=torch.uint8)
        known = known.to(layers[0].weight.device)
        distributed.all_reduce(known, distributed.ReduceOp.MIN, group=group)
        for layer, common in zip(layers, known.tolist(), strict=True):
            layer.remainder = layer.remainder if common else None


def _layers(model: nn.Module) -> list[Float8Linear]:
    return [layer for layer in model.modules() if isinstance(layer, Float8Linear)]


def _states(model: nn.Module) -> Iterator[Tensor]:
    """Weights, buffers, and what e4m3 cut off of the weights; as bytes what is float8 or int16."""
    held: list[Tensor | None] = [*model.parameters(), *model.buffers(), *(layer.remainder for layer in _layers(model))]
    for own in (tensor.detach() for tensor in held if tensor is not None):
        yield own.view(torch.uint8) if own.dtype in (torch.float8_e4m3fn, torch.int16) else own


def _scales(model: nn.Module) -> list[str]:
    """Names of the row scales: replicas change them alike, so they are not sent before every forward pass."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Float8Linear))
    return [f"{name}.weight_scale".lstrip(".") for name, _ in layers]
