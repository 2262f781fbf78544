"""Large parameters of elementwise optimizers are taken in pieces: the bits are those of a parameter taken whole."""

import pytest
import torch
from helpers import BARE, assert_same_bits
from torch import nn

import collage
from collage.optimizers.wrapping import stepping
from collage.optimizers.wrapping.pieces import ELEMENTWISE
from collage.strategies import STRATEGIES

SHAPES = [(130, 96), (5, 1000), (7001,), (3, 40, 40), (6,), ()]
FLOAT32 = [name for name, strategy in BARE.items() if strategy.register == torch.float32]
SETTINGS = {
    torch.optim.Adagrad: {"initial_accumulator_value": 0.1},
    torch.optim.Adam: {"amsgrad": True, "weight_decay": 0.1},
    torch.optim.RMSprop: {"centered": True, "momentum": 0.9},
    torch.optim.SGD: {"momentum": 0.9, "nesterov": True},
}


def trained(kind, strategy, bucket_mb, monitored, steps=4, **settings):
    """A few steps: the optimizer, its parameters and, if it is monitored, the report."""
    g = torch.Generator().manual_seed(0)
    dtype = STRATEGIES[strategy].dtype
    params = [nn.Parameter((0.1 * torch.randn(shape, generator=g)).to(dtype)) for shape in SHAPES]
    named = [(f"p{k}", param) for k, param in enumerate(params)]
    opt = collage.wrap(kind, named, strategy=strategy, bucket_mb=bucket_mb, **(SETTINGS.get(kind, {}) | settings))
    mon = collage.monitor(opt, every=1, shadow=None) if monitored else None
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=g).to(dtype)
        opt.step()
    return opt, params, mon.report().to_dict() if mon else None


def assert_same_run(one, other):
    (a, ours, reported), (b, theirs, wanted) = one, other
    for name, x, y in zip(map(str, SHAPES), ours, theirs, strict=True):
        assert_same_bits(name, x.detach(), y.detach())
    for own, his in zip(a.state_dict()["state"].values(), b.state_dict()["state"].values(), strict=True):
        assert own.keys() == his.keys()
        for key, value in own.items():
            if isinstance(value, torch.Tensor):
                assert_same_bits(key, value, his[key])
            else:
                assert value == his[key]
    assert reported == wanted


@pytest.mark.parametrize("strategy", FLOAT32)
@pytest.mark.parametrize("monitored", [False, True])
def test_every_strategy(strategy, monitored):
    small = 5000 * 24 / 2**20  # MiB: 5,000 weights of AdamW
    pieces = trained(torch.optim.AdamW, strategy, small, monitored)
    whole = trained(torch.optim.AdamW, strategy, 1e3, monitored)
    assert_same_run(pieces, whole)


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("how", [{}, {"foreach": True}], ids=["loop", "foreach"])
def test_every_elementwise_optimizer_of_torch(kind, how, monkeypatch):
    cut = []
    monkeypatch.setattr(stepping, "cut", lambda *args: cut.append(parts := list(kept(*args))) or parts)
    pieces = trained(kind, "collage-plus-sr", 1e-3, False, **how)
    assert max(map(len, cut)) > 8, "nothing was cut, so nothing is tested"
    assert_same_run(pieces, trained(kind, "collage-plus-sr", 1e3, False, **how))


kept = stepping.cut


def test_others_are_never_cut(monkeypatch):
    monkeypatch.setattr(stepping, "cut", lambda *_: pytest.fail("cut"))
    trained(torch.optim.Adafactor, "collage-plus", 1e-3, False)

    class Mine(torch.optim.AdamW):
        """What a subclass does is not known."""

    trained(Mine, "collage-plus", 1e-3, False)


def test_an_edit_between_steps_is_seen_and_nothing_else_is(caplog):
    opt, params, _ = trained(torch.optim.AdamW, "collage-plus", 1e-3, False)
    params[0].grad = torch.ones_like(params[0])
    with caplog.at_level("INFO", "collage"):
        opt.step()
        assert not caplog.records
        with torch.no_grad():
            params[0][0].zero_()  # which no low component fits beside
        opt.step()
    assert "changed outside the optimizer: 'p0' (" in caplog.text
