"""Monitors on shards: what all ranks report is what one process reports of the same weights and gradients."""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from ranks import launch
from torch import nn

import collage
from collage.monitor.quality import Quality, Report
from collage.strategies import STRATEGIES

# Of one element, of one dimension, small, of rows that blocks do not fill, of whole blocks, of three dimensions.
SHAPES = {
    "one": (1,),
    "few": (3,),
    "long": (5003,),
    "small": (64, 48),
    "rows": (37, 130),
    "blocks": (33, 256),
    "cube": (5, 40, 24),
    "whole": (9, 8),  # a plain tensor on every rank
}
BESIDE = ("bf16", "kahan", "collage-plus-sr", "collage-8bit")
QUICK = ("collage-plus", "collage-plus-sr", "collage-8bit")


def numbers(name: str, seed: int, dtype: torch.dtype) -> torch.Tensor:
    key = 100 * seed + list(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(key)).to(dtype)


class Layout:
    """How the parameters lie: a mesh, and the placements of those of which it is not the usual one."""

    def __init__(self, sizes: tuple[int, ...], usual, **others) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh, self.usual, self.others = init_device_mesh("cpu", sizes), usual, others

    def __call__(self, name: str, whole: torch.Tensor):
        from torch.distributed.tensor import distribute_tensor

        return whole if name == "whole" else distribute_tensor(whole, self.mesh, self.others.get(name, self.usual))


def layouts(blocks: bool) -> Iterator[tuple[str, Layout]]:
    """Those of this many ranks, by name. blocks: whether shards must not cut any."""
    from torch.distributed.tensor import Replicate, Shard

    world = dist.get_world_size()
    rows, columns, replica = Shard(0), Shard(1), Replicate()
    yield "rows", Layout((world,), [rows])
    wide = {} if blocks else {"rows": [columns], "cube": [Shard(2)]}
    if not blocks or world <= 2:
        wide["blocks"] = [columns]
    yield "columns", Layout((world,), [rows], small=[columns], few=[replica], **wide)
    if world == 4:
        yield "replicas of rows", Layout((2, 2), [replica, rows])
        wide = {} if blocks else {"rows": [rows, columns], "cube": [columns, rows]}
        yield (
            "rows and columns",
            Layout((2, 2), [rows, replica], small=[rows, columns], blocks=[rows, columns], **wide),
        )


def run(strategy: str, lay, steps: int, parts: int, beside: tuple[str, ...]) -> list[Report]:
    """Reports of a run that others write to: in the middle of it, at its end, and of a window."""
    dtype = STRATEGIES[strategy].dtype
    params = {name: nn.Parameter(lay(name, numbers(name, 99, dtype))) for name in SHAPES}
    groups = [
        {"params": [(name, p) for name, p in params.items() if (name in ("one", "rows")) == first], "lr": lr}
        for first, lr in ((True, 1e-3), (False, 1e-4))
    ]
    opt = collage.AdamW(groups, weight_decay=0.1, strategy=strategy)
    mon = collage.monitor(opt, every=2, shadow=3, strategies=beside)
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
    counts = ("steps", "nonzero", "lost", "edited")
    assert {key: mine[key] for key in counts} == {key: theirs[key] for key in counts}, where
    for key in theirs.keys() - set(counts):
        a, b = mine[key], theirs[key]
        assert a == b or math.isclose(a, b, rel_tol=1e-12), f"{where}: {key} is {a}, not {b}"


def assert_same_report(where: str, got: Report, want: Report) -> None:
    assert got.frozen == want.frozen
    for kind in ("by_parameter", "beside"):
        mine, theirs = getattr(got, kind), getattr(want, kind)
        assert list(mine) == list(theirs), where
        for name, quality in theirs.items():
            assert_same(f"{where}, {kind} {name}", mine[name], quality)
    for k, (mine, theirs) in enumerate(zip(got.by_group, want.by_group, strict=True)):
        assert_same(f"{where}, group {k}", mine, theirs)
    assert_same(f"{where}, total", got.total, want.total)


def assert_same_on_every_rank(report: Report) -> None:
    others: list = [None] * dist.get_world_size()
    dist.all_gather_object(others, report)
    assert all(other == report for other in others)


def compare(strategy: str, steps: int) -> None:
    blocks = "8bit" in strategy
    for parts, (name, lay) in itertools.product((1, 3), layouts(blocks)):
        beside = BESIDE[:2] if "columns" in name else BESIDE
        got = run(strategy, lay, steps, parts, beside)
        want = run(strategy, lambda _, whole: whole, steps, parts, beside)
        for k, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            assert_same_report(f"{strategy}, {name}, {parts} parts, report {k}", mine, theirs)
            assert_same_on_every_rank(mine)
        assert want[-1].total.edited > 0 or len(STRATEGIES[strategy].param.split("+")) < 2 or blocks, strategy


def rank(steps: str, *strategies: str) -> None:
    dist.init_process_group("gloo")
    for strategy in strategies:
        compare(strategy, int(steps))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_reports_what_one_process_does(world):
    launch(__file__, world, "6", *QUICK)


if __name__ == "__main__":
    rank(*sys.argv[1:])
