"""Real gradients: FSDP2 with its policies, tensor parallelism: the bits of one process that is given them."""

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits
from ranks import assert_same_as_alone, launch, perform, whole
from torch import nn

import collage

STRATEGIES = ("collage-plus", "collage-plus-sr", "collage-exact-lean")


def model(columns: int = 160, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(columns, 66), nn.ReLU(), nn.Linear(66, 7)).to(dtype)


def made_for(made: nn.Module, strategy: str, **settings) -> collage.AdamW:
    return collage.AdamW(made.named_parameters(), lr=1e-2, weight_decay=0.1, strategy=strategy, **settings)


def batch(step: int, rank: int = 0, columns: int = 160) -> torch.Tensor:
    return torch.randn(8, columns, generator=torch.Generator().manual_seed(100 * step + rank)).bfloat16()


def follow(label: str, ours: nn.Module, strategy: str, steps: int = 4, own_batch: bool = True) -> None:
    """Train, and give the gradients, gathered, to a model that is not sharded."""
    alone = model()
    opt, other = made_for(ours, strategy), made_for(alone, strategy)
    for step in range(steps):
        ours(batch(step, dist.get_rank() if own_batch else 0)).square().mean().backward()
        for p, q in zip(ours.parameters(), alone.parameters(), strict=True):
            q.grad = whole(p.grad).detach().clone()
        opt.step()
        other.step()
        opt.zero_grad()
    assert_same_as_alone(f"{label} {strategy}", ours, opt, alone, other)


def fsdp(mesh=None, **policies) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    made = model()
    for module in (made[0], made[2], made):
        fully_shard(module, mesh=mesh, **policies)
    return made


def policies() -> None:
    """Mixed precision in both directions, and sharded weights, gradients and states in the memory of the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    bf16, fp32 = torch.bfloat16, torch.float32
    for name, given in {
        "bf16, reduced in float32": {"mp_policy": MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=fp32)},
        "computed in float32": {"mp_policy": MixedPrecisionPolicy(fp32, fp32, output_dtype=fp32)},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }.items():
        for strategy in STRATEGIES:
            follow(name, fsdp(**given), strategy)


def tensor_parallel() -> None:
    """Column-wise, then row-wise; of FSDP2 units, too, on four ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    for strategy in STRATEGIES:
        made = parallelize_module(model(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if world > 2:
            fully_shard(made, mesh=mesh["dp"])
        follow("tensor parallel", made, strategy, own_batch=False)


def float32_gradients() -> None:
    """Of weights in bfloat16, as they come out of a reduction in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for strategy in STRATEGIES:
        p = nn.Parameter(distribute_tensor(batch(0), mesh, [Shard(0)]))
        q = nn.Parameter(batch(0))
        ours, alone = nn.ParameterDict({"w": p}), nn.ParameterDict({"w": q})
        opt, other = made_for(ours, strategy), made_for(alone, strategy)
        for step in range(3):
            grad = torch.randn(8, 160, generator=torch.Generator().manual_seed(step))
            for x, g in ((p, distribute_tensor(grad, mesh, [Shard(0)])), (q, grad)):
                x.grad_dtype = torch.float32
                x.grad = g
            opt.step()
            other.step()
        assert_same_as_alone(strategy, ours, opt, alone, other)


def mean_of_three() -> None:
    """All that three ranks differ in from one, on the same batch, is the mean: (g + g + g) / 3 is not g."""
    for dtype, strategy in ((torch.float32, "fp32"), (torch.bfloat16, "collage-plus")):
        from torch.distributed.fsdp import fully_shard

        ours, alone, naive = (model(dtype=dtype) for _ in range(3))
        for module in (ours[0], ours[2], ours):
            fully_shard(module)
        opts = [made_for(made, strategy) for made in (ours, alone, naive)]
        for step in range(4):
            x = batch(step).to(dtype)
            for made in (ours, alone, naive):
                made(x).square().mean().backward()
            for q in alone.parameters():
                q.grad = ((q.grad + q.grad) + q.grad).div_(3)
            for opt in opts:
                opt.step()
                opt.zero_grad()
        assert_same_as_alone(f"{dtype}", ours, opts[0], alone, opts[1])
        with pytest.raises(AssertionError, match="differ"):
            assert_same_as_alone(f"{dtype}", ours, opts[0], naive, opts[2])


def refused() -> None:
    """What is wrong with one rank's part alone is said there, and no other rank waits for it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    first, last = (nn.Parameter(distribute_tensor(batch(k), mesh, [Shard(0)])) for k in range(2))
    opt = collage.AdamW([{"params": [("first", first)]}, {"params": [("last", last)]}], lr=1e-2)
    before = first.full_tensor().clone(), last.full_tensor().clone()
    for p in (first, last):  # a partial one is reduced by all ranks
        p.grad = DTensor.from_local(batch(7), mesh, [Partial()])
    opt.step()
    opt.zero_grad()
    first.grad = distribute_tensor(batch(8), mesh, [Shard(0)])
    last.grad = DTensor.from_local(batch(9), mesh, [Partial()])
    after = first.full_tensor().clone(), last.full_tensor().clone()
    assert not torch.equal(before[0], after[0])
    if dist.get_rank() == 0:
        first.grad.to_local().untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"param 'first': its gradient .* 0 bytes of memory"):
            opt.step()
        assert_same_bits("last", last.to_local(), after[1].chunk(dist.get_world_size())[0])
    else:
        opt.step()


def each(*tasks: str) -> None:
    for task in tasks:
        globals()[task]()


@pytest.mark.parametrize(
    ("world", "tasks"),
    [
        (2, ["policies", "tensor_parallel", "float32_gradients", "refused"]),
        (3, ["mean_of_three"]),
        pytest.param(4, ["policies", "tensor_parallel", "float32_gradients", "refused"], marks=pytest.mark.slow),
    ],
)
def test_ranks_have_the_bits_of_one_process_given_their_gradients(world, tasks):
    launch(__file__, world, "each", *tasks)


if __name__ == "__main__":
    perform(globals())
