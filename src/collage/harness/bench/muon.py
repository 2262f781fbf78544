"""What `collage bench --optimizer muon` times beside: torch's Muon, and the orthogonalisation alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from collage.harness.bench.contestants import (
    KINDS,
    MUON,
    Contestant,
    Row,
    Shapes,
    count,
    each,
    is_hidden,
    parameters,
)
from collage.harness.bench.others import adamw, option_d
from collage.optimizers.orthogonal import Orthogonalisation
from collage.strategies import Strategy

ALONE = "orthogonalisation alone"


def steps_of_torch(params: Sequence[Tensor], lr: float) -> Callable[[], Any]:
    """torch's Muon of the hidden matrices and its fused AdamW of all others: their steps."""
    hidden = [p for p in params if is_hidden(p.shape)]
    others = [p for p in params if not is_hidden(p.shape)]
    kind: Any = KINDS["muon"].torch
    steps: list[Callable[[], Any]] = [kind(hidden, lr=lr, **MUON).step] if hidden else []
    steps += [adamw(fused=True)(others, lr)] if others else []
    return lambda: [step() for step in steps]


def torchs(label: str, dtype: torch.dtype) -> Row:
    """Both, on weights and states of one dtype."""

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = parameters(shapes, device, dtype)
        return Contestant(params, steps_of_torch(params, lr), lambda: params)

    return Row(
        label,
        build,
        lambda shapes: numbers(shapes, 2) * dtype.itemsize,
        lambda shapes: numbers(shapes, 1) * dtype.itemsize,
    )


def numbers(shapes: Shapes, times: int) -> float:
    """How many there are of gradients, and `times` as many as there are of weights and states."""
    return sum((1 + times * (2 if is_hidden(shape) else 3)) * count([shape]) for shape in shapes)


def alone() -> Row:
    """The orthogonalisation of all hidden matrices, as a step makes it, and nothing else."""

    def build(shapes: Shapes, lr: float, device: torch.device) -> Contestant:
        params = [p for p in parameters(shapes, device) if is_hidden(p.shape)]
        groups = KINDS["muon"].make(params, lr, Strategy.parse("bf16")).param_groups if params else []
        hows = list(map(Orthogonalisation.of, groups))
        directions = [p.grad for p in params if p.grad is not None]

        @torch.no_grad()
        def step() -> None:
            for how in hows:
                for direction in directions:
                    how(direction.to(how.dtype_on(device)))

        return Contestant(params, step, list)

    return Row(ALONE, build, each(6), each(2))


def shares(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Which part of each row's time the orthogonalisation takes by itself; of rows that are ours."""
    by_name = {line["name"]: line["ms"] for line in table}
    limited = {name.removeprefix("limit of ") for name in by_name if name.startswith("limit of ")}
    return {name: by_name[ALONE] / by_name[name] for name in by_name if name in limited and ALONE in by_name}


OTHERS = (
    torchs("A: torch bf16", torch.bfloat16),
    torchs("torch fp32", torch.float32),
    option_d("D: torch + master", preallocated=True, make=steps_of_torch, states=1),
)
