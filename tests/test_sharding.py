"""FSDP2 on two processes: shards step with the bits of the whole, stochastic ones too."""

import sys

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits
from ranks import as_rank, launch
from reports import assert_same_report
from torch import nn

import collage
from collage.formats import format_of
from collage.monitor.quality import Report
from collage.sharding import as_bytes, from_bytes

STEPS = 5


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(160, 33), nn.ReLU(), nn.Linear(33, 7))
    for p in made.parameters():
        p.data = p.data.bfloat16()
    return made


def train(made: nn.Module, backend: str, strategy: str) -> tuple[collage.AdamW, Report]:
    """Every rank sees the same batches, so that gradients averaged over ranks are those of one."""
    opt = collage.AdamW(made.named_parameters(), lr=1e-2, weight_decay=0.1, strategy=strategy, backend=backend)
    monitor = collage.monitor(opt, every=1, shadow=16)
    for step in range(STEPS):
        x = torch.randn(8, 160, generator=torch.Generator().manual_seed(step)).bfloat16()
        made(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        if step == 2:  # an edit that the DTensor counts, and its local part does not
            with torch.no_grad():
                made[0].weight.mul_(2.0**-10)
    report = monitor.report()
    if format_of(opt.strategy_of(next(opt.parameters())).param).shows_edits:
        assert report.by_parameter["0.weight"].edited > 0, "the edit was not seen"
    return opt, report


def whole(tensor: torch.Tensor) -> torch.Tensor:
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return from_bytes(as_bytes(tensor).full_tensor()) if tensor.dtype == torch.int16 else tensor.full_tensor()


def numbers(made: nn.Module, opt: collage.AdamW) -> dict[str, torch.Tensor]:
    """Weights and states, unsharded."""
    found = {}
    for name, p in made.named_parameters():
        found[name] = whole(p.detach())
        found |= {f"{name} {key}": whole(value) for key, value in opt.state[p].items()}
    return found


def rank(strategy: str) -> None:
    """One process: train sharded; compare with the same run unsharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for backend in ("auto", "reference"):
        sharded, alone = model(), model()
        for module in (sharded[0], sharded[2], sharded):
            fully_shard(module, mesh=mesh)
        opt, report = train(sharded, backend, strategy)
        one, of_one = train(alone, backend, strategy)
        got, want = numbers(sharded, opt), numbers(alone, one)
        assert got.keys() == want.keys()
        assert_same_report(backend, report, of_one)
        for name, tensor in want.items():
            assert_same_bits(f"{backend}: {name}", got[name], tensor)


@pytest.mark.parametrize("strategy", ["collage-plus", "collage-plus-sr", "collage-exact-lean", "collage-8bit"])
def test_fsdp2_has_the_bits_of_one_process(strategy):
    launch(__file__, 2, strategy)


if __name__ == "__main__":
    as_rank(rank, sys.argv[1])
