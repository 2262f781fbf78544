"""Weights that others change between steps: what no longer fits is taken as it is now, the rest goes on."""

import copy
import logging

import pytest
import torch
from helpers import BARE, assert_same_bits
from torch import nn

import collage
from collage.formats import fitted, format_of
from collage.strategies import STRATEGIES

PLANES = [name for name, s in BARE.items() if len(format_of(s.param).planes) > 1]


def setup(strategy, n=300, lr=1e-3, steps=3, **settings):
    dtype = STRATEGIES[strategy].dtype
    torch.manual_seed(0)
    params = {"w": nn.Parameter(torch.randn(n).to(dtype)), "norm": nn.Parameter(torch.ones(50, dtype=dtype))}
    opt = collage.AdamW(params.items(), lr=lr, strategy=strategy, **settings)
    for step in range(steps):
        give(params, step)
        opt.step()
    return params, opt


def give(params, step):
    g = torch.Generator().manual_seed(step)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def theta(p, opt):
    extra = [opt.state[p][key] for key in ("param_lo", "param_master", "param_kahan") if key in opt.state[p]]
    return [p.detach(), *extra]


def load_into(p, x):
    nn.ParameterDict({"w": p}).load_state_dict({"w": x})


def exchange(p, x):
    p.data = x.clone()


EDITS = {
    "fill_": lambda p: p.fill_(0.0),
    "clamp_": lambda p: p.clamp_(-0.01, 0.01),
    "mul_": lambda p: p.mul_(2.0**-10),
    "a few": lambda p: p[::7].mul_(2.0**-10),
    "copy_": lambda p: p.copy_(p * 2.0**-10),
    "load_state_dict": lambda p: load_into(p, p.detach() * 2.0**-10),
    "another address": lambda p: exchange(p, p.detach() * 2.0**-10),
    "nothing": lambda p: p.mul_(1.0),
    "Inf": lambda p: p[3].fill_(torch.inf),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("strategy", PLANES)
@pytest.mark.filterwarnings("ignore:changed outside the optimizer")
def test_a_step_after_an_edit_is_the_step_from_the_weights_that_fit(strategy, backend, edit):
    """Exactly the elements that no longer fit are derived anew: as if `fitted` had been written back by hand."""
    params, opt = setup(strategy, backend=backend)
    with torch.no_grad():
        EDITS[edit](params["w"])
    mine, theirs = (params, opt), copy.deepcopy((params, opt))
    want, broken = fitted(format_of(STRATEGIES[strategy].param), theta(theirs[0]["w"], theirs[1]))
    for plane, value in zip(theta(theirs[0]["w"], theirs[1])[1:], want[1:], strict=True):
        plane.copy_(value)
    if format_of(STRATEGIES[strategy].param).shows_edits:
        assert bool(broken.any()) == (edit != "nothing")
    for params, opt in (mine, theirs):
        give(params, 7)
        opt.step()
    for name in params:
        for k, (a, b) in enumerate(zip(theta(mine[0][name], mine[1]), theta(params[name], opt), strict=True)):
            assert_same_bits(f"{name} {k}", a, b)


@pytest.mark.parametrize("strategy", ["collage-plus", "fp32-master", "kahan"])
def test_clamping_at_every_step_costs_nothing(strategy):
    """2,000 steps of 1e-5 reach the weight although it is clamped, far away, after every one of them."""

    def trained(clamped):
        w = nn.Parameter(torch.ones(8).bfloat16())
        opt = collage.AdamW([("w", w)], lr=1e-5, weight_decay=0.0, strategy=strategy)
        for _ in range(2000):
            w.grad = torch.ones_like(w)
            opt.step()
            if clamped:
                with torch.no_grad():
                    w.clamp_(-2.0, 2.0)
        return theta(w, opt)

    for k, (a, b) in enumerate(zip(trained(True), trained(False), strict=True)):
        assert_same_bits(f"plane {k}", a, b)
    assert (trained(True)[0] < 0.99).all()


def test_weights_filled_after_steps_stay_so_under_a_master():
    """The old weights would come back out of it: 0.9 instead of 5.0."""
    params, opt = setup("fp32-master", steps=100)
    with torch.no_grad():
        params["w"].fill_(5.0)
    with pytest.warns(RuntimeWarning, match=r"'w' \(300 of 300 weights\).*another model loaded"):
        opt.step()
    assert (params["w"].detach().float() - 5.0).abs().max() < 0.05


def test_it_is_said_once_per_parameter_and_loudly_only_where_most_changed(caplog):
    params, opt = setup("fp32-master")
    with caplog.at_level(logging.INFO, logger="collage"):
        for step in range(3):
            with torch.no_grad():
                params["w"][:10] = 9.0 + step
            opt.step()
        assert caplog.messages == ["changed outside the optimizer: 'w' (10 of 300 weights); taken as they are now"]
        with torch.no_grad():
            params["norm"].fill_(2.0)
        with pytest.warns(RuntimeWarning, match=r"'norm' \(50 of 50 weights\)"):
            opt.step()


@pytest.mark.parametrize("strategy", ["collage-exact", "collage-8bit"])
def test_under_a_remainder_an_edit_is_told_once_and_keeps_at_most_half_an_ulp_of_the_old(strategy, caplog):
    params, opt = setup(strategy, lr=1e-3)
    w, monitor = params["w"], collage.monitor(opt, every=1, shadow=1)
    with caplog.at_level(logging.INFO, logger="collage"):
        for step in range(3):
            with torch.no_grad():
                w.fill_(3.0 + step)
            full = collage.high_precision_state_dict(nn.ParameterDict(params), opt)["w"]
            assert (full - w.detach().float()).abs().max() <= 2.0**-6  # half an ulp of 4
            assert step or (full != w.detach().float()).any()
            give(params, step)
            opt.step()
    said = [text for text in caplog.messages if "remainder" in text]
    assert len(said) == 1
    assert "'w'; taken as they are now, but in 'bf16+int" in said[0]
    assert (w.detach().float() - 5.0).abs().max() <= 2.0**-5  # an ulp
    # The shadow has followed it: its update, the decay above all, is that of the new weights.
    assert monitor.report().by_parameter["w"].edq_shadow == pytest.approx(1.0, abs=0.02)
    opt.resync()
    assert (opt.state[w]["param_lo"] == 0).all()


def test_a_parameter_without_a_gradient_for_a_while_is_not_looked_at_again(monkeypatch):
    """Experts take turns: what is known of a parameter outlives the steps without it."""
    from collage.optimizers import edits

    params, opt = setup("collage-plus")
    looked = []
    monkeypatch.setattr(edits, "_misfits", lambda *_, looked_=looked: looked_.append(list(_[3])) or {})
    for step, absent in enumerate(["w", "norm", "w", "norm"]):
        give(params, step)
        params[absent].grad = None
        opt.step()
    assert looked == []
    with torch.no_grad():
        params["w"].mul_(1.0)
    give(params, 9)
    opt.step()
    assert looked == [[0]]


@pytest.mark.parametrize("strategy", ["collage-plus", "collage-plus-sr", "fp32-master", "stochastic"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_step_adds_one_to_the_version_of_a_weight(strategy, backend):
    params, opt = setup(strategy, n=100_000, backend=backend)
    before = params["w"]._version
    give(params, 3)
    opt.step()
    assert params["w"]._version == before + 1


def test_a_refused_step_hides_no_edit():
    """A step that was not made has added nothing to a version."""
    params, opt = setup("fp32-master")
    opt.backend = "cuda"
    give(params, 1)
    with pytest.raises(ValueError, match="unknown 'cuda'"):
        opt.step()
    opt.backend = "auto"
    with torch.no_grad():
        params["w"].fill_(5.0)
    with pytest.warns(RuntimeWarning, match="changed outside"):
        opt.step()
    assert (params["w"].detach().float() - 5.0).abs().max() < 0.05


def test_another_memory_at_the_same_address_is_another_memory():
    """Two exchanges of `.data` may be given the old address back by an allocator, and move no counter."""
    params, opt = setup("fp32-master")
    w, memory = params["w"], bytearray(600)
    exchange(w, w.detach())
    w.data = torch.frombuffer(memory, dtype=torch.bfloat16).copy_(w.detach())
    give(params, 1)
    opt.step()
    where, version = w.data_ptr(), w._version
    memory[:] = torch.full((300,), 5.0).bfloat16().view(torch.uint8).numpy().tobytes()
    w.data = torch.frombuffer(memory, dtype=torch.bfloat16)
    assert (w.data_ptr(), w._version) == (where, version)
    give(params, 2)
    with pytest.warns(RuntimeWarning, match=r"changed outside the optimizer: 'w' \(300 of 300"):
        opt.step()
    assert (w.detach().float() - 5.0).abs().max() < 0.05


def test_another_order_of_the_same_memory_is_an_edit():
    """Transposed in place: neither address nor version moves, and the low components are of other elements."""
    w = nn.Parameter(torch.tensor([[1.0, 1.001], [1e-6, 1.0]]))
    opt = collage.AdamW([("w", w)], lr=0.0, cast=True)
    w.grad = torch.ones_like(w)
    opt.step()
    w.data, w.grad = w.data.t(), None
    w.grad = torch.ones_like(w)
    before = w.detach().clone()
    opt.step()
    assert (w.detach()[0, 1] - before[0, 1]).abs() < 1e-8


def test_the_shadow_follows_an_edit():
    """Otherwise its decay would go on from the old weights, and edq_shadow with it."""
    params, opt = setup("fp32-master", lr=1e-3, weight_decay=0.5)
    mon = collage.monitor(opt, every=1, shadow=1)
    give(params, 0)
    opt.step()
    with torch.no_grad():
        params["w"].fill_(100.0)
    for step in range(3):
        give(params, step)
        if step == 0:
            with pytest.warns(RuntimeWarning, match="changed outside"):
                opt.step()
        else:
            opt.step()
    # From the old weights the decay, 0.05 a step, would be missing in the shadow's update: a ratio of about 6.
    assert mon.report().by_parameter["w"].edq_shadow == pytest.approx(1.0, abs=1e-3)


def test_resync_drops_what_it_says_and_a_monitor_counts_it():
    params, opt = setup("collage-plus", lr=1e-4)
    mon = collage.monitor(opt, every=1)
    nonzero = int((opt.state[params["w"]]["param_lo"] != 0).sum())
    assert nonzero > 100
    opt.resync()
    assert (opt.state[params["w"]]["param_lo"] == 0).all()
    assert mon.report().by_parameter["w"].edited == nonzero
