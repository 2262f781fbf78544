"""Linear layers of a model become e4m3 ones, in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from collage.casting import casting
from collage.fp8.codes import BF16, Coded, coded
from collage.fp8.linear import Float8Linear
from collage.fp8.owning import keep_remainder
from collage.fp8.products import PRODUCTS, misfit
from collage.fp8.selecting import chosen
from collage.fp8.sharding import enlist


def convert(
    model: nn.Module, skip: Iterable[str] = (), product: str = "auto", grad_dtype: torch.dtype = BF16
) -> nn.Module:
    """Hold the weights of a model's linear layers in e4m3, with a power of two for each row, in place.

    Before `torch.compile`, DistributedDataParallel, `fully_shard` and the optimizer. Every ``nn.Linear`` becomes a
    `Float8Linear`, the object that it was, but the output head: ``model.get_output_embeddings()`` and what lies
    outside the base model, where the model is one of transformers; elsewhere the last linear layer. All other
    floating-point parameters are cast to bfloat16, as `collage.to_bf16` does. Subclasses of ``nn.Linear`` are left.

    e4m3 keeps 4 significant bits of a weight. The next 16 stay with the layer, for the optimizer to begin with.

    Args:
        model: with its weights, on any device.
        skip: names of modules, or patterns of them, that stay in bfloat16 with all below them; ``*`` and ``?`` stand
            for what they do in file names.
        product: what forward and backward multiply with. ``"scaled_mm"``: e4m3 activations and gradients, which are
            scaled for each row; ``"decoded"``: those of the activations' own dtype, with weights decoded tile by tile;
            ``"auto"``: the former on GPUs that have it, for shapes that are multiples of 16.
        grad_dtype: of the weights' gradients, bfloat16 or float32.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: a layer that cannot be converted, is converted, or shares its weight; a name in skip that
            no module has. Each says which, and how to go on; nothing is changed then.

    >>> model = convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> [layer.weight.dtype for layer in (model[0], model[2])]
    [torch.float8_e4m3fn, torch.bfloat16]
    """
    _require_known(model, product, grad_dtype)
    layers = chosen(model, skip)
    for name, layer in layers.items() if product == "scaled_mm" else ():
        reason = misfit(*layer.weight.shape)
        if reason:
            raise ValueError(f"'{name}': {reason}; product='auto' decodes such weights, or skip=['{name}']")
    cast = casting(model, BF16, but=[layer.weight for layer in layers.values()])
    for layer in layers.values():
        _become(layer, coded(layer.weight), product, grad_dtype)
    cast()
    return model


def _require_known(model: nn.Module, product: str, grad_dtype: torch.dtype) -> None:
    """Raise for what no layer could do."""
    if product not in PRODUCTS:
        raise ValueError(f"product: {product!r} is none of {', '.join(map(repr, PRODUCTS))}")
    if grad_dtype not in (BF16, torch.float32):
        raise ValueError(f"grad_dtype: gradients of e4m3 weights are bfloat16 or float32, not {grad_dtype}")
    if not hasattr(torch.Tensor, "grad_dtype"):
        raise RuntimeError(f"torch {torch.__version__}: its gradients have their parameter's dtype, e4m3; update torch")
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model: is wrapped in DistributedDataParallel; convert it before, then wrap it")


def _become(layer: Any, weight: Coded, product: str, grad_dtype: torch.dtype) -> None:
    """The layer stays the object it is, with its hooks, its mode and what else was put on it."""
    old = layer.weight
    layer.weight = nn.Parameter(weight.hi, requires_grad=old.requires_grad)
    layer.register_buffer("weight_scale", weight.scale)
    vars(layer).update(product=product, grad_dtype=grad_dtype)
    keep_remainder(layer, weight.lo)
    layer.__class__ = Float8Linear
    enlist(layer)
    layer.renew()
