"""What `collage bench` times of ours: optimizers, and the limit that moving their bytes sets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import collage
from collage import fp8
from collage.advice.memory import moved_bytes
from collage.backends import choose
from collage.formats import format_of
from collage.optimizers.base import PrecisionOptimizer
from collage.optimizers.planes import nbytes
from collage.rules import Rule
from collage.strategies import Strategy

Shapes = Sequence[tuple[int, ...]]
BETAS, EPS = (0.9, 0.999), 1e-8
LARGE = (4096, 4096)


class Kind(NamedTuple):
    """An optimizer to time: ours, its settings but lr, and torch's of the same rule.

    hidden: whether it is for hidden matrices, and others are AdamW's.
    params: how many are timed by default: those that are orthogonalised take thousands of operations each.
    """

    ours: type[PrecisionOptimizer]
    settings: dict[str, Any]
    torch: type[torch.optim.Optimizer] | None
    hidden: bool = False
    params: int = 64 * 10**6

    def make(self, params: Iterable[Any], lr: float, strategy: Strategy) -> PrecisionOptimizer:
        return self.ours(self.grouped(params), lr=lr, strategy=strategy, **self.settings)  # type: ignore[call-arg]

    def grouped(self, params: Iterable[Any]) -> list[Any]:
        """Parameters, or pairs of a name and one, in groups where there are two kinds of them."""
        entries = list(params)
        if not self.hidden:
            return entries
        kinds: dict[bool, list[Any]] = {True: [], False: []}
        for entry in entries:
            kinds[is_hidden((entry[1] if isinstance(entry, tuple) else entry).shape)].append(entry)
        return [{"params": own, "use_muon": hidden} for hidden, own in kinds.items() if own]

    def moved(self, strategy: Strategy, shapes: Shapes) -> float:
        """Bytes that a step reads and writes."""
        return moved_bytes(strategy, self.planes(strategy, shapes), count(shapes))

    def kept(self, strategy: Strategy, shapes: Shapes) -> float:
        """Bytes of weights, state and gradients."""
        return self.planes(strategy, shapes) + strategy.beside.dtype.itemsize * count(shapes)

    def planes(self, strategy: Strategy, shapes: Shapes) -> int:
        """Bytes of all planes of parameters of these shapes, of which small ones have others."""
        each = Counter(shapes).items()
        return sum(many * nbytes(self.rule(shape), strategy.of(shape), shape) for shape, many in each)

    def formats(self, strategy: Strategy, shape: Sequence[int] = LARGE) -> tuple[str, ...]:
        """Of the slots of a parameter of that shape."""
        return strategy.formats(self.rule(shape).roles)

    def rule(self, shape: Sequence[int] = LARGE) -> Rule:
        """Of these settings, and a parameter of that shape."""
        probe = self.make([nn.Parameter(torch.empty(*shape, device="meta"))], 0.0, Strategy.parse("fp32"))
        return probe.rule_of(probe.param_groups[0])


def is_hidden(shape: Sequence[int]) -> bool:
    """Whether a parameter of a model that is known by shapes alone is taken for a hidden matrix."""
    return len(shape) == 2 and max(shape) <= 64 * min(shape)


ADAM = {"betas": BETAS, "eps": EPS, "weight_decay": 0.0}
MUON = {"momentum": 0.95, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
KINDS = {
    "adamw": Kind(collage.AdamW, ADAM, torch.optim.AdamW),
    "amsgrad": Kind(collage.AdamW, {**ADAM, "amsgrad": True}, torch.optim.AdamW),
    "adam": Kind(collage.Adam, ADAM, torch.optim.Adam),
    "sgd": Kind(collage.SGD, {"momentum": 0.9}, torch.optim.SGD),
    "lion": Kind(collage.Lion, {"betas": (0.9, 0.99)}, None),
    "muon": Kind(collage.Muon, MUON, getattr(torch.optim, "Muon", None), hidden=True, params=4 * 10**6),
}


def count(shapes: Shapes) -> int:
    """Parameters of these shapes."""
    return sum(map(math.prod, shapes))


def each(size: float) -> Callable[[Shapes], float]:
    """So many bytes for every parameter."""
    return lambda shapes: size * count(shapes)


@dataclass(slots=True)
class Contestant:
    """An optimizer with parameters of its own."""

    params: list[Tensor]  # whose gradients a caller fills
    step: Callable[[], Any]
    values: Callable[[], list[Tensor]]  # the weights with all that the optimizer keeps of them
    steps: int = 1  # that one call of `step` makes


Build = Callable[[Shapes, float, torch.device], Contestant]  # (shapes, lr, device)


class Row(NamedTuple):
    """One line of the table."""

    name: str
    build: Build
    moved: Callable[[Shapes], float]  # bytes that a step has to read and write
    kept: Callable[[Shapes], float]  # bytes of weights, state and gradients


def parameters(shapes: Shapes, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Weights N(0, 0.05) rounded to bfloat16, and gradients N(0, 1e-3); the same numbers for every row.

    Of e4m3 ones matrices are converted, and keep their layers alive; others stay bfloat16.
    """
    wide = torch.bfloat16 if dtype.itemsize == 1 else dtype
    normal = torch.empty(1 << 16).normal_(generator=torch.Generator().manual_seed(0)).to(device)

    def tensor(shape: tuple[int, ...], std: float) -> Tensor:
        n = math.prod(shape)
        return (normal * std).bfloat16().to(wide).repeat(n // len(normal) + 1)[:n].view(shape).clone()

    params: list[Tensor] = []
    for shape in shapes:
        weight = nn.Parameter(tensor(shape, 0.05))
        params.append(_converted(weight) if dtype.itemsize == 1 and len(shape) == 2 else weight)
        params[-1].grad = tensor(shape, 1e-3)
    return params


def _converted(weight: nn.Parameter) -> Tensor:
    layer = nn.Linear(1, 1, bias=False, device=weight.device)
    layer.weight = weight
    fp8.convert(layer)
    param = layer.weight
    vars(param)["layer"] = layer
    return param


def ours(kind: Kind, name: str, monitored: int | None = None) -> Row:
    """A strategy of this package; `monitored`: measured once in so many steps, and timed over ten."""
    strategy = Strategy.parse(name)
    label = name if monitored is None else f"{name}, monitored 1 in {monitored}"

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = parameters(shapes, device, strategy.dtype)
        opt = kind.make(((f"{label}, {k}", param) for k, param in enumerate(params)), lr, strategy)

        def values() -> list[Tensor]:
            return [format_of(opt.strategy_of(own).param).value(opt.theta(own)) for own in opt.parameters()]

        if monitored is None:
            return Contestant(params, opt.step, values)
        collage.monitor(opt, every=monitored)
        return Contestant(params, lambda: [opt.step() for _ in range(10)], values, steps=10)

    return Row(label, build, partial(kind.moved, strategy), partial(kind.kept, strategy))


def limit(kind: Kind, name: str) -> Row:
    """Reads and writes the planes of a strategy, without arithmetic."""
    strategy = Strategy.parse(name)

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        opt = kind.make(parameters(shapes, device, strategy.dtype), lr, strategy)
        streams: dict[tuple[str, ...], tuple[list[Tensor], list[Tensor]]] = {}  # small parameters have other planes
        for parameter in opt.parameters():
            formats = kind.formats(opt.strategy_of(parameter), parameter.tensor.shape)
            planes, grads = streams.setdefault(formats, ([], []))
            planes += [plane for slot in opt.planes(parameter) for plane in slot]
            grads.append(torch.zeros_like(parameter.tensor, dtype=strategy.beside.dtype))
        backend = choose("auto", device)

        def step() -> None:
            for formats, (planes, grads) in streams.items():
                backend.stream(formats, planes, grads)

        return Contestant([parameter.tensor for parameter in opt.parameters()], step, list)

    def moved(shapes: Shapes) -> float:
        return 2 * kind.planes(strategy, shapes) + strategy.beside.dtype.itemsize * count(shapes)

    return Row(f"limit of {name}", build, moved, partial(kind.kept, strategy))
