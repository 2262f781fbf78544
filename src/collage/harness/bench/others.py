"""What `collage bench` times beside: torch's optimizers, float32 master weights under them, and other packages'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from collage.harness.bench.contestants import BETAS, EPS, Build, Contestant, Kind, Row, Shapes, count, each, parameters


def torchs(kind: Kind, label: str, dtype: torch.dtype, **how: Any) -> Row:
    """torch's own optimizer on weights of one dtype, its state in the same."""

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = parameters(shapes, device, dtype)
        opt = kind.torch(params, lr=lr, **kind.settings, **how)  # type: ignore[misc, call-arg]
        return Contestant(params, opt.step, lambda: params)

    kept = dtype.itemsize * (1 + len(kind.rule().slots))
    return Row(label, build, each(2 * kept - dtype.itemsize), each(kept))


Make = Callable[[Sequence[Tensor], float], Callable[[], Any]]  # (parameters, lr) -> a step


def adamw(**kind: Any) -> Make:
    """torch's: parameters, lr -> its step."""
    return lambda params, lr: torch.optim.AdamW(params, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, **kind).step


def with_masters(make: Make, preallocated: bool) -> Build:
    """bfloat16 weights and gradients, a float32 master copy under an optimizer of torch's, and the two casts."""

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = parameters(shapes, device)
        masters: list[Tensor] = [nn.Parameter(p.detach().float()) for p in params]
        update = make(masters, lr)
        grads = [torch.zeros_like(master) for master in masters] if preallocated else []
        for master, grad in zip(masters, grads, strict=False):
            master.grad = grad

        @torch.no_grad()
        def step() -> None:
            if preallocated:
                torch._foreach_copy_(grads, [p.grad for p in params if p.grad is not None])
            else:
                for master, param in zip(masters, params, strict=True):
                    assert param.grad is not None
                    master.grad = param.grad.float()
            update()
            torch._foreach_copy_(params, masters)

        return Contestant(params, step, lambda: masters)

    return build


def option_d(label: str, preallocated: bool, make: Make, states: int = 2) -> Row:
    """The same as a row. states: that the optimizer keeps for each parameter."""
    return Row(label, with_masters(make, preallocated), each(24 + 8 * states), each(12 + 4 * states))


def optimi() -> Row:
    """optimi's AdamW: bfloat16 with Kahan summation, which it turns on by itself."""

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        from optimi import AdamW

        params = parameters(shapes, device)
        opt = AdamW(params, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)

        def values() -> list[Tensor]:
            return [p.detach().float() + opt.state[p]["kahan_comp"].float() for p in params]

        return Contestant(params, opt.step, values)

    return Row("optimi AdamW (Kahan)", build, each(18), each(10))


def torchao(kind: str, block: int = 0, **arguments: Any) -> Row:
    """torchao's optimizers; the package compiles their step itself. block: elements that share a float32 scale."""

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        import torchao.optim

        params = parameters(shapes, device)
        opt = getattr(torchao.optim, kind)(params, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, **arguments)
        return Contestant(params, opt.step, lambda: params)

    def moments(numel: int) -> float:  # of fewer than 4,096 elements, or no whole blocks, they are bfloat16
        return 2 * (numel + 4 * numel / block if block and numel >= 4096 and numel % block == 0 else 2 * numel)

    def kept(shapes: Shapes) -> float:
        return 4 * count(shapes) + sum(moments(math.prod(shape)) for shape in shapes)

    label = f"torchao {kind.removeprefix('_')}" + (" (bf16 + SR)" if arguments else "")
    return Row(label, build, lambda shapes: 2 * kept(shapes) - 2 * count(shapes), kept)


A, D = "A: torch fused bf16", "D: torch fused + master"
WAYS: tuple[tuple[str, torch.dtype, dict[str, bool]], ...] = (
    (A, torch.bfloat16, {"fused": True}),
    ("torch foreach bf16", torch.bfloat16, {"foreach": True}),
    ("torch fused fp32", torch.float32, {"fused": True}),
)
MASTERS = (
    option_d(D, preallocated=True, make=adamw(fused=True)),
    option_d("D as people write it", preallocated=False, make=adamw(fused=True)),
    option_d("D with foreach", preallocated=True, make=adamw(foreach=True)),
)
EXTRA = (
    optimi(),
    torchao("_AdamW", bf16_stochastic_round=True),
    torchao("AdamW8bit", block=256),
)
