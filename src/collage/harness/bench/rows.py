"""What `collage bench` times: our optimizers, what others offer, and the limit that moving the bytes sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import collage
from collage.backends import choose
from collage.formats import Master, format_of
from collage.layout import bytes_per_value
from collage.optimizers.base import PrecisionOptimizer
from collage.rules import Rule
from collage.strategies import Strategy

Shapes = Sequence[tuple[int, ...]]
BETAS, EPS = (0.9, 0.999), 1e-8


class Kind(NamedTuple):
    """An optimizer to time: ours, its settings but lr, and torch's of the same rule."""

    ours: type[PrecisionOptimizer]
    settings: dict[str, Any]
    torch: type[torch.optim.Optimizer] | None

    def make(self, params: Iterable[Tensor], lr: float, strategy: Strategy) -> PrecisionOptimizer:
        return self.ours(params, lr=lr, strategy=strategy, **self.settings)  # type: ignore[call-arg]

    def moved(self, strategy: Strategy) -> float:
        """Bytes per parameter that a step reads and writes; of a master's 16-bit copy it only writes."""
        unread = 2 if isinstance(format_of(strategy.param), Master) else 0
        return 2 * sum(bytes_per_value(format_of(f)) for f in self.formats(strategy)) - unread + strategy.dtype.itemsize

    def formats(self, strategy: Strategy) -> tuple[str, ...]:
        return strategy.formats(self.rule.roles)

    @property
    def rule(self) -> Rule:
        """Of these settings."""
        probe = self.make([nn.Parameter(torch.zeros(1))], 0.0, Strategy.parse("fp32"))
        return probe.rule_of(probe.param_groups[0])


ADAM = {"betas": BETAS, "eps": EPS, "weight_decay": 0.0}
KINDS = {
    "adamw": Kind(collage.AdamW, ADAM, torch.optim.AdamW),
    "amsgrad": Kind(collage.AdamW, {**ADAM, "amsgrad": True}, torch.optim.AdamW),
    "adam": Kind(collage.Adam, ADAM, torch.optim.Adam),
    "sgd": Kind(collage.SGD, {"momentum": 0.9}, torch.optim.SGD),
    "lion": Kind(collage.Lion, {"betas": (0.9, 0.99)}, None),
}


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


def ours(kind: Kind, name: str, monitored: int | None = None) -> Row:
    """A strategy of this package; `monitored`: measured once in so many steps, and timed over ten."""
    strategy = Strategy.parse(name)

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = parameters(shapes, device, strategy.dtype)
        opt = kind.make(params, lr, strategy)

        def values() -> list[Tensor]:
            return [format_of(strategy.param).value(opt.theta(parameter)) for parameter in opt.parameters()]

        if monitored is None:
            return Contestant(params, opt.step, values)
        collage.monitor(opt, every=monitored)
        return Contestant(params, lambda: [opt.step() for _ in range(10)], values, steps=10)

    label = name if monitored is None else f"{name}, monitored 1 in {monitored}"
    return Row(label, build, kind.moved(strategy), strategy.bytes_per_param(roles=kind.rule.roles))


def limit(kind: Kind, name: str) -> Row:
    """Reads and writes the planes of a strategy, without arithmetic."""
    strategy = Strategy.parse(name)

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = parameters(shapes, device, strategy.dtype)
        opt = kind.make(params, lr, strategy)
        grads = [torch.zeros_like(param) for param in params]
        planes = [plane for parameter in opt.parameters() for slot in opt.planes(parameter) for plane in slot]
        backend = choose("auto", grads[0].device)
        return Contestant(params, lambda: backend.stream(kind.formats(strategy), planes, grads), list)

    kept = strategy.bytes_per_param(roles=kind.rule.roles)
    return Row(f"limit of {name}", build, 2 * kept - strategy.dtype.itemsize, kept)


def torchs(kind: Kind, label: str, dtype: torch.dtype, **how: Any) -> Row:
    """torch's own optimizer on weights of one dtype, its state in the same."""

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = parameters(shapes, device, dtype)
        opt = kind.torch(params, lr=lr, **kind.settings, **how)  # type: ignore[misc, call-arg]
        return Contestant(params, opt.step, lambda: params)

    kept = dtype.itemsize * (1 + len(kind.rule.slots))
    return Row(label, build, 2 * kept - dtype.itemsize, kept)


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
WAYS: tuple[tuple[str, torch.dtype, dict[str, bool]], ...] = (
    (A, torch.bfloat16, {"fused": True}),
    ("torch foreach bf16", torch.bfloat16, {"foreach": True}),
    ("torch fused fp32", torch.float32, {"fused": True}),
)
MASTERS = (
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


def rows(optimizer: str, strategies: Sequence[str], monitor: bool, others: bool, extra: bool) -> list[Row]:
    """The lines of the table, limits first. Others but torch's own of the same rule are there for AdamW alone."""
    kind = KINDS[optimizer]
    known = list(dict.fromkeys(str(Strategy.parse(name)) for name in strategies))
    watched = "collage-plus" if "collage-plus" in known else known[-1]
    found = [limit(kind, name) for name in known] + [ours(kind, name) for name in known]
    found += [ours(kind, watched, every) for every in (10, 1)] if monitor else []
    found += [torchs(kind, label, dtype, **how) for label, dtype, how in WAYS] if others and kind.torch else []
    if optimizer == "adamw":
        found += [*(MASTERS if others else ()), *(EXTRA if extra else ())]
    return found


def arrived(
    optimizer: str, row: Row, device: torch.device, steps: int = 50, lr: float = 1e-5, n: int = 65_536
) -> float | None:
    """<D, D'> / |D|**2, with D the movement of the weights under torch's optimizer in float64 and D' this row's.

    None where torch has no such optimizer.

    1.0: all of the intended movement arrived. Gradients N(0, 1e-3), new at every step.
    """
    kind, shapes = KINDS[optimizer], [(n,)]
    if kind.torch is None:
        return None
    contestant = row.build(shapes, lr, device)
    exact = torch.nn.Parameter(contestant.params[0].detach().double())
    start = exact.detach().clone()
    opt = kind.torch([exact], lr=lr, **kind.settings)  # type: ignore[call-arg]
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
