"""Weights of e4m3 on several ranks: the bits of one process, however their rows are parted, and across checkpoints."""

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import assert_same_bits
from ranks import assert_same_as_alone, launch, perform, whole
from reports import assert_same_report
from test_dcp import optimizer_first, through_flat, through_parts
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import collage
from collage.fp8.owning import scale_of

BESIDE = "bf16", "collage-fp8-lean"
E4M3 = 0, 1, 3, 4  # layers of `made`
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@cache
def line():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def made(seed: int = 0) -> nn.Module:
    """Rows that no two or three ranks share evenly, and two, of which a third rank has none."""
    torch.manual_seed(seed)
    return collage.fp8.convert(unconverted())


def unconverted() -> nn.Module:
    wide = nn.Linear(160, 33), nn.Linear(33, 128, bias=False), nn.GELU()
    narrow = nn.Linear(128, 2), nn.Linear(2, 5), nn.LayerNorm(5), nn.Linear(5, 3)
    return nn.Sequential(*wide, *narrow).bfloat16()


def sharded(model: nn.Module, parted: str = "together", param_dtype: torch.dtype | None = None) -> nn.Module:
    """parted: "apart" gathers each layer by itself, one of them has e4m3 alone. Sums of equal gradients are exact."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for layer in model if parted == "apart" else ():
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=line(), mp_policy=policy)
    return fully_shard(model, mesh=line(), mp_policy=policy)


def optimizer(model: nn.Module, strategy: str, backend: str = "auto") -> torch.optim.Optimizer:
    return collage.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, strategy=strategy, backend=backend)


def train(model: nn.Module, opt: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
    """The same batches on every rank. Losses."""
    losses = []
    for step in range(start, stop):
        x = torch.randn(8, 160, generator=torch.Generator().manual_seed(step)).bfloat16()
        loss = model(x).float().square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    collage.sharding.reshard(model)
    return losses


def assert_scales_alike(label: str, ours: nn.Module, opt: torch.optim.Optimizer, alone: nn.Module) -> None:
    """A state's scales are the module's own rows, and the module has those of all rows once it has run forward."""
    for (name, p), q in zip(ours.named_parameters(), alone.parameters(), strict=True):
        if p.dtype == torch.float8_e4m3fn:
            held, own = opt.state[p]["param_scale"], scale_of(p)
            assert held.to_local().data_ptr() == own.to_local().data_ptr(), f"{label} {name}"
            assert_same_bits(f"{label} {name}", own.full_tensor(), scale_of(q))
    ours(torch.zeros(1, 160, dtype=torch.bfloat16))
    for (name, mine), theirs in zip(ours.named_buffers(), alone.buffers(), strict=True):
        assert_same_bits(f"{label} {name}", mine, theirs)


def assert_exports_alike(label: str, ours: nn.Module, alone: nn.Module) -> None:
    """What shows, sharded as the model is: gathered, and loaded into a sharded model that was not converted."""
    from torch.distributed.fsdp import fully_shard

    exported, wanted = collage.fp8.export(ours), collage.fp8.export(alone)
    assert exported.keys() == wanted.keys()
    plain = fully_shard(unconverted(), mesh=line())
    plain.load_state_dict(exported)
    for key, tensor in wanted.items():
        assert_same_bits(f"{label} {key} exported", exported[key].full_tensor(), tensor)
        assert_same_bits(f"{label} {key} loaded", plain.state_dict()[key].full_tensor(), tensor)


def assert_loads_numbers(label: str, ours: nn.Module, opt: Any, alone: nn.Module, other: Any) -> None:
    """Full precision, exported and loaded into a sharded model by itself: each rank converts its rows."""
    exported, wanted = (collage.high_precision_state_dict(*pair) for pair in ((ours, opt), (alone, other)))
    assert exported.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert_same_bits(f"{label} {key} in full precision", whole(exported[key]), tensor)
    x, again, loaded = torch.ones(1, 160, dtype=torch.bfloat16), made(seed=2), sharded(made(seed=1))
    again.load_state_dict(wanted, strict=False)
    loaded.load_state_dict(exported, strict=False)
    assert_same_bits(f"{label} loaded", loaded(x), again(x))


def hold(strategy: str, steps: str) -> None:
    """A model alone and sharded, in one group and in many, stepped by either backend."""
    alone = made()
    other = optimizer(alone, strategy)
    of_one = collage.monitor(other, every=1, shadow=16, strategies=BESIDE)
    wanted = train(alone, other, 0, int(steps))
    for parted, param_dtype, backend in (
        ("together", None, "auto"),
        ("apart", torch.bfloat16, "auto"),
        ("apart", None, "reference"),
    ):
        label = f"{strategy} {parted} {param_dtype} {backend}"
        ours = sharded(made(), parted, param_dtype)
        opt = optimizer(ours, strategy, backend)
        monitor = collage.monitor(opt, every=1, shadow=16, strategies=BESIDE)
        assert train(ours, opt, 0, int(steps)) == wanted, label
        assert_same_report(label, monitor.report(), of_one.report())
        assert of_one.report().total.rescaled > 0
        assert_same_as_alone(label, ours, opt, alone, other)
        assert_scales_alike(label, ours, opt, alone)
        assert_loads_numbers(label, ours, opt, alone, other)
        assert_exports_alike(label, ours, alone)


def save(folder: str, strategy: str) -> None:
    """After three steps, by every route. What alone is after six is what is wanted."""
    model = sharded(made()) if dist.get_world_size() > 1 else made()
    opt = optimizer(model, strategy)
    train(model, opt, 0, 3)
    at = Path(folder)
    dcp.save(
        {"model": get_model_state_dict(model), "opt": get_optimizer_state_dict(model, opt)}, checkpoint_id=at / "parts"
    )
    weights, state = get_state_dict(model, opt, options=FLAT)
    dcp.save({"model": weights, "opt": state}, checkpoint_id=at / "flat")
    dcp.save({"model": model.state_dict(), "opt": opt.state_dict()}, checkpoint_id=at / "raw")


def through_raw(model: nn.Module, opt: torch.optim.Optimizer, at: Path) -> None:
    """Into the tensors of an optimizer that has stepped elsewhere."""
    train(model, opt, 90, 92)
    state = {"model": model.state_dict(), "opt": opt.state_dict()}
    dcp.load(state, checkpoint_id=at / "raw")
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])


ROUTES = through_parts, optimizer_first, through_flat, through_raw


def load(folder: str, strategy: str, routes: str = "4") -> None:
    alone = made()
    other = optimizer(alone, strategy)
    wanted = train(alone, other, 0, 6)
    for route in ROUTES[: int(routes)]:
        model = sharded(made(seed=1)) if dist.get_world_size() > 1 else made(seed=1)
        opt = optimizer(model, strategy)
        route(model, opt, Path(folder))
        assert train(model, opt, 3, 6) == wanted[3:], route.__name__
        assert_same_as_alone(route.__name__, model, opt, alone, other)


def accumulated(strategy: str) -> None:
    """Two micro-batches, added up by autograd and by a GradientAccumulator, reduced each and at the last alone."""

    def run(model: nn.Module, opt: torch.optim.Optimizer, summing: bool, waits: bool) -> None:
        accumulator = collage.GradientAccumulator(model) if summing else nullcontext()
        for step in range(4):
            if waits:
                model.set_requires_gradient_sync(step % 2 == 1)
            x = torch.randn(8, 160, generator=torch.Generator().manual_seed(step)).bfloat16()
            with accumulator:
                model(x).float().square().mean().backward()
            if step % 2:
                accumulator.finish() if summing else None
                opt.step()
                opt.zero_grad()
        collage.sharding.reshard(model)

    for summing, waits in ((False, False), (False, True), (True, False)):
        alone, ours = made(), sharded(made(), "apart")
        other, opt = optimizer(alone, strategy), optimizer(ours, strategy)
        run(alone, other, summing, False)
        run(ours, opt, summing, waits)
        assert_same_as_alone(f"{summing} {waits}", ours, opt, alone, other)


class Inside(nn.Module):
    """With a forward pass of its own, which a compiler looks into."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.inner:
            x = layer(x)
        return x


def compiled(strategy: str) -> None:
    """A sharded model whose forward and backward are compiled, before it was sharded or after."""
    alone, graphs = Inside(), torch._dynamo.utils.counters["stats"]
    other = optimizer(alone, strategy)
    wanted = train(alone, other, 0, 3)
    for parted, first in (("together", True), ("apart", False), ("together", False)):
        torch._dynamo.reset()
        graphs.clear()
        ours = Inside()
        if first:
            ours.compile(backend="aot_eager")
        sharded(ours.inner, parted) if parted == "apart" else None
        sharded(ours)
        if not first:
            ours.compile(backend="aot_eager")
        opt = optimizer(ours, strategy)
        assert train(ours, opt, 0, 3) == wanted
        assert graphs["unique_graphs"] > 0
        assert_same_as_alone(f"compiled {parted} {first}", ours, opt, alone, other)


def refused() -> None:
    """What parts a row, or leaves a layer with a part of its weight."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    with pytest.raises(ValueError, match=r"shape \(33, 160\) .*dimension 1; have shard_placement_fn return Shard\(0\)"):
        fully_shard(made(), mesh=line(), shard_placement_fn=lambda p: Shard(p.dim() - 1))
    rows, columns = ColwiseParallel(), RowwiseParallel(input_layouts=Replicate())
    model = parallelize_module(made(), line(), {"0": columns}, src_data_rank=None)
    with pytest.raises(ValueError, match=r"'0.weight': it is sharded along dimension 1, .* a scale for every row; "):
        optimizer(model, "collage-fp8")
    model = parallelize_module(made(), line(), {"0": rows}, src_data_rank=None)
    with pytest.raises(
        TypeError, match=r"a part of its weight, \(\d+, 160\) of \(33, 160\), .* shard it with fully_shard"
    ):
        model(torch.zeros(1, 160, dtype=torch.bfloat16))


def saturated(strategy: str) -> None:
    """Rows of either rank go beyond the largest scale, one moves below it: counted once, the same on all ranks."""
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Sequential(nn.Linear(40, 5, bias=False))
    nn.init.constant_(model[0].weight, 2.0**126)
    sharded(collage.fp8.convert(model))
    opt = collage.SGD(model.named_parameters(), lr=1.0, strategy=strategy)
    monitor = collage.monitor(opt, every=1)
    grad = torch.zeros(5, 40).bfloat16()
    grad[0, :3] = grad[4, 7] = -(2.0**127)
    grad[3, 0] = -(2.0**126)
    model[0].weight.grad = distribute_tensor(grad, line(), [Shard(0)])
    opt.step()
    total = monitor.report().total
    assert (total.scales, total.rescaled, total.saturated) == (5, 3 / 5, 0)  # 1.5 * 2**127 still shows
    model[0].weight.grad = distribute_tensor(grad * 0.375, line(), [Shard(0)])
    opt.step()
    window = monitor.window().total
    assert (window.scales, window.rescaled, window.saturated) == (10, 3 / 10, 4)


def remainders(strategy: str) -> None:
    """Of what e4m3 cut off, too: the first rank's, and none where any rank has written to the weight since."""

    def loads(net: nn.Module) -> None:
        net.load_state_dict(made(seed=5).state_dict())

    def writes(net: nn.Module) -> None:
        net[1].weight.detach().view(torch.uint8)[0, 0] ^= 1

    for doing, who in ((None, 0), (loads, 0), (loads, 1), (writes, 0), (writes, 1)):
        alone, ours = made(seed=0), made(seed=dist.get_rank())
        if doing and who == 0:
            doing(alone)
        if doing and who == dist.get_rank():
            doing(ours)
        known = [doing is None or (doing is writes and k != 1) for k in E4M3]
        parallel = DistributedDataParallel(ours)
        assert [ours[k].remainder is not None for k in E4M3] == known
        for k in E4M3:
            alone[k].remainder = alone[k].remainder if ours[k].remainder is not None else None
        opt, other = optimizer(ours, strategy), optimizer(alone, strategy)
        assert train(parallel, opt, 0, 1) == train(alone, other, 0, 1)
        assert_same_as_alone(f"{doing} {who}", ours, opt, alone, other)


def replicated(strategy: str) -> None:
    """Halves of equal gradients add up to them. Ranks begin with the first one's weights."""
    alone = made()
    other = optimizer(alone, strategy)
    wanted = train(alone, other, 0, 4)
    for settings in ({}, {"gradient_as_bucket_view": True, "static_graph": True}):
        ours = made(seed=dist.get_rank())
        parallel = DistributedDataParallel(ours, **settings)
        opt = optimizer(ours, strategy)
        assert train(parallel, opt, 0, 4) == wanted
        assert_same_as_alone(f"{settings}", ours, opt, alone, other)
        assert list(map(id, ours.buffers())) == [id(scale_of(p)) for p in ours.parameters() if scale_of(p) is not None]
    remainders(strategy)
    mixed = made()
    mixed[5].float()
    with pytest.raises(ValueError, match=r"bfloat16 \('0.weight'\), float32 \('5.weight'\); cast the others"):
        DistributedDataParallel(mixed)
    with pytest.raises(
        ValueError, match=r"find_unused_parameters: needs static_graph=True .*ddp_find_unused_parameters=False"
    ):
        DistributedDataParallel(made(), find_unused_parameters=True)


def some(folder: str) -> None:
    hold("collage-fp8", "4")
    save(folder, "collage-fp8")


def others(folder: str) -> None:
    load(folder, "collage-fp8")
    replicated("collage-fp8")
    accumulated("collage-fp8")
    saturated("collage-fp8")
    compiled("collage-fp8")
    refused()


def test_ranks_train_as_one_process_does_and_others_go_on(tmp_path):
    launch(__file__, 3, "some", str(tmp_path))
    launch(__file__, 2, "others", str(tmp_path))
    launch(__file__, 1, "load", str(tmp_path), "collage-fp8", "1")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["collage-fp8", "collage-fp8-lean"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_train_as_one_process_does_for_long(world, strategy):
    launch(__file__, world, "hold", strategy, "50", seconds=600)


if __name__ == "__main__":
    perform(globals())
