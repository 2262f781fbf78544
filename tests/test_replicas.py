"""Replicas stay one model: DistributedDataParallel, with and without ZeroRedundancyOptimizer around ours; FSDP1."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits, assert_same_planes, planes_of
from ranks import launch, perform
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import collage
from collage.strategies import STRATEGIES

STEPS = 50
FEW = ("collage-plus-sr", "collage-exact", "collage-8bit")
WAYS = ({}, {"static_graph": True}, {"gradient_as_bucket_view": True})


def model(strategy: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(160, 33), nn.ReLU(), nn.Linear(33, 7)).to(STRATEGIES[strategy].dtype)


def train(made: nn.Module, opt: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Every rank on batches of its own."""
    p = next(made.parameters())
    for step in range(start, stop):
        seeded = torch.Generator().manual_seed(100 * step + dist.get_rank())
        made(torch.randn(8, 160, generator=seeded).to(p.dtype)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def assert_one_model(label: str, planes: dict[str, torch.Tensor]) -> None:
    """The planes of every rank are those of the first."""
    theirs = [planes]
    dist.broadcast_object_list(theirs)
    for key, want in theirs[0].items():
        assert_same_bits(f"{label} {key}", planes[key], want)


def ddp(strategies: str, steps: str) -> None:
    for strategy, way in itertools.product(STRATEGIES if strategies == "every" else strategies.split(), WAYS):
        made = DistributedDataParallel(model(strategy), **way)
        opt = collage.AdamW(made.named_parameters(), lr=1e-2, weight_decay=0.1, strategy=strategy)
        mon = collage.monitor(opt, every=7)
        before = made.module[0].weight.detach().clone()
        train(made, opt, 0, int(steps))
        assert not torch.equal(made.module[0].weight, before)
        assert mon.report().total.steps > 0
        assert_one_model(f"{strategy} {way}", planes_of(opt))


def zero(strategies: str, steps: str) -> None:
    """States spread over ranks, gathered, and loaded again: the run goes on with the same bits."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for strategy in STRATEGIES if strategies == "every" else strategies.split():
        made = DistributedDataParallel(model(strategy))
        again = copy.deepcopy(made.module)
        settings = {"lr": 1e-2, "weight_decay": 0.1, "strategy": strategy, "seed": dist.get_rank()}
        opt = ZeroRedundancyOptimizer(made.parameters(), optimizer_class=collage.AdamW, **settings)
        train(made, opt, 0, int(steps))
        assert_one_model(strategy, dict(made.named_parameters()))
        again.load_state_dict(made.module.state_dict())
        opt.consolidate_state_dict(to=0)
        saved = [opt.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(saved)
        resumed = ZeroRedundancyOptimizer(again.parameters(), optimizer_class=collage.AdamW, **settings)
        resumed.load_state_dict(copy.deepcopy(saved[0]))  # it takes the tensors themselves
        for group in resumed.param_groups:  # it has loaded the first rank's
            group["seed"] = dist.get_rank()
        again = DistributedDataParallel(again)
        for pair in ((made, opt), (again, resumed)):
            train(*pair, int(steps), int(steps) + 3)
        if (
            dist.get_world_size() == 2
        ):  # of more, a DDP that has made a step adds gradients up in another order than a new one
            assert_same_planes(planes_of(resumed.optim), planes_of(opt.optim))
        assert_one_model(strategy, dict(again.named_parameters()))


def fsdp1(strategies: str, steps: str) -> None:
    """Formats without random bits and integers, in flat shards; others are told what becomes of them."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel

    for strategy, original in itertools.product(strategies.split(), (True, False)):
        ours, alone = model(strategy), model(strategy)
        ours = FullyShardedDataParallel(ours, use_orig_params=original, device_id=torch.device("cpu"))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            opt, other = (
                collage.AdamW(made.named_parameters(), lr=1e-2, weight_decay=0.1, strategy=strategy)
                for made in (ours, alone)
            )
        told = [str(w.message) for w in said if "FullyShardedDataParallel" in str(w.message)]
        if STRATEGIES[strategy].stochastic or strategy == "collage-exact":
            assert len(told) == 1, told
            continue
        assert not told
        for step in range(int(steps)):
            for made, optimizer in ((ours, opt), (alone, other)):
                seeded = torch.Generator().manual_seed(step)
                made(torch.randn(8, 160, generator=seeded).to(torch.bfloat16)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if step == 1:  # its states through torch's dictionary
                set_optimizer_state_dict(ours, opt, get_optimizer_state_dict(ours, opt))
        with FullyShardedDataParallel.summon_full_params(ours):
            for p, q in zip(ours.parameters(), alone.parameters(), strict=True) if original else ():
                assert_same_bits(strategy, p.detach().reshape(q.shape), q.detach())


def each(strategies: str, steps: str) -> None:
    ddp(strategies, steps)
    zero(strategies, steps)


def some(*strategies: str) -> None:
    each(" ".join(strategies), "3")
    fsdp1(" ".join(("collage-plus", *strategies)), "3")


def test_replicas_have_the_same_bits():
    launch(__file__, 2, "some", *FEW)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_replicas_have_the_same_bits_under_every_strategy(world):
    launch(__file__, world, "each", "every", str(STEPS), seconds=900)


if __name__ == "__main__":
    perform(globals())
