"""Shards step with the bits of the whole: every strategy and optimizer, on one to four processes, in every sharding."""

import itertools
from functools import cache

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits
from ranks import assert_same_as_alone, launch, perform
from torch import nn

import collage
from collage.strategies import STRATEGIES

STEPS = 50
# On 4 ranks the last has nothing of the first and of the last parameter. Two are large enough for scales of blocks.
SHAPES = {"first": (3, 1536), "rows": (33, 160), "deep": (6, 4, 256), "bias": (7,), "one": (1, 40)}
OPTIMIZERS = {
    "AdamW": {"weight_decay": 0.1},
    "AMSGrad": {"weight_decay": 0.1, "amsgrad": True},
    "Adam": {"weight_decay": 0.1},
    "SGD": {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    "Lion": {"weight_decay": 0.1},
    "Muon": {"weight_decay": 0.1, "flatten": True, "adjust_lr_fn": "match_rms_adamw"},
}
FEW = ("collage-plus-sr", "collage-exact", "collage-8bit")  # of each kind of plane one
VARIANTS = ((False, "auto"), (True, "auto"), (False, "reference"))  # monitored; backend
SHARDINGS = {
    1: ["fsdp"],
    2: ["fsdp", "columns", "rows"],
    3: ["fsdp", "rows"],
    4: ["fsdp", "hsdp", "fsdp columns", "fsdp rows", "rows columns"],
}


class Model(nn.Module):
    """Parameters alone: their gradients are given."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def numbers(seed: int, scale: float):
    g = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=g) * scale).bfloat16() for name, shape in SHAPES.items()}


@cache  # every mesh has process groups of its own, with threads
def mesh_of(*shape: int):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])


def sharded(model: nn.Module, sharding: str) -> nn.Module:
    """The same model, its parameters made DTensors by torch's own means."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    line, square = (dist.get_world_size(),), (2, 2)
    if sharding in ("fsdp", "hsdp"):
        return fully_shard(model, mesh=mesh_of(*(line if sharding == "fsdp" else square)))
    within = "fsdp" in sharding
    mesh = mesh_of(*square)["inner"] if within else mesh_of(*(square if " " in sharding else line))
    placed = [Shard(["rows", "columns"].index(part)) for part in sharding.split() if part != "fsdp"]
    for name, p in model.named_parameters():
        fits = [place if place.dim < p.dim() else Shard(0) for place in placed]
        setattr(model, name, nn.Parameter(distribute_tensor(p.detach(), mesh, fits, src_data_rank=None)))
    return fully_shard(model, mesh=mesh_of(*square)["outer"]) if within else model


def cuts_blocks(strategy: str, sharding: str) -> bool:
    return "8bit" in strategy and "columns" in sharding


def train(model: nn.Module, optimizer: str, strategy: str, gradients, monitored: bool = False, backend: str = "auto"):
    """A run in whose middle others write to weights."""
    kind = getattr(collage, "AdamW" if optimizer == "AMSGrad" else optimizer)
    opt = kind(model.named_parameters(), lr=1e-2, strategy=strategy, backend=backend, **OPTIMIZERS[optimizer])
    monitor = collage.monitor(opt, every=7, shadow=16) if monitored else None
    for step, given in enumerate(gradients):
        for p, g in zip(model.parameters(), given, strict=True):
            p.grad = g
        opt.step()
        if step == len(gradients) // 2:
            with torch.no_grad():
                model.rows.mul_(2.0**-10)
    assert monitor is None or monitor.report().total.steps == len(range(0, len(gradients), 7))
    return opt


def cast(model: nn.Module, dtype: torch.dtype):
    return [p.detach().to(dtype) for p in model.parameters()]


def hold(optimizers: str, strategies: str, steps: str) -> None:
    """The same gradients, sharded and not: the same bits, measured or not."""
    names = list(STRATEGIES) if strategies == "every" else strategies.split()
    cases = list(itertools.product(OPTIMIZERS if optimizers == "every" else optimizers.split(), names))
    start = numbers(99, 1.0)
    given = [numbers(k, 1e-2) for k in range(int(steps))]
    wanted = {}
    for optimizer, strategy in cases:
        dtype = STRATEGIES[strategy].dtype
        alone = Model({name: tensor.to(dtype, copy=True) for name, tensor in start.items()})
        gradients = [[g.to(dtype) for g in own.values()] for own in given]
        wanted[optimizer, strategy] = alone, train(alone, optimizer, strategy, gradients)
    for sharding in SHARDINGS[dist.get_world_size()]:
        parts = [sharded(Model(own), sharding) for own in given]
        for dtype in dict.fromkeys(STRATEGIES[strategy].dtype for strategy in names):  # in one order on every rank
            gradients = [cast(own, dtype) for own in parts]
            for (optimizer, strategy), (alone, other) in wanted.items():
                if STRATEGIES[strategy].dtype != dtype or cuts_blocks(strategy, sharding):
                    continue
                for monitored, backend in VARIANTS:
                    ours = sharded(
                        Model({name: tensor.to(dtype, copy=True) for name, tensor in start.items()}), sharding
                    )
                    opt = train(ours, optimizer, strategy, gradients, monitored, backend)
                    label = f"{sharding} {optimizer} {strategy} {backend} {monitored}"
                    assert_same_as_alone(label, ours, opt, alone, other)


def cut_blocks() -> None:
    """Shards that cut a block are refused alike on every rank, whichever way they came about, and nothing changes."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    flat, square = mesh_of(4), mesh_of(2, 2)
    wide = torch.randn(64, 160, generator=torch.Generator().manual_seed(0)).bfloat16()

    def by_fsdp(mesh, dim: int) -> nn.Module:
        made = nn.ParameterDict({"w": nn.Parameter(wide.clone())})
        return fully_shard(made, mesh=mesh, shard_placement_fn=lambda _: Shard(dim))

    both = nn.ParameterDict({"w": nn.Parameter(distribute_tensor(wide.clone(), square["inner"], [Shard(1)]))})
    for made in (by_fsdp(flat, 1), fully_shard(both, mesh=square["outer"]), by_fsdp_on_columns(square, wide)):
        before = made["w"].detach().to_local().clone()
        with pytest.raises(ValueError, match=r"'w': it is sharded along dimension 1, .*every 128 neighbours"):
            collage.AdamW(made.named_parameters(), strategy="collage-8bit")
        assert_same_bits("w", made["w"].detach().to_local(), before)
        collage.AdamW(made.named_parameters(), strategy="collage-exact")
    collage.AdamW(by_fsdp(flat, 0).named_parameters(), strategy="collage-8bit")


def by_fsdp_on_columns(mesh, wide: torch.Tensor) -> nn.Module:
    """Columns parted by tensor parallelism, and these parted again by FSDP2."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    made = nn.ParameterDict({"w": nn.Parameter(distribute_tensor(wide.clone(), mesh["inner"], [Shard(1)]))})
    return fully_shard(made, mesh=mesh["outer"], shard_placement_fn=lambda _: Shard(1))


def some(*strategies: str) -> None:
    hold("AdamW", " ".join(strategies), "3")
    hold("Muon", strategies[0], "3")
    cut_blocks()


def test_shards_have_the_bits_of_the_whole():
    launch(__file__, 4, "some", *FEW)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shards_have_the_bits_of_the_whole_under_every_strategy(world):
    launch(__file__, world, "hold", "AdamW", "every", str(STEPS), seconds=1200)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_shards_have_the_bits_of_the_whole_under_every_optimizer(world):
    launch(__file__, world, "hold", "every", " ".join(FEW), str(STEPS), seconds=1200)


if __name__ == "__main__":
    perform(globals())
