"""A linear layer whose weight is e4m3 numbers with a power of two for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from collage.fp8.owning import register
from collage.fp8.saving import load_scale, save_scale
from collage.fp8.sharding import teach_fsdp


class Float8Linear(nn.Linear):
    """nn.Linear with weight float8_e4m3fn [out, in], weight_scale uint8 [out] (a byte E stands for 2**(E - 127))."""

    weight_scale: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> Float8Linear:
        """A module that is unpickled or copied is registered too."""
        module = super().__new__(cls)
        register(module)
        teach_fsdp()
        return module

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_scale(self, destination, prefix)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        load_scale(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return _Product.apply(x, self.weight, self.weight_scale, self.bias)  # type: ignore


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        factors = (scale.int() << 23).view(torch.float32)
        y = x.float() @ (weight.float() * factors[:, None]).t()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        factors = (scale.int() << 23).view(torch.float32)
        rows, columns = dy.reshape(-1, dy.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
        dx = ((rows * factors) @ weight.float()).to(x.dtype).view(x.shape)
        return (
            dx,
            (rows.t() @ columns).to(torch.bfloat16),
            None,
            rows.sum(0).to(torch.bfloat16) if ctx.needs_input_grad[3] else None,
        )
