"""Gradients that are not placed like their parameter: brought to it, whatever the two placements are."""

import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits
from ranks import as_rank, launch
from torch import nn

import collage

SHAPE = (10, 6)  # uneven rows on three ranks


def gradient(step: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)).bfloat16()


def given(step: int, placement: str, mesh):
    """The gradient as a DTensor. Partial: three unequal terms, which add up exactly."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    g = gradient(step)
    if placement == "partial":
        return DTensor.from_local(g if dist.get_rank() == 1 else torch.zeros_like(g), mesh, [Partial()])
    if placement == "replicate":
        return DTensor.from_local(g, mesh, [Replicate()])
    return g if placement == "plain" else distribute_tensor(g, mesh, [Shard(int(placement))])


def trained(strategy: str, backend: str, param: nn.Parameter, grads) -> list[torch.Tensor]:
    opt = collage.AdamW([("w", param)], lr=0.1, strategy=strategy, backend=backend)
    for g in grads:
        param.grad = g
        opt.step()
    planes = [param.detach(), *(value for key, value in opt.state[param].items() if key != "step")]
    return [plane.full_tensor() if hasattr(plane, "full_tensor") else plane for plane in planes]


def rank(strategy: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    start = gradient(99)
    for backend in ("auto", "reference"):
        want = trained(strategy, backend, nn.Parameter(start.clone()), [gradient(step) for step in range(3)])
        for place, how in itertools.product((Replicate(), Shard(0), Shard(1)), ("partial", "replicate", "0", "1")):
            param = nn.Parameter(distribute_tensor(start.clone(), mesh, [place]))
            got = trained(strategy, backend, param, [given(step, how, mesh) for step in range(3)])
            for k, (mine, theirs) in enumerate(zip(got, want, strict=True)):
                assert_same_bits(f"{backend} {place} {how} {k}", mine, theirs)
    refused(mesh, start)


def refused(mesh, start: torch.Tensor) -> None:
    """A state that is not placed like its parameter is no address to hand on."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    param = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    opt = collage.AdamW([("w", param)], lr=0.1)
    param.grad = given(0, "0", mesh)
    opt.step()
    good = opt.state[param]["exp_avg"]
    before = param.full_tensor().clone()
    for wrong in (good.redistribute(mesh, [Replicate()]), good.redistribute(mesh, [Shard(1)]), good.full_tensor()):
        opt.state[param]["exp_avg"] = wrong
        with pytest.raises(ValueError, match=r"param 'w': it and its optimizer state need memory .* placed alike"):
            opt.step()
        assert_same_bits("w", param.full_tensor(), before)
        opt.load_state_dict(opt.state_dict())  # places it like its parameter, as the message says
        assert_same_bits("exp_avg", opt.state[param]["exp_avg"].to_local(), good.to_local())
    opt.step()


@pytest.mark.parametrize("strategy", ["collage-plus-sr", "fp32-master"])
def test_every_placement_of_a_gradient_gives_the_bits_of_one_process(strategy):
    launch(__file__, 3, strategy)


if __name__ == "__main__":
    as_rank(rank, sys.argv[1])
