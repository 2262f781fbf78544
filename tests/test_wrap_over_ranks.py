"""Wrapped optimizers on sharded weights: the bits of one process where the base is elementwise, else the base's own."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits
from ranks import launch, perform, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from wrapped import BASES, EVERY, ONE, modes

import collage
from collage.strategies import STRATEGIES

FULL = StateDictOptions(full_state_dict=True)
SHAPES = {"first": (3, 1536), "rows": (33, 160), "bias": (7,)}
SQUARE = {"first": (6, 20), "rows": (33, 16)}
STEPS = 4
Pairs = list[tuple[str, str]]  # an optimizer and a strategy


def model(strategy: str, shapes: dict[str, tuple[int, ...]] = SHAPES) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    made = nn.Module()
    for name, shape in shapes.items():
        drawn = (torch.randn(shape, generator=g) * 0.1).bfloat16()  # float32 weights have the same numbers
        made.register_parameter(name, nn.Parameter(drawn.to(STRATEGIES[strategy].dtype)))
    return made


def sharded(made: nn.Module, mesh: Any, dim: int | None) -> nn.Module:
    """By FSDP2 along rows; or as tensor parallelism has them, along a dimension."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if dim is None:
        return fully_shard(made, mesh=mesh)
    for name, p in list(made.named_parameters()):
        place = Shard(dim) if p.dim() > dim else Replicate()
        made.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [place])))
    return made


def wrapped(made: nn.Module, name: str, strategy: str, **more: Any):
    base = BASES[name]
    return collage.wrap(base.kind, made.named_parameters(), **base.settings, strategy=strategy, **more)


def train(made: nn.Module, opt: torch.optim.Optimizer, start: int = 0, stop: int = STEPS) -> None:
    from torch.distributed.tensor import distribute_tensor

    for step in range(start, stop):
        modes(opt, step)
        g = torch.Generator().manual_seed(step)
        for p in made.parameters():
            grad = torch.randn(p.shape, generator=g).bfloat16().to(p.dtype)
            p.grad = grad
            if hasattr(p, "placements"):
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
        opt.step()
    opt.zero_grad()


def planes(made: nn.Module, opt: Any) -> dict[str, Any]:
    """All that there is, whole."""
    found: dict[str, Any] = {name: whole(p.detach()) for name, p in made.named_parameters()}
    for name, p in made.named_parameters():
        states = {**opt.state[p], **{f"base.{k}": x for k, x in opt.base.state[p].items()}}
        found |= {f"{name} {key}": whole(x) if isinstance(x, Tensor) else x for key, x in states.items()}
    return found


def assert_same(label: str, got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys(), label
    for key, x in want.items():
        if isinstance(x, Tensor):
            assert_same_bits(f"{label} {key}", got[key], x)
        else:
            assert got[key] == x, f"{label} {key}"


def as_one_process(mesh: Any, pairs: Pairs) -> None:
    """Of elementwise bases: FSDP2 and shards along columns, with monitors, whatever the buckets."""
    for (name, strategy), dim in itertools.product(pairs, (None, 1)):
        if dim == 1 and "8bit" in strategy:
            continue  # `refused`
        alone = model(strategy)
        one = wrapped(alone, name, strategy)
        of_one = collage.monitor(one, every=1, shadow=4)
        train(alone, one)
        for bucket in (ONE, EVERY):
            made = sharded(model(strategy), mesh, dim)
            opt = wrapped(made, name, strategy, bucket_mb=bucket)
            monitor = collage.monitor(opt, every=1, shadow=4)
            train(made, opt)
            assert_same(f"{name} {strategy} {dim}", planes(made, opt), planes(alone, one))
            got, want = monitor.report().total, of_one.report().total
            assert (got.nonzero, got.lost, got.edited) == (want.nonzero, want.lost, want.edited)
            assert got.edq_ratio == pytest.approx(want.edq_ratio, rel=1e-12)  # sums of ranks, in another order
            assert got.v_ratio == (None if want.v_ratio is None else pytest.approx(want.v_ratio, rel=1e-12))


def refused(mesh: Any) -> None:
    """Shards that cut blocks in which states are, before anything is changed."""
    for name, settings in (("AdamW", {"strategy": "collage-8bit"}), ("Rprop", {"states": {"prev": "int8/128"}})):
        base, made = BASES[name], sharded(model("collage-plus", {"rows": (64, 160)}), mesh, 1)
        with pytest.raises(ValueError, match=r"param 'rows': it is sharded along dimension 1.* has a scale for every"):
            collage.wrap(base.kind, made.named_parameters(), **base.settings, **settings)


def as_the_base(mesh: Any) -> None:
    """Of others: what the base does to float32 DTensors."""
    name, base = "Muon", BASES["Muon"]
    for dim in (None, 1):
        made = sharded(model("fp32-master", SQUARE), mesh, dim)
        opt = wrapped(made, name, "fp32-master", bucket_mb=ONE)
        wide = sharded(model("fp32", SQUARE), mesh, dim)
        alone = base.kind(wide.parameters(), **base.settings)
        train(made, opt)
        train(wide, alone)
        for p, q in zip(made.parameters(), wide.parameters(), strict=True):
            assert_same_bits(f"{name} {dim}", opt.state[p]["param_master"].to_local(), q.detach().to_local())
    for name in ("Adafactor", "Adafactor of transformers"):  # neither takes DTensors, so far
        made = sharded(model("collage-plus", SQUARE), mesh, None)
        before = {key: whole(p.detach()).clone() for key, p in made.named_parameters()}
        with pytest.raises(RuntimeError, match=r"Sharding propagation failed|mixed torch.Tensor and DTensor"):
            train(made, wrapped(made, name, "collage-plus"))
        for key, p in made.named_parameters():
            assert_same_bits(key, whole(p.detach()), before[key])


def saved_and_loaded(mesh: Any, pairs: Pairs) -> None:
    """torch.distributed.checkpoint's functions, sharded and full, and the optimizer's own dictionary."""
    for name, strategy in pairs:
        made = sharded(model(strategy), mesh, None)
        opt = wrapped(made, name, strategy)
        train(made, opt, 0, 2)
        low = {key: x.detach().clone() for key, x in made.state_dict().items()}
        dictionaries = [get_optimizer_state_dict(made, opt), get_optimizer_state_dict(made, opt, options=FULL)]
        dictionaries.append(opt.state_dict())
        others = []
        for how, saved in zip(("parts", "full", "own"), dictionaries, strict=True):
            other = sharded(model(strategy), mesh, None)
            with torch.no_grad():
                for key, p in other.named_parameters():
                    p.copy_(low[key])
            twin = wrapped(other, name, strategy)
            modes(twin, 0)  # torch makes a step of its own, to have states to load into
            if how == "own":
                twin.load_state_dict(saved)
            else:
                options = FULL if how == "full" else None
                set_optimizer_state_dict(other, twin, saved, options=options)
            others.append((how, other, twin))
        train(made, opt, 2, 4)
        for how, other, twin in others:
            train(other, twin, 2, 4)
            assert_same(f"{name} {strategy} {how}", planes(other, twin), planes(made, opt))


def every(names: str, strategies: str, how: str) -> None:
    """All of it on one mesh. how: to pair names with strategies."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    pairs = list({"zip": zip, "product": itertools.product}[how](names.split(","), strategies.split()))
    as_one_process(mesh, pairs)
    refused(mesh)
    as_the_base(mesh)
    saved_and_loaded(mesh, pairs)


def test_shards_step_as_the_whole():
    launch(__file__, 2, "every", "AdamW,ScheduleFree SGD", "collage-plus-sr collage-exact", "zip")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_shards_step_as_the_whole_under_every_strategy(world):
    names = "AdamW,ScheduleFree SGD,Adagrad,NAdam foreach,Lion,RMSprop"
    strategies = " ".join(name for name, s in STRATEGIES.items() if s.register == torch.float32 and name != "fp32")
    launch(__file__, world, "every", names, strategies, "product", seconds=1200)


if __name__ == "__main__":
    perform({"every": every})
