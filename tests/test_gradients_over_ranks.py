"""Clipping, accumulation, release and skipped steps over ranks: FSDP2 and DDP on gloo."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits
from ranks import as_rank, launch
from torch import nn

import collage
from collage.sharding import as_bytes, from_bytes

STEPS = 3
MESHES: dict[int, object] = {}


def model() -> nn.Module:
    torch.manual_seed(0)
    return collage.to_bf16(nn.Sequential(nn.Linear(300, 33), nn.LayerNorm(33), nn.Linear(33, 7), nn.Linear(7, 1)))


def sharded() -> nn.Module:
    """Uneven rows, and a last weight that has a row on the first rank alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    made, mesh = model(), init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (made[0], made[2], made):
        fully_shard(module, mesh=mesh)
    return made


def optimizer(made: nn.Module, **settings) -> collage.AdamW:
    return collage.AdamW(made.named_parameters(), lr=1e-2, strategy="collage-plus-sr", **settings)


def muon(made: nn.Module) -> collage.Muon:
    return collage.Muon(made.named_parameters(), adjust_lr_fn="match_rms_adamw", strategy="collage-plus-sr")


def loss(made: nn.Module, step: int, micro: int = 0) -> torch.Tensor:
    """The same on every rank, so that averages over 2 or 4 ranks are those of one."""
    x = torch.randn(8, 300, generator=torch.Generator().manual_seed(10 * step + micro)).bfloat16()
    return made(x).float().square().mean()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return from_bytes(as_bytes(tensor).full_tensor()) if tensor.dtype == torch.int16 else tensor.full_tensor()


def assert_same(name: str, got: nn.Module, opt, want: nn.Module, control) -> None:
    for (key, p), q in zip(got.named_parameters(), want.parameters(), strict=True):
        assert_same_bits(f"{name}: {key}", whole(p.detach()), q.detach())
        for plane, value in control.state[q].items():
            assert_same_bits(f"{name}: {key} {plane}", whole(opt.state[p][plane]), value)


def clipped() -> None:
    """The norm is that of the whole, and so is what comes of it."""
    got, want = sharded(), model()
    pairs = [(made, optimizer(made)) for made in (got, want)]
    for step in range(STEPS):
        norms = []
        for made, opt in pairs:
            loss(made, step).backward()
            norms.append(collage.clip_grad_norm_(made.parameters(), 0.01))
            opt.step()
            opt.zero_grad()
        assert norms[0] == norms[1] > 0.01
        for p in (1.0, 3.0, float("inf")):
            mine, theirs = (collage.clip_grad_norm_(loss_of(made, step), 1e9, norm_type=p) for made, _ in pairs)
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0.0)  # float32 sums of each part
    assert_same("clipped", *pairs[0], *pairs[1])


def loss_of(made: nn.Module, step: int) -> list[nn.Parameter]:
    """Its parameters, with gradients."""
    made.zero_grad()
    loss(made, step).backward()
    return list(made.parameters())


def released() -> None:
    got, want = sharded(), model()
    for settings in ({}, {"max_norm": 0.01}, {"max_norm": 0.01, "clip": "exact"}):
        pairs = [(made, optimizer(made)) for made in (got, want)]
        each = [collage.release_gradients(*pair, **settings) for pair in pairs]
        for step in range(STEPS):
            for (made, opt), release in zip(pairs, each, strict=True):
                for _ in release.passes():
                    loss(made, step).backward()
                opt.step()
                assert all(p.grad is None for p in made.parameters())
        assert_same(f"released {settings}", *pairs[0], *pairs[1])
        for release in each:
            release.remove()
    for make in (optimizer, muon):  # which gathers its matrices, one after another
        pairs = [(made, make(made)) for made in (got, want)]
        release = collage.release_gradients(*pairs[0])
        for step in range(STEPS):
            for made, opt in pairs:
                loss(made, step).backward()
                opt.step()
                opt.zero_grad()
        assert_same(f"{make.__name__}, released, and not", *pairs[0], *pairs[1])
        release.remove()


def in_ddp(**settings) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model(), **settings)


def released_in_ddp() -> None:
    for view in (False, True):
        got, want = in_ddp(gradient_as_bucket_view=view), in_ddp()
        pairs = [(made, optimizer(made)) for made in (got, want)]
        collage.release_gradients(*pairs[0])
        for step in range(STEPS):
            for made, opt in pairs:
                with made.no_sync():
                    loss(made, step + dist.get_rank()).backward()
                loss(made, step + 10 * dist.get_rank(), micro=1).backward()
                opt.step()
                opt.zero_grad()
        assert_same("released in DDP", *pairs[0], *pairs[1])
        assert_replicas_agree(got)


def assert_replicas_agree(made: nn.Module) -> None:
    for p in made.parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert_same_bits("replica", p.detach(), first)


def accumulated() -> None:
    """DDP: the mean over ranks of float32 sums, of all micro-batches of all ranks. FSDP2: the shards' sums."""
    for made in (in_ddp(), sharded()):
        accumulator, ranks = collage.GradientAccumulator(made), range(dist.get_world_size())
        opt, rank = optimizer(made), dist.get_rank()
        for step in range(STEPS):
            for micro in range(4):
                with accumulator:
                    loss(made, step, micro + 4 * rank).backward()
            accumulator.finish()
            if step == 0 and isinstance(made, nn.parallel.DistributedDataParallel):
                sums = [torch.zeros(p.shape, dtype=torch.float64) for p in made.parameters()]
                for micro in (micro + 4 * k for micro in range(4) for k in ranks):
                    for total, p in zip(sums, loss_of_copy(made, micro), strict=True):
                        total += p.grad.double() / len(ranks)
                for total, p in zip(sums, made.parameters(), strict=True):
                    assert p.grad.dtype == torch.float32
                    torch.testing.assert_close(p.grad.double(), total, rtol=0.0, atol=float(total.abs().max()) * 2**-21)
            opt.step()
            opt.zero_grad()
        if isinstance(made, nn.parallel.DistributedDataParallel):
            assert_replicas_agree(made)
        accumulator.remove()


def loss_of_copy(made: nn.Module, micro: int) -> list[nn.Parameter]:
    alone = model()
    alone.load_state_dict(made.module.state_dict())
    loss(alone, 0, micro).backward()
    return list(alone.parameters())


def skipped() -> None:
    """What one rank sees, all skip, and all say whose gradient it was."""
    for made in (sharded(), in_ddp()):
        opt = optimizer(made, skip_nonfinite=True)
        monitor = collage.monitor(opt, every=1)
        for step in range(3):
            loss(made, step).backward()
            param = dict(made.named_parameters())[next(n for n, _ in made.named_parameters() if "0.weight" in n)]
            part = param.grad.to_local() if hasattr(param.grad, "to_local") else param.grad
            if step == 1 and (dist.get_rank() == 1 or part is param.grad):
                part[0, 0] = torch.inf
            before = [whole(p.detach()).clone() for p in made.parameters()]
            opt.step()
            opt.zero_grad()
            changed = any(not torch.equal(whole(p.detach()), q) for p, q in zip(made.parameters(), before, strict=True))
            assert changed == (step != 1)
        assert opt.skipped_steps == 1
        names = [name for name, quality in monitor.report().by_parameter.items() if quality.skipped]
        assert [name.endswith("0.weight") for name in names] == [True]


def skipped_exactly() -> None:
    """A gradient of one rank's own, that is not finite there alone: all skip, and none waits."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    made = model()
    fully_shard(made, mesh=MESHES.setdefault(1, init_device_mesh("cpu", (dist.get_world_size(),))),
                ignored_params=set(made[3].parameters()))  # fmt: skip
    opt = optimizer(made, skip_nonfinite=True)
    released = collage.release_gradients(made, opt, clip="exact")
    for _ in released.passes():
        bad = float("inf") if dist.get_rank() == 1 else 1.0
        (loss(made, 0) + bad * made[3].bias.float().sum()).backward()
    opt.step()
    assert opt.skipped_steps == 1
    assert not any(opt.state.values())
    released.remove()


def refused() -> None:
    """What one rank cannot do, no rank does, and none waits for it."""
    made = in_ddp()
    opt = optimizer(made, skip_nonfinite=True)
    loss(made, 0).backward()
    if dist.get_rank() == 1:
        opt.param_groups[0]["lr"] = -1.0
    before = [p.detach().clone() for p in made.parameters()]
    with pytest.raises((ValueError, RuntimeError), match=r"lr: needs|another rank cannot make this step"):
        opt.step()
    assert all(map(torch.equal, made.parameters(), before))
    assert not any(opt.state.values())


def within_ddp() -> None:
    """A model that DDP averages, given without it, is refused before ranks go apart."""
    made = in_ddp()
    opt = optimizer(made)
    released = collage.release_gradients(made.module, opt)
    with patch("collage.gradients.together.BYTES", 0):  # as for large weights
        loss(made, 0).backward()
    with pytest.raises(RuntimeError, match="Is it in DistributedDataParallel"):
        opt.step()
    released.remove()
    made = in_ddp()
    accumulator = collage.GradientAccumulator(made.module)
    with accumulator, patch("collage.gradients.together.BYTES", 0):
        loss(made, 0).backward()
    with pytest.raises(RuntimeError, match="is the model in DistributedDataParallel"):
        accumulator.finish()


def rank() -> None:
    for check in (clipped, released, released_in_ddp, accumulated, skipped, skipped_exactly, refused, within_ddp):
        check()


def test_gradients_on_two_ranks():
    launch(__file__, 2)


@pytest.mark.slow
def test_gradients_on_four_ranks():
    launch(__file__, 4)


if __name__ == "__main__":
    as_rank(rank)
