"""The products of a linear layer with the e4m3 weight H and its row scales s: y = x (s H)^T and dx = (dy s) H.

Both are torch operators, so that a compiled graph has one call where the loop over tiles would be unrolled into it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from collage.formats.scales import factors
from collage.fp8.codes import BF16, E4M3, F32, decoded, quantised

PRODUCTS = ("auto", "scaled_mm", "decoded")
TILE = {"cpu": 1 << 20}  # elements of the weight that are decoded at a time: what stays in a cache
LARGE_TILE = 1 << 24  # elsewhere: what keeps a GPU busy


def missing(weight: Tensor, dtype: torch.dtype, product: str) -> str:
    """Why activations of a dtype are not multiplied with a weight in fp8; "": they are."""
    if product == "decoded":
        return "product='decoded' was asked for"
    if dtype != BF16:
        return f"fp8 products with a scale per row give bfloat16, and activations are {dtype}"
    return misfit(*weight.shape) or ("" if product == "scaled_mm" else _missing_on(weight.device))


def _missing_on(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} multiplies no fp8 numbers faster than bfloat16 ones"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 9):
        return (
            f"{torch.cuda.get_device_name(device)} multiplies no fp8 numbers: compute capability 8.9 does (Ada, Hopper)"
        )
    return ""


def misfit(rows: int, columns: int) -> str:
    """Why a weight's shape is not multiplied in fp8; "": it is."""
    return "" if rows % 16 == columns % 16 == 0 else f"fp8 products take multiples of 16, and it is {rows} x {columns}"


@torch.library.custom_op("collage::fp8_forward", mutates_args=())
def forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, product: str) -> Tensor:
    """x [m, in], weight e4m3 [out, in], scale uint8 [out], bias [out] of x's dtype -> [m, out] of it."""
    with torch.autocast(x.device.type, enabled=False):
        way = _decoded_forward if missing(weight, x.dtype, product) else _scaled_forward
        return way(x, weight, scale, bias)


@torch.library.custom_op("collage::fp8_backward", mutates_args=())
def backward(dy: Tensor, weight: Tensor, scale: Tensor, product: str) -> Tensor:
    """dy [m, out] -> dx [m, in]."""
    with torch.autocast(dy.device.type, enabled=False):
        way = _decoded_backward if missing(weight, dy.dtype, product) else _scaled_backward
        return way(dy, weight, scale)


@forward.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, product: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@backward.register_fake
def _(dy: Tensor, weight: Tensor, scale: Tensor, product: str) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


def _decoded_forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Some rows of the weight at a time."""
    dtype = computing(x.dtype)
    x, y = x.to(dtype), x.new_empty(x.shape[0], weight.shape[0])
    size = _tile(weight, weight.shape[1])
    for first in range(0, len(weight), size):
        some = slice(first, first + size)
        own = None if bias is None else bias[some].to(dtype)
        y[:, some] = linear(x, decoded(weight[some], scale[some], dtype), own)
    return y


def _decoded_backward(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Some columns of the weight at a time, so that no sum over its rows is cut in two."""
    dtype = computing(dy.dtype)
    dy, dx = dy.to(dtype), dy.new_empty(dy.shape[0], weight.shape[1])
    size = _tile(weight, weight.shape[0])
    for out, hi in zip(torch.split(dx, size, 1), torch.split(weight, size, 1), strict=True):
        out.copy_(dy @ decoded(hi, scale, dtype))
    return dx


def _tile(weight: Tensor, length: int) -> int:
    """Rows (or columns) of that length in a tile."""
    return max(16, TILE.get(weight.device.type, LARGE_TILE) // max(length, 1))


def computing(dtype: torch.dtype) -> torch.dtype:
    """What products of activations of a dtype are computed in: a row's power of two need not fit into float16."""
    return F32 if dtype == torch.float16 else dtype


def _scaled_forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The weight as it lies is the second operand, column-major."""
    codes, own = quantised(x)
    return _scaled_mm(codes, own, weight.t(), factors(scale), bias)


def _scaled_backward(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight's powers of two go to the gradient's columns, exactly; the weight is transposed for this one call."""
    codes, own = quantised(dy * factors(scale).to(dy.dtype))
    across = weight.view(torch.uint8).t().contiguous().view(E4M3).t()
    return _scaled_mm(codes, own, across, torch.ones(weight.shape[1], dtype=torch.float32, device=dy.device), None)


def _scaled_mm(a: Tensor, scale: Tensor, b: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """(a scale) @ (b columns) + bias, bfloat16; a [m, k] row-major, scale [m, 1], b [k, n] column-major, columns [n]"""
    scales = {"scale_a": scale, "scale_b": columns[None, :]}
    result: Tensor = torch._scaled_mm(a, b, **scales, bias=bias, out_dtype=BF16, use_fast_accum=False)
    return result


class Product(torch.autograd.Function):
    """y = x W^T + b. handle: stands for the weight in the graph of gradients (`Handle`); the weight has none itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, handle: Tensor, bias: Tensor | None, product: str
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        needs_x, _, _, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_weight else None, *((weight, scale) if needs_x else (None, None)))
        ctx.shape, ctx.product, ctx.gradient = x.shape, product, handle.dtype
        y: Tensor = forward(rows, weight, scale, bias, product)
        # No view to autograd, which lets nobody write to one of a function of ours: F.relu_(layer(x)), y += x.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight)))  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        needs_bias = ctx.needs_input_grad[4]
        rows = dy.reshape(-1, dy.shape[-1])
        dx = None if weight is None else backward(rows, weight, scale, ctx.product).view(ctx.shape)
        dw = None if x is None else (_wide(rows).t() @ _wide(x)).to(ctx.gradient)
        return dx, None, None, dw, rows.sum(0) if needs_bias else None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(computing(x.dtype))


class Handle(torch.autograd.Function):
    """A tensor of no memory that is the weight to the graph of gradients, in the dtype that its gradient has.

    Autograd would cast a gradient to the dtype of what it is of, in compiled graphs whatever ``grad_dtype`` says.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty((), dtype=dtype, device=weight.device).expand(weight.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None
