"""The lines of `collage bench`, and how much of an intended movement each lets arrive."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from collage.harness.bench import muon
from collage.harness.bench.contestants import KINDS, Row, limit, ours
from collage.harness.bench.others import EXTRA, MASTERS, WAYS, torchs
from collage.harness.bench.sharded import sharded
from collage.strategies import Strategy

DEFAULT = ("bf16", "collage-light", "collage-plus", "collage-plus-sr", "fp32-master")


def rows(
    optimizer: str, strategies: Sequence[str], monitor: bool, others: bool, extra: bool, shards: bool = False
) -> list[Row]:
    """The lines of the table, limits first. Others but torch's own of the same rule are there for AdamW and Muon."""
    kind = KINDS[optimizer]
    known = list(dict.fromkeys(str(Strategy.parse(name)) for name in strategies))
    watched = "collage-plus" if "collage-plus" in known else known[-1]
    found = [limit(kind, name) for name in known] + [ours(kind, name) for name in known]
    found += [sharded(kind, name) for name in known if shards]
    found += [ours(kind, watched, every) for every in (10, 1)] if monitor else []
    if kind.hidden:
        return [*found, muon.alone(), *(muon.OTHERS if others else ())]
    found += [torchs(kind, label, dtype, **how) for label, dtype, how in WAYS] if others and kind.torch else []
    if optimizer == "adamw":
        found += [*(MASTERS if others else ()), *(EXTRA if extra else ())]
    return found


def arrived(optimizer: str, row: Row, device: torch.device, steps: int = 50, lr: float = 1e-5) -> float | None:
    """<D, D'> / |D|**2, with D the movement of the weights under torch's optimizer in float64 and D' this row's.

    None where torch has no such optimizer.

    1.0: all of the intended movement arrived. Gradients N(0, 1e-3), new at every step.
    """
    kind = KINDS[optimizer]
    shape = (64, 4096) if kind.hidden else (16, 4096)
    if kind.torch is None:
        return None
    contestant = row.build([shape], lr, device)
    exact = torch.nn.Parameter(contestant.values()[0].detach().double())
    start = exact.detach().clone()
    opt = kind.torch([exact], lr=lr, **kind.settings)  # type: ignore[call-arg]
    g = torch.Generator().manual_seed(1)
    for _ in range(0, steps, contestant.steps):
        grad = torch.empty(exact.shape).normal_(std=1e-3, generator=g).bfloat16().to(exact.device)
        contestant.params[0].grad.copy_(grad)  # type: ignore[union-attr]
        exact.grad = grad.double()
        contestant.step()
        for _ in range(contestant.steps):
            opt.step()
    intended = exact.detach() - start
    moved = contestant.values()[0].detach().double() - start
    return float((intended * moved).sum() / intended.square().sum())
