"""torch.amp.GradScaler: gradients divided by its scale in float32, and steps that are skipped and not counted."""

import copy

import pytest
import torch
from helpers import BARE, assert_same_bits, assert_same_planes, planes_of, refused
from test_rules import KINDS, make
from torch import Tensor, nn

import collage

every_strategy = pytest.mark.parametrize("strategy", BARE)


def scaler_of(scale: float) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))  # it has no scale before it has scaled a loss
    return scaler


def gradients(params: list[nn.Parameter], k: int, scale: float = 1.0) -> list[Tensor]:
    """In the parameters' dtype, none of them beyond float16's largest number."""
    g = torch.Generator().manual_seed(k)
    return [(torch.randn(p.shape, generator=g) * 0.1 * scale).to(p.dtype) for p in params]


def give(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = None
        p.grad_dtype = g.dtype
        p.grad = g


@every_strategy
@pytest.mark.parametrize("scale", [2.0**16, 49_999.0])
def test_a_scaled_step_is_the_step_of_gradients_divided_in_float32(strategy, scale):
    ends = []
    for scaled in (True, False):
        params, opt = make("adamw", strategy)
        scaler = scaler_of(scale)
        for k in range(4):
            grads = gradients(params, k, scale)
            if scaled:
                give(params, grads)
                scaler.step(opt)
                scaler.update()
            else:
                give(params, [g.float() / torch.tensor(scale) for g in grads])
                opt.step()
        assert scaler.get_scale() == scale
        assert not hasattr(opt, "grad_scale")
        ends.append(planes_of(opt))
    assert_same_planes(*ends)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_takes_a_scale(kind):
    """A power of two, that changes no bit of a bfloat16 gradient."""
    ends = []
    for scaled in (True, False):
        params, opt = make(kind)
        scaler = scaler_of(2.0**16)
        for k in range(3):
            give(params, gradients(params, k, 2.0**16 if scaled else 1.0))
            if scaled:
                scaler.step(opt)
                scaler.update()
            else:
                opt.step()
        ends.append(planes_of(opt))
    assert_same_planes(*ends)


@every_strategy
@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_whose_gradients_are_not_all_finite_changes_and_counts_nothing(strategy, broken, first):
    """Nor makes a state, if it is the first; what follows is what would have followed without it."""
    ends, reports = [], []
    for skipping in (True, False):
        params, opt = make("adamw", strategy)
        mon = collage.monitor(opt, every=1, shadow=1)
        scaler = scaler_of(2.0**10)
        for k in range(3):
            scale = scaler.get_scale() if skipping else 2.0**10
            if skipping and k == (0 if first else 1):
                grads = gradients(params, 100)
                grads[1][7] = broken
                give(params, grads)
                before, seen = copy.deepcopy(planes_of(opt)), mon.report()
                scaler.step(opt)
                assert_same_planes(planes_of(opt), before)
                assert mon.report() == seen
                scaler.update()
                assert scaler.get_scale() == scale / 2
                scaler.update(scale)
            give(params, gradients(params, k, 2.0**10))
            scaler.step(opt)
            scaler.update()
        ends.append(planes_of(opt))
        reports.append(mon.report())
    assert_same_planes(*ends)
    assert reports[0] == reports[1]
    assert reports[0].total.steps == 3
    assert {int(value) for key, value in ends[0].items() if key.endswith(".step")} == {3}


def test_a_monitor_sees_the_gradients_unscaled():
    reports = []
    for scale in (1.0, 2.0**16):
        params, opt = make("adamw")
        mon = collage.monitor(opt, every=1, shadow=1, strategies=["bf16"])
        scaler = scaler_of(scale)
        for k in range(3):
            give(params, gradients(params, k, scale))
            scaler.step(opt)
            scaler.update()
        reports.append(mon.report())
    assert reports[0] == reports[1]
    assert reports[0].total.v_ratio == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("strategy", ["collage-plus", "fp32", "fp32-master", "collage-fp16"])
def test_gradients_unscaled_before_the_step_and_clipped_are_not_unscaled_again(strategy):
    """torch unscales no float16 gradient: there a float32 one (param.grad_dtype)."""
    ends, scale = [], 2.0**12
    for scaled in (True, False):
        params, opt = make("adamw", strategy)
        scaler = scaler_of(scale)
        for k in range(3):
            grads = gradients(params, k, scale if scaled else 1.0)
            give(params, [g.float() for g in grads] if strategy == "collage-fp16" else grads)
            if scaled:
                scaler.unscale_(opt)
            norm = nn.utils.clip_grad_norm_(params, 0.5)
            assert norm > 1
            if scaled:
                scaler.step(opt)
                scaler.update()
            else:
                opt.step()
        ends.append(planes_of(opt))
    assert_same_planes(*ends)


def test_a_broken_gradient_is_found_by_unscale_too():
    params, opt = make("adamw")
    scaler = scaler_of(4.0)
    give(params, gradients(params, 0))
    scaler.step(opt)
    scaler.update()
    grads = gradients(params, 1)
    grads[0][0, 0] = torch.inf
    give(params, grads)
    before = copy.deepcopy(planes_of(opt))
    scaler.unscale_(opt)
    scaler.step(opt)
    assert_same_planes(planes_of(opt), before)


def test_float16_gradients_are_divided_after_they_are_float32():
    """Below float16's smallest number once divided: the moments still see them."""
    p = nn.Parameter(torch.ones(4).half())
    opt = collage.AdamW([("p", p)], strategy="collage-fp16", weight_decay=0.0)
    scaler = scaler_of(2.0**16)
    p.grad = torch.full((4,), 2.0**-12).half()  # 2**-28
    scaler.step(opt)
    assert_same_bits("exp_avg", opt.state[p]["exp_avg"], torch.full((4,), 0.1 * 2.0**-28).bfloat16())
    assert opt.state[p]["exp_avg_sq"].gt(0).all()
    assert opt.theta(next(opt.parameters()))[1].ne(0).all()


@pytest.mark.filterwarnings("ignore:.*no parameter has a gradient")  # said once
@pytest.mark.parametrize("strategy", ["collage-plus", "collage-fp16"])
def test_a_step_without_any_gradient_is_none(strategy):
    opt = make("adamw", strategy)[1]
    scaler = scaler_of(2.0**16)
    scaler.step(opt)
    assert not any(opt.state.values())


def test_a_disabled_scaler_steps():
    params, opt = make("adamw")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    give(params, gradients(params, 0))
    scaler.step(opt)
    scaler.update()
    assert int(opt.state[params[0]]["step"]) == 1


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("first", [True, False])
def test_a_compiled_step_refuses_a_scale(first):
    """It would take the scaled gradients for the true ones."""
    torch._dynamo.reset()
    params, opt = make("adamw")
    step = torch.compile(opt.step)
    for k in range(1 if first else 3):
        give(params, gradients(params, k))
        (opt.step if first else step)()
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with refused(opt, RuntimeError, "GradScaler: a compiled step"):
        step()
    del opt.grad_scale, opt.found_inf
    step()
