"""Monitors on shards: what all ranks report is what one process reports of the same weights and gradients."""

import math
from dataclasses import asdict
from functools import cache

import torch
import torch.distributed as dist
from layouts import SHAPES, alone, layouts, numbers
from torch import nn

import collage
from collage.formats import format_of
from collage.monitor.quality import Quality, Report
from collage.strategies import STRATEGIES

BESIDE = ("bf16", "kahan", "collage-plus-sr", "collage-8bit")
SHORT = 6  # steps, for what needs no more
UNEDITED = {name for name, strategy in STRATEGIES.items() if len(format_of(strategy.param).planes) < 2}


def run(strategy: str, lay, steps: int, parts: int) -> list[Report]:
    """Reports of a run that others write to: in the middle of it, at its end, and of a window."""
    dtype = STRATEGIES[strategy].dtype
    params = {name: nn.Parameter(lay(name, numbers(name, 99, dtype))) for name in SHAPES}
    groups = [
        {"params": [(name, p) for name, p in params.items() if (name in ("one", "rows")) == first], "lr": lr}
        for first, lr in ((True, 1e-3), (False, 1e-4))
    ]
    opt = collage.AdamW(groups, weight_decay=0.1, strategy=strategy)
    mon = collage.monitor(opt, every=2, shadow=3, strategies=BESIDE)
    reports = []
    for step in range(steps):
        grads = {name: lay(name, numbers(name, step, dtype)) for name in SHAPES}
        for part in range(parts):
            for k, (name, p) in enumerate(params.items()):
                p.grad = grads[name] if k % parts == part and not (name == "long" and step == steps - 1) else None
            opt.step()
        if step == steps // 2:
            reports += [mon.report(), mon.window()]
            with torch.no_grad():
                params["blocks"].mul_(2.0**-9)
                params["few"].mul_(0.75)
    opt.resync()
    return [*reports, mon.report(), mon.window()]


def assert_same(where: str, got: Quality, want: Quality) -> None:
    """Counts to the last bit, sums as far as adding them up in another order lets them be the same."""
    mine, theirs = asdict(got), asdict(want)
    counts = ("steps", "nonzero", "lost", "edited", "scales", "rescaled", "saturated")
    assert {key: mine[key] for key in counts} == {key: theirs[key] for key in counts}, where
    for key in theirs.keys() - set(counts):
        a, b = mine[key], theirs[key]
        assert a == b or math.isclose(a, b, rel_tol=1e-12), f"{where}: {key} is {a}, not {b}"


def assert_same_report(where: str, got: Report, want: Report, leave: tuple[str, ...] = ()) -> None:
    assert got.frozen == want.frozen
    for kind in ("by_parameter", "beside"):
        mine, theirs = getattr(got, kind), getattr(want, kind)
        assert list(mine) == list(theirs), where
        for name in theirs.keys() - set(leave):
            assert_same(f"{where}, {kind} {name}", mine[name], theirs[name])
    for k, (mine, theirs) in enumerate(zip(got.by_group, want.by_group, strict=True)):
        assert_same(f"{where}, group {k}", mine, theirs)
    assert_same(f"{where}, total", got.total, want.total)


def assert_same_on_every_rank(report: Report) -> None:
    others: list = [None] * dist.get_world_size()
    dist.all_gather_object(others, report)
    assert all(other == report for other in others)


@cache
def of_one_process(strategy: str, steps: int, parts: int) -> list[Report]:
    return run(strategy, alone, steps, parts)


def compare(strategy: str, steps: int) -> None:
    for name, lay in layouts(blocks="8bit" in strategy):
        for parts, count in ((1, steps), (3, SHORT)) if name == "rows" else ((1, steps),):
            got = run(strategy, lay, count, parts)
            want = of_one_process(strategy, count, parts) if dist.get_rank() == 0 else got
            for k, (mine, theirs) in enumerate(zip(got, want, strict=True)):
                cut = BESIDE[2:] if "columns" in name else ()  # their bits are others, and there are no blocks
                assert_same_report(f"{strategy}, {name}, {parts} parts, report {k}", mine, theirs, cut)
                assert_same_on_every_rank(mine)
        assert got[-1].total.nonzero > 0
        assert (got[-1].total.edited > 0) == (strategy not in UNEDITED)
