"""How wrapped optimizers round: what a step stores is what its base made in float32, encoded."""

import copy

import pytest
import torch
from helpers import assert_same_bits, encoded
from torch import nn
from wrapped import BASES, EVERY, FEW, ONE, assert_same_run, give, go_on, groups_of, weights

import collage
from collage.backends import Noise, reference
from collage.formats import format_of
from collage.layout import zeros
from collage.rng import key_of

SHAPES = ((40, 160), (33, 20), (20,), (4, 3, 2))
STOCHASTIC = ["stochastic", "collage-plus-sr", "collage-8bit", "collage-exact-lean"]


def value(format, *planes):
    return format_of(format).value(planes)


@pytest.mark.parametrize("strategy", ["bf16", "collage-plus", "collage-plus-sr", "collage-8bit", "collage-exact"])
@pytest.mark.parametrize("name", ["AdamW", "ScheduleFree AdamW"])
def test_planes_after_a_step_are_the_bases_numbers_encoded(name, strategy):
    """Of one parameter, by the reference: decoded, stepped in float32, encoded with the bits of its place."""
    base, (p,) = BASES[name], weights(((40, 160),))
    opt = collage.wrap(base.kind, [("w", p)], **base.settings, strategy=strategy, seed=5)
    go_on([p], opt, 0, 2, scheduled=False)
    kind = opt.strategy_of(next(opt.parameters()))
    formats = {"param": kind.param, **{k: opt.formats_of(next(opt.parameters())).of(k) for k in KEPT[name]}}
    states = {"param": opt.state[p], **dict.fromkeys(KEPT[name], opt.base.state[p])}

    def planes(key):
        mine = {**states[key], "param": p.detach()}
        return [mine[key + plane.suffix].clone() for plane in format_of(formats[key]).planes]

    own = nn.Parameter(value(formats["param"], *planes("param")).clone())
    alone = base.kind([own], **base.settings)
    for group, ours in zip(alone.param_groups, opt.param_groups, strict=True):
        group.update({k: copy.deepcopy(ours[k]) for k in group if k != "params"})
    alone.state[own] = {**opt.base.state[p], **{k: value(formats[k], *planes(k)).clone() for k in KEPT[name]}}
    alone.state[own] = {k: copy.deepcopy(x) for k, x in alone.state[own].items() if not k.endswith(("_lo", "_scale"))}
    give([p], 2)
    own.grad = p.grad.float()
    opt.step()
    alone.step()
    for key, format in formats.items():
        number = own.detach() if key == "param" else alone.state[own][key]
        wanted = zeros(format_of(format), number)
        reference.encode(format, [number], [wanted], Noise(key, 5, [3], [key_of("w")]))
        for got, want in zip(planes(key), wanted, strict=True):
            assert_same_bits(f"{key} in {format}", got, want)


KEPT = {"AdamW": ["exp_avg", "exp_avg_sq"], "ScheduleFree AdamW": ["z", "exp_avg_sq"]}


@pytest.mark.parametrize("strategy", STOCHASTIC)
@pytest.mark.parametrize("name", ["AdamW", "ScheduleFree AdamW"])
def test_random_bits_do_not_depend_on_buckets(name, strategy):
    runs = []
    for bucket in (ONE, FEW, EVERY):
        base, params = BASES[name], weights(SHAPES)
        opt = collage.wrap(
            base.kind, groups_of(params, base), **base.settings, strategy=strategy, bucket_mb=bucket, backend="auto"
        )
        go_on(params, opt, 0, 6, scheduled=False)
        runs.append(opt)
    assert_same_run(runs[1], runs[0])
    assert_same_run(runs[2], runs[0])


def test_the_backends_make_the_same_bits():
    runs = []
    for backend in ("reference", "auto"):
        base, params = BASES["AdamW"], weights(SHAPES)
        opt = collage.wrap(
            base.kind, groups_of(params, base), **base.settings, strategy="collage-plus-sr", backend=backend
        )
        go_on(params, opt, 0, 4, scheduled=False)
        runs.append(opt)
    assert_same_run(*runs)


def test_seeds_and_steps_draw_other_bits():
    ends = []
    for seed in (0, 1):
        (p,) = weights(((40, 160),))
        opt = collage.wrap(torch.optim.SGD, [p], lr=1e-3, strategy="stochastic", seed=seed)
        give([p], 0)
        opt.step()
        ends.append(p.detach().clone())
    assert (ends[0] != ends[1]).float().mean() > 0.1


def test_stochastic_rounding_is_unbiased_and_states_and_weights_draw_apart():
    """Each of n weights moves by a hundredth of its ulp a step: so many of them go up, within four sigma."""
    n, steps = 20_000, 20
    p = nn.Parameter(torch.ones(n).bfloat16())
    ulp = 2.0**-7
    opt = collage.wrap(
        torch.optim.SGD, [("w", p)], lr=1.0, momentum=0.5, strategy="param=bf16:sr,momentum=bf16:sr,variance=bf16"
    )
    for step in range(steps):
        p.grad = torch.full((n,), -ulp / 100 if step == 0 else 0.0).bfloat16()
        opt.step()
    grad = float(torch.tensor(ulp / 100).bfloat16())
    wanted = 1 + grad * sum(0.5**k for k in range(steps))
    sigma = ulp * (0.02 * 0.98 / n) ** 0.5
    assert p.detach().double().mean().item() == pytest.approx(wanted, abs=4 * sigma)
    params = [nn.Parameter(torch.ones(n).bfloat16())]
    opt = collage.wrap(
        torch.optim.SGD, [("w", params[0])], lr=1.0, momentum=0.9,
        strategy="param=bf16:sr,momentum=bf16:sr,variance=bf16",
    )  # fmt: skip
    params[0].grad_dtype = torch.float32
    params[0].grad = torch.full((n,), -(1 + 2.0**-8) * 2.0**-8)  # both numbers lie half way between two of bfloat16
    opt.step()
    up = (params[0].detach() > params[0].detach().min()).double()
    moment = (opt.base.state[params[0]]["momentum_buffer"].abs() > 2.0**-8).double()
    both = torch.corrcoef(torch.stack([up, moment]))[0, 1].abs().item()
    assert 0.4 < up.mean() < 0.6
    assert 0.4 < moment.mean() < 0.6
    assert both < 4 / n**0.5


@pytest.mark.parametrize("strategy", ["collage-plus-sr", "collage-plus"])
def test_its_floor_is_float32s(strategy):
    """An update below half an ulp of the float32 number is gone before it is encoded, stochastic or not."""
    p = nn.Parameter(torch.ones(1000).bfloat16())
    opt = collage.wrap(torch.optim.SGD, [("w", p)], lr=1.0, strategy=strategy)
    for _ in range(50):
        p.grad = torch.full((1000,), 2.0**-26).bfloat16()
        opt.step()
    assert_same_bits("weight", p.detach(), torch.ones(1000).bfloat16())
    assert not opt.state[p]["param_lo"].any()
    assert encoded("bf16x2", torch.ones(2))[1].eq(0).all()


def test_states_take_the_formats_that_are_given():
    """Small parameters their twins; a state with blocks is stored as its own format stores it."""
    params = weights(SHAPES)
    opt = collage.wrap(
        torch.optim.Rprop, params, strategy="collage-plus", states={"prev": "int8/128", "step_size": "bf16"}
    )
    go_on(params, opt, 0, 2, scheduled=False)
    large, small = (opt.base.state[params[k]] for k in (0, 2))
    assert {k: x.dtype for k, x in large.items() if k != "step"} == {
        "prev": torch.int8, "prev_scale": torch.uint8, "step_size": torch.bfloat16}  # fmt: skip
    assert {k: x.dtype for k, x in small.items() if k != "step"} == {
        "prev": torch.bfloat16, "step_size": torch.bfloat16}  # fmt: skip
