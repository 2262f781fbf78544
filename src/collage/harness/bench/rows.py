"""What `collage bench` times: our strategies, what others offer, and the limit that moving the bytes sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import collage
from collage.backends import choose
from collage.formats import Master, bytes_per_value, format_of
from collage.strategies import Strategy

Shapes = Sequence[tuple[int, ...]]
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(slots=True)
class Contestant:
    """An optimizer with parameters of its own."""

    params: list[Tensor]  # whose gradients a caller fills
    step: Callable[[], Any]
    values: Callable[[], list[Tensor]]  # the weights with all that the optimizer keeps of them
    steps: int = 1  # that one call of `step` makes


class Row(NamedTuple):
    """One line of the table."""

    name: str
    build: Callable[[Shapes, float, torch.device], Contestant]  # (shapes, lr, device)
    moved: float  # bytes per parameter that a step has to read and write
    kept: float  # bytes per parameter of weights, state and gradient


def parameters(shapes: Shapes, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Weights N(0, 0.05) rounded to bfloat16, and gradients N(0, 1e-3); the same numbers for every row."""
    normal = torch.empty(1 << 16).normal_(generator=torch.Generator().manual_seed(0)).to(device)

    def tensor(shape: tuple[int, ...], std: float) -> Tensor:
        n = math.prod(shape)
        return (normal * std).bfloat16().to(dtype).repeat(n // len(normal) + 1)[:n].view(shape).clone()

    params: list[Tensor] = []
    for shape in shapes:
        params.append(nn.Parameter(tensor(shape, 0.05)))
        params[-1].grad = tensor(shape, 1e-3)
    return params


def ours(name: str, monitored: int | None = None) -> Row:
    """A strategy of this package; `monitored`: measured once in so many steps, and timed over ten."""
    strategy = Strategy.parse(name)

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = parameters(shapes, device, strategy.dtype)
        opt = collage.AdamW(params, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, strategy=strategy)

        def values() -> list[Tensor]:
            return [format_of(strategy.param).value(opt.theta(parameter)) for parameter in opt.parameters()]

        if monitored is None:
            return Contestant(params, opt.step, values)
        collage.monitor(opt, every=monitored)
        return Contestant(params, lambda: [opt.step() for _ in range(10)], values, steps=10)

    planes = sum(map(bytes_per_value, map(format_of, strategy.formats())))
    unread = 2 if isinstance(format_of(strategy.param), Master) else 0  # of a master's bf16 copy only writes
    moved = 2 * planes - unread + strategy.dtype.itemsize
    label = name if monitored is None else f"{name}, monitored 1 in {monitored}"
    return Row(label, build, moved, strategy.bytes_per_param())


def limit(name: str) -> Row:
    """Reads and writes the planes of a strategy, without arithmetic."""
    strategy = Strategy.parse(name)

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = parameters(shapes, device, strategy.dtype)
        opt = collage.AdamW(params, lr=lr, strategy=strategy)
        grads = [torch.zeros_like(param) for param in params]
        planes = [plane for parameter in opt.parameters() for slot in opt.planes(parameter) for plane in slot]
        backend = choose("auto", grads[0].device)
        return Contestant(params, lambda: backend.stream(strategy.formats(), planes, grads), list)

    held = sum(map(bytes_per_value, map(format_of, strategy.formats())))
    return Row(f"limit of {name}", build, 2 * held + strategy.dtype.itemsize, strategy.bytes_per_param())


def torch_adamw(label: str, dtype: torch.dtype, moved: float, kept: float, **kind: Any) -> Row:
    """torch's own AdamW on weights of one dtype."""

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = parameters(shapes, device, dtype)
        opt = torch.optim.AdamW(params, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, **kind)
        return Contestant(params, opt.step, lambda: params)

    return Row(label, build, moved, kept)


def option_d(label: str, preallocated: bool, **kind: Any) -> Row:
    """bfloat16 weights and gradients, a float32 master copy under torch's AdamW, and the two casts."""

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = parameters(shapes, device)
        masters: list[Tensor] = [nn.Parameter(p.detach().float()) for p in params]
        opt = torch.optim.AdamW(masters, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, **kind)
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
            opt.step()
            torch._foreach_copy_(params, masters)

        return Contestant(params, step, lambda: masters)

    return Row(label, build, 40, 20)


def optimi() -> Row:
    """optimi's AdamW: bfloat16 with Kahan summation, which it turns on by itself."""

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        from optimi import AdamW

        params = parameters(shapes, device)
        opt = AdamW(params, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)

        def values() -> list[Tensor]:
            return [p.detach().float() + opt.state[p]["kahan_comp"].float() for p in params]

        return Contestant(params, opt.step, values)

    return Row("optimi AdamW (Kahan)", build, 18, 10)


def torchao(kind: str, moved: float, kept: float, **arguments: Any) -> Row:
    """torchao's optimizers; the package compiles their step itself."""

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        import torchao.optim

        params = parameters(shapes, device)
        opt = getattr(torchao.optim, kind)(params, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, **arguments)
        return Contestant(params, opt.step, lambda: params)

    label = f"torchao {kind.removeprefix('_')}" + (" (bf16 + SR)" if arguments else "")
    return Row(label, build, moved, kept)


A, D = "A: torch fused bf16", "D: torch fused + master"
OTHERS = (
    torch_adamw(A, torch.bfloat16, 14, 8, fused=True),
    torch_adamw("torch foreach bf16", torch.bfloat16, 14, 8, foreach=True),
    torch_adamw("torch fused fp32", torch.float32, 28, 16, fused=True),
    option_d(D, preallocated=True, fused=True),
    option_d("D as people write it", preallocated=False, fused=True),
    option_d("D with foreach", preallocated=True, foreach=True),
)
EXTRA = (
    optimi(),
    torchao("_AdamW", 14, 8, bf16_stochastic_round=True),
    torchao("AdamW8bit", 10, 6),
)
DEFAULT = ("bf16", "collage-light", "collage-plus", "collage-plus-sr", "fp32-master")


def rows(strategies: Sequence[str], monitor: bool, others: bool, extra: bool) -> list[Row]:
    """The lines of the table, limits first."""
    known = list(dict.fromkeys(str(Strategy.parse(name)) for name in strategies))
    watched = "collage-plus" if "collage-plus" in known else known[-1]
    monitored = [ours(watched, every) for every in (10, 1)] if monitor else []
    return [
        *map(limit, known), *map(ours, known), *monitored, *(OTHERS if others else ()), *(EXTRA if extra else ()),
    ]  # fmt: skip


def arrived(row: Row, device: torch.device, steps: int = 50, lr: float = 1e-5, n: int = 65_536) -> float:
    """<D, D'> / |D|**2, with D the movement of the weights under float64 AdamW and D' this row's, over some steps.

    1.0: all of the intended movement arrived. Gradients N(0, 1e-3), new at every step.
    """
    shapes = [(n,)]
    contestant = row.build(shapes, lr, device)
    exact = torch.nn.Parameter(contestant.params[0].detach().double())
    start = exact.detach().clone()
    opt = torch.optim.AdamW([exact], lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    g = torch.Generator().manual_seed(1)
    for _ in range(0, steps, contestant.steps):
        grad = torch.empty(n).normal_(std=1e-3, generator=g).bfloat16().to(exact.device)
        contestant.params[0].grad.copy_(grad)  # type: ignore[union-attr]
        exact.grad = grad.double()
        contestant.step()
        for _ in range(contestant.steps):
            opt.step()
    intended = exact.detach() - start
    moved = contestant.values()[0].detach().double() - start
    return float((intended * moved).sum() / intended.square().sum())
