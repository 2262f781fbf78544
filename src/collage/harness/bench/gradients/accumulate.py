"""Gradients of micro-batches added up: what each way loses, keeps and costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from collage.backends import Batch, choose
from collage.formats import format_of
from collage.gradients.accumulate import GradientAccumulator
from collage.harness.ledger import peak_of
from collage.rules.accumulate import ACCUMULATE

MICRO, NUMEL = 64, 1 << 22
Way = Callable[[nn.ParameterList], tuple[Any, Callable[[], Tensor]]]  # (a context around backward, the sum so far)


class _Giving(torch.autograd.Function):
    """A loss whose gradient is what it is given."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return param.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.clone(), None  # as backward does, it makes a new tensor


_give: Any = _Giving.apply  # torch has not typed it


def gradients(numel: int) -> Iterator[Tensor]:
    """bfloat16 gradients of micro-batches: a mean of rms 1 that all have, and noise of rms 1."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(numel, generator=generator)
    for _ in range(MICRO):
        yield (mean + torch.randn(numel, generator=generator)).bfloat16()


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def autograd(dtype: torch.dtype) -> Way:
    """torch's own accumulation, in a dtype."""

    def begin(params: nn.ParameterList) -> tuple[Any, Callable[[], Tensor]]:
        params[0].grad_dtype = dtype
        return nullcontext(), lambda: _grad(params[0])

    return begin


def accumulator(params: nn.ParameterList) -> tuple[Any, Callable[[], Tensor]]:
    """What this package offers."""
    made = GradientAccumulator(params)

    def finished() -> Tensor:
        made.finish()
        return _grad(params[0])

    return made, finished


def components(params: nn.ParameterList) -> tuple[Any, Callable[[], Tensor]]:
    """A sum of two bfloat16 components, grown by the same kernel: what an accumulator could be instead."""
    planes = [torch.zeros_like(params[0].detach()) for _ in range(2)]

    def grow(param: Tensor) -> None:
        batch = Batch(ACCUMULATE, ("bf16x2",), torch.float32, 0.0, (1.0,), False, 0, planes, [_grad(param)], (1,))
        choose("auto", param.device).step(batch)
        param.grad = None

    hooked: Any = params[0]  # torch has not typed it
    hooked.register_post_accumulate_grad_hook(grow)
    return nullcontext(), lambda: format_of("bf16x2").value(planes)


WAYS: dict[str, tuple[Way, int]] = {  # and the bytes per parameter that it keeps
    "bf16: autograd": (autograd(torch.bfloat16), 2),
    "fp32: param.grad_dtype": (autograd(torch.float32), 4),
    "bf16x2: two components": (components, 4),
    "fp32: GradientAccumulator": (accumulator, 4),
}


def measure(tick: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """A row for each way: error of the sum, bytes kept and at most alive, time per micro-batch (the first left out)."""
    models = {name: nn.ParameterList([nn.Parameter(torch.zeros(NUMEL, dtype=torch.bfloat16))]) for name in WAYS}
    begun = {name: way(models[name]) for name, (way, _) in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    exact = torch.zeros(NUMEL, dtype=torch.float64)
    for k, g in enumerate(gradients(NUMEL)):
        exact += g
        for name, (context, _) in begun.items():
            start = time.perf_counter()
            with context:
                _give(models[name][0], g).backward()
            times[name].append(time.perf_counter() - start)
        tick(k + 1)
    return {name: _row(name, begun, models[name], exact, times[name], g) for name in WAYS}


def _row(
    name: str, begun: Mapping[str, Any], model: nn.ParameterList, exact: Tensor, times: list[float], g: Tensor
) -> dict[str, Any]:
    context, total = begun[name]
    error = (total().double() - exact).norm() / exact.norm()

    def again() -> None:
        with context:
            _give(model[0], g).backward()

    again()  # sums that `finish` left go on
    return {
        "error": error.item(),
        "bytes_kept": WAYS[name][1],
        "bytes_more": peak_of(again) / g.numel(),
        "ns_per_param": median(times[1:]) / g.numel() * 1e9,
    }
