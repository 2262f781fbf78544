"""`collage bench --wrapped`: other optimizers on low-precision weights, against the same on float32 master copies."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console

import collage
from collage.harness.bench.contestants import Shapes, count, parameters
from collage.harness.bench.measure import LR, seconds
from collage.harness.bench.others import with_masters
from collage.harness.console import bar, print_table, progress, say
from collage.harness.ledger import peak_of
from collage.harness.machine import machine
from collage.harness.options import open_folder
from collage.harness.text import Column, fixed, short, to_json
from collage.optimizers.wrap import Wrapped

STRATEGIES = ("collage-plus", "fp32-master")
PARAMS = 16 * 10**6


class Kind(NamedTuple):
    """An optimizer to wrap."""

    make: type[torch.optim.Optimizer]
    settings: dict[str, Any]

    def alone(self, params: Any, lr: float) -> Callable[[], Any]:
        """The step of the optimizer itself."""
        return self.make(params, lr=lr, **self.settings).step  # type: ignore[call-arg]


KINDS = {
    "AdamW(fused=True)": Kind(torch.optim.AdamW, {"fused": True}),
    "AdamW": Kind(torch.optim.AdamW, {}),
    "NAdam": Kind(torch.optim.NAdam, {}),
    "RAdam": Kind(torch.optim.RAdam, {}),
    "Adamax": Kind(torch.optim.Adamax, {}),
    "Adagrad": Kind(torch.optim.Adagrad, {}),
    "Adadelta": Kind(torch.optim.Adadelta, {}),
    "RMSprop": Kind(torch.optim.RMSprop, {}),
    "SGD(momentum=0.9)": Kind(torch.optim.SGD, {"momentum": 0.9}),
    "Adafactor": Kind(torch.optim.Adafactor, {}),
}

NS = partial(fixed, digits=2)
COLUMNS = (
    Column("master", "ns/param", "masters", NS),
    Column("collage-plus", "wrapped", "plus", NS),
    Column("ratio", "÷ masters", "", NS),
    Column("fp32-master", "wrapped", "fp32-master", NS),
    Column("kept", "bytes", "plus", partial(short, digits=2)),
    Column("kept_master", "bytes", "fp32-master", partial(short, digits=2)),
    Column("more_mb", "MiB more", "in a step", partial(fixed, digits=0)),
)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON; the exit status."""
    open_folder(args.out)
    screen = Console(width=max(110, Console().width))
    shapes: Shapes = [(max(1, args.params // 4000), 1000)] * 4
    with progress(screen) as bars:
        rows = dict(measured(shapes, args.rounds, bar(bars, "optimizers", len(KINDS))))
    result = {
        "machine": machine(torch.float32, False), "parameters": count(shapes), "rows": rows,
        "command": f"collage bench --wrapped --params {args.params} --rounds {args.rounds}",
    }  # fmt: skip
    (args.out / "wrapped.json").write_text(to_json(result, indent=1), encoding="utf-8")
    title = (
        f"collage.wrap and float32 master copies as people write them, {count(shapes):,} weights, bfloat16 gradients"
    )
    print_table(screen, title, COLUMNS, rows, "torch.optim")
    say(screen, f"numbers: {args.out}/wrapped.json")
    return 0


def measured(shapes: Shapes, rounds: int, tick: Callable[[int], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each optimizer: all ways of it round after round, so that what disturbs one disturbs all."""
    device = torch.device("cpu")
    for k, (name, kind) in enumerate(KINDS.items()):
        wrapped = {
            s: collage.wrap(kind.make, parameters(shapes, device), lr=LR, strategy=s, **kind.settings)
            for s in STRATEGIES
        }
        masters = with_masters(kind.alone, False)(shapes, LR, device)
        steps: dict[str, Callable[[], Any]] = {"master": masters.step} | {s: own.step for s, own in wrapped.items()}
        for step in steps.values():
            step()
        times: dict[str, list[float]] = {way: [] for way in steps}
        for _ in range(rounds):
            for way, step in steps.items():
                times[way].append(seconds(step, 1) / count(shapes) * 1e9)
        row = {way: median(own) for way, own in times.items()}
        row |= {"ratio": row["collage-plus"] / row["master"], "more_mb": more(wrapped["collage-plus"]) / 2**20}
        row["kept"], row["kept_master"] = (kept(wrapped[s], count(shapes)) for s in STRATEGIES)
        tick(k + 1)
        yield name, row


def more(optimizer: Wrapped) -> int:
    """Bytes that a step has beside what there is before the first."""
    anew = deepcopy(optimizer)  # it has kept no memory of earlier steps
    for group, copied in zip(optimizer.param_groups, anew.param_groups, strict=True):
        for param, own in zip(group["params"], copied["params"], strict=True):
            own.grad = param.grad
    return peak_of(anew.step)


def kept(optimizer: Wrapped, numel: int) -> float:
    """Bytes of weights, states and gradients, per weight."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [x for own in optimizer.state_dict()["state"].values() for x in own.values()]
    every = [*params, *(p.grad for p in params), *states]
    return sum(x.nbytes for x in every if isinstance(x, torch.Tensor)) / numel
