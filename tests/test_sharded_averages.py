"""FSDP2 on two processes: averages and full-precision dictionaries have the bits of one, and survive DCP."""

import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import assert_same_bits
from ranks import as_rank, launch
from torch import nn

import collage


def model() -> nn.Module:
    """33 rows, which two ranks share unevenly, and a last layer of which one rank has nothing."""
    torch.manual_seed(0)
    return collage.to_bf16(nn.Sequential(nn.Linear(24, 33), nn.ReLU(), nn.Linear(33, 1)))


def sharded(mesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    made = model()
    for module in (made[0], made):
        fully_shard(module, mesh=mesh)
    return made


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 24, generator=torch.Generator().manual_seed(step)).bfloat16()


def train(made: nn.Module, opt, ema, start: int, stop: int) -> None:
    """Every rank sees the same batches, so that gradients averaged over ranks are those of one."""
    for step in range(start, stop):
        made(batch(step)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        ema.update()


def made_for(made: nn.Module, format: str, full: bool):
    opt = collage.AdamW(made.named_parameters(), lr=1e-2, weight_decay=0.1, strategy="collage-plus")
    return opt, collage.EMA(made, decay=0.9, format=format, optimizer=opt if full else None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(got, want) -> None:
    assert got.keys() == want.keys()
    for key in want:
        assert_same_bits(key, whole(got[key]), want[key])


def planes(ema) -> dict[str, torch.Tensor]:
    return {f"{name} {k}": plane for name, planes in ema.planes.items() for k, plane in enumerate(planes)}


def averages(mesh, format: str, full: bool) -> None:
    ours, alone = sharded(mesh), model()
    mine, theirs = made_for(ours, format, full), made_for(alone, format, full)
    train(ours, *mine, 0, 4)
    train(alone, *theirs, 0, 4)
    assert {p.placements for p in planes(mine[1]).values()} == {p.placements for p in ours.parameters()}
    assert_same(planes(mine[1]), planes(theirs[1]))
    assert_same(mine[1].high_precision_state_dict(), theirs[1].high_precision_state_dict())
    assert_same(collage.high_precision_state_dict(ours, mine[0]), collage.high_precision_state_dict(alone, theirs[0]))


def what_the_forward_pass_sees(mesh) -> None:
    """After a forward pass a root keeps the gathered weights: it must not go on with them."""
    ours, alone = sharded(mesh), model()
    mine, theirs = made_for(ours, "fp32", True), made_for(alone, "fp32", True)
    train(ours, *mine, 0, 4)
    train(alone, *theirs, 0, 4)
    x = batch(99)
    with torch.no_grad():
        own = alone(x)
        assert_same_bits("own", ours(x), own)
        with mine[1].averaged(), theirs[1].averaged():
            assert not torch.equal(alone(x), own)
            assert_same_bits("average", ours(x), alone(x))
            assert_same(
                collage.high_precision_state_dict(ours, mine[0]), collage.high_precision_state_dict(alone, theirs[0])
            )
            with pytest.raises(RuntimeError, match=r"step\(\) inside averaged"):
                mine[0].step()
            assert_same_bits("average", ours(x), alone(x))
        assert_same_bits("own again", ours(x), own)
        mine[1].update()  # while the root has the gathered weights
        theirs[1].update()
    assert_same(planes(mine[1]), planes(theirs[1]))
    train(ours, *mine, 4, 6)
    train(alone, *theirs, 4, 6)
    assert_same(planes(mine[1]), planes(theirs[1]))


def in_and_out(mesh) -> None:
    """A whole float32 dictionary goes into shards, and exported DTensors load back, here and into a whole model."""
    full = {key: value + 2.0**-12 * value for key, value in model().float().state_dict().items()}
    ours, alone = sharded(mesh), model()
    mine, theirs = made_for(ours, "fp32", True), made_for(alone, "fp32", True)
    with torch.no_grad():
        ours(batch(0))
    collage.load_high_precision_state_dict(ours, mine[0], full)
    collage.load_high_precision_state_dict(alone, theirs[0], full)
    with torch.no_grad():
        assert_same_bits("forward", ours(batch(0)), alone(batch(0)))
    exported = collage.high_precision_state_dict(ours, mine[0])
    assert_same(exported, collage.high_precision_state_dict(alone, theirs[0]))
    assert any((whole(exported[key]) != model().state_dict()[key].float()).any() for key in exported)
    train(ours, *mine, 0, 2)
    train(alone, *theirs, 0, 2)
    for again, opt in ((ours, mine[0]), (alone, theirs[0])):
        collage.load_high_precision_state_dict(again, opt, exported)
        assert_same(collage.high_precision_state_dict(again, opt), {key: whole(exported[key]) for key in exported})
    train(ours, *mine, 2, 3)  # warns, if its planes did not belong to it
    train(alone, *theirs, 2, 3)
    assert_same(planes(mine[1]), planes(theirs[1]))


def spread(mesh) -> None:
    """Under ZeRO an optimizer has the components of its own rank's parameters only."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    made = model()
    opt = ZeroRedundancyOptimizer(made.parameters(), optimizer_class=collage.AdamW, lr=1e-2)
    made(batch(0)).square().mean().backward()
    opt.step()
    full = {key: value.float() for key, value in made.state_dict().items()}
    for act in (
        lambda: collage.high_precision_state_dict(made, opt),
        lambda: collage.load_high_precision_state_dict(made, opt, full),
        lambda: collage.EMA(made, 0.9, optimizer=opt),
    ):
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer spreads its parameters over ranks"):
            act()


def sharded_afterwards(mesh) -> None:
    """An average that was made before fully_shard follows the weights into their shards."""
    from torch.distributed.fsdp import fully_shard

    ours, alone = model(), model()
    mine, theirs = collage.EMA(ours, decay=0.9), made_for(alone, "bf16x2:sr", False)
    fully_shard(ours, mesh=mesh)
    opt = collage.AdamW(ours.named_parameters(), lr=1e-2, weight_decay=0.1, strategy="collage-plus")
    train(ours, opt, mine, 0, 3)
    train(alone, *theirs, 0, 3)
    assert_same(planes(mine), planes(theirs[1]))


def saved(mesh, folder: str) -> None:
    ours = sharded(mesh)
    opt, ema = made_for(ours, "bf16x2:sr", True)
    train(ours, opt, ema, 0, 3)
    dcp.save({"ema": ema.state_dict()}, checkpoint_id=folder)


def loaded(made: nn.Module, folder: str) -> None:
    """Into this model's own sharding, and into that of one process: the average of three updates."""
    alone = model()
    opt, want = made_for(alone, "bf16x2:sr", True)
    train(alone, opt, want, 0, 3)
    _, got = made_for(made, "bf16x2:sr", True)
    state = {"ema": got.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    got.load_state_dict(state["ema"])
    assert got.steps == 3
    assert_same(planes(got), planes(want))


def rank(task: str, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if task == "averages":
        for format in ("bf16x2:sr", "fp32"):
            for full in (True, False):
                averages(mesh, format, full)
    elif task == "dictionaries":
        in_and_out(mesh)
        what_the_forward_pass_sees(mesh)
        sharded_afterwards(mesh)
        told_of_writes(mesh)
        spread(mesh)
    elif task == "save":
        saved(mesh, folder)
        loaded(sharded(mesh), folder)
    elif task == "load":
        loaded(sharded(mesh), folder)


def told_of_writes(mesh) -> None:
    """A DTensor counts what is done to it, and its local part what is done to that."""
    made = sharded(mesh)
    ema = made_for(made, "bf16x2:sr", full=True)[1]
    for write in (lambda p: p.mul_(2), lambda p: p.to_local().mul_(2)):
        with pytest.warns(RuntimeWarning, match="written to inside averaged"), ema.averaged(), torch.no_grad():
            write(made[0].weight)


@pytest.mark.parametrize("task", ["averages", "dictionaries"])
def test_shards_have_the_bits_of_one_process(task):
    launch(__file__, 2, task, "")


def test_an_average_survives_dcp_on_two_ranks_on_one_and_without_any(tmp_path):
    launch(__file__, 2, "save", str(tmp_path))
    launch(__file__, 1, "load", str(tmp_path))
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        loaded(model(), str(tmp_path))


if __name__ == "__main__":
    as_rank(rank, *sys.argv[1:])
