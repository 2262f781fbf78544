"""Optimizers as people write them: wrapped to the same bits, or refused where something would be lost."""

import pytest
import pytorch_optimizer
import torch
from helpers import assert_same_bits
from torch import nn

import collage


class Own(torch.optim.Optimizer):
    """A momentum, in `buffer`, that every kind below keeps somewhere else."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.buffer(p)
                    m.mul_(0.9).add_(p.grad)
                    self.move(p, -group["lr"] * m)

    def buffer(self, p):
        return self.state[p].setdefault("m", torch.zeros_like(p))

    def move(self, p, by):
        p.add_(by)


class Rebinding(Own):
    def move(self, p, by):
        p.data = p.data + by


class Early(Own):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["m"] = torch.full_like(p.data, 5.0)

    def buffer(self, p):
        return self.state[p]["m"]


class Aside(Own):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.side = {}

    def buffer(self, p):
        return self.side.setdefault(p, torch.zeros_like(p))


class Shared(Own):
    def buffer(self, p):
        self.state["k"] = self.state.get("k", 0) + 1
        return super().buffer(p).mul_(self.state["k"])


def weight(dtype=torch.bfloat16):
    return nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6).bfloat16().to(dtype))


@pytest.mark.parametrize("constructed", [False, True])
@pytest.mark.parametrize("kind", [Own, Rebinding, Early])
def test_these_have_their_own_bits(kind, constructed):
    ours, theirs = weight(), weight(torch.float32)
    alone = kind([theirs])
    opt = collage.wrap(
        kind([ours]) if constructed else kind, *(() if constructed else ([ours],)), strategy="fp32-master"
    )
    for k in range(5):
        ours.grad = torch.full_like(ours, 0.5**k)
        theirs.grad = ours.grad.float()
        opt.step()
        alone.step()
        assert_same_bits(f"step {k}", opt.state[ours]["param_master"], theirs.detach())


class Layerwise(Own):
    """Reads what only a group says, and its constructor's defaults do not."""

    def move(self, p, by):
        (group,) = (group for group in self.param_groups if any(p is own for own in group["params"]))
        p.add_(by * group.get("lr_scale", 1.0))


def test_a_setting_of_a_group_alone_is_seen():
    ours, theirs = weight(), weight(torch.float32)
    opt = collage.wrap(Layerwise, [{"params": [ours], "lr_scale": 0.5}], strategy="fp32-master")
    alone = Layerwise([{"params": [theirs], "lr_scale": 0.5}])
    ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(theirs)
    opt.step()
    alone.step()
    assert_same_bits("w", opt.state[ours]["param_master"], theirs.detach())


@pytest.mark.parametrize("kind", [Aside, Shared, pytorch_optimizer.MADGRAD])
def test_these_would_lose_something_and_are_refused(kind):
    alone, w = kind([weight()]), weight()
    for make in (lambda: collage.wrap(kind, [w]), lambda: collage.wrap(alone)):
        with pytest.raises((ValueError, TypeError), match=f"wrap: {kind.__name__} "):
            make()
    assert not getattr(alone, "side", None), "a trial leaves nothing behind"
    assert_same_bits("w", w.detach(), weight().detach())


def test_a_format_without_signs_is_refused_where_there_are_negative_numbers():
    with pytest.raises(ValueError, match=r"states\['exp_avg'\]: the optimizer makes negative numbers.*int8/128:sr"):
        collage.wrap(torch.optim.AdamW, [weight()], states={"exp_avg": "uint8/128"})
    collage.wrap(torch.optim.AdamW, [weight()], states={"exp_avg_sq": "uint8/128"})
