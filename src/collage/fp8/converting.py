"""Linear layers of a model become e4m3 ones, in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from collage.casting import casting
from collage.fp8.codes import BF16, Coded, coded
from collage.fp8.linear import Float8Linear
from collage.fp8.selecting import chosen
from collage.fp8.sharding import enlist


def convert(
    model: nn.Module, skip: Iterable[str] = (), product: str = "auto", grad_dtype: torch.dtype = BF16
) -> nn.Module:
    layers = chosen(model, skip)
    cast = casting(model, BF16, but=[layer.weight for layer in layers.values()])
    for layer in layers.values():
        _become(layer, coded(layer.weight), product, grad_dtype)
    cast()
    return model


def _become(layer: Any, weight: Coded, product: str, grad_dtype: torch.dtype) -> None:
    """The layer stays the object it is, with its hooks, its mode and what else was put on it."""
    old = layer.weight
    layer.weight = nn.Parameter(weight.hi, requires_grad=old.requires_grad)
    layer.register_buffer("weight_scale", weight.scale)
    vars(layer).update(product=product, grad_dtype=grad_dtype, remainder=weight.lo)
    layer.__class__ = Float8Linear
    enlist(layer)
    layer.renew()
