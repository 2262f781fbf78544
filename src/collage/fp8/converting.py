"""Linear layers of a model become e4m3 ones, in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from collage.formats import format_of, split
from collage.fp8.linear import Float8Linear


def convert(model: nn.Module, skip: Iterable[str] = ()) -> nn.Module:
    """Replace the weights of nn.Linear by e4m3 ones with a power of two for each row, in place; the model."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name in skip:
            continue
        hi, _, scale = split(format_of("e4m3+int16"), module.weight.detach().float())
        new = Float8Linear.__new__(Float8Linear)
        new.__dict__.update(module.__dict__)
        new.weight = nn.Parameter(hi)
        new.weight.grad_dtype = torch.bfloat16
        new.register_buffer("weight_scale", scale)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model
