"""What training loops do to an optimizer, done to a wrapped one."""

import copy
import warnings

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from wrapped import BASES, assert_same_run, assert_same_values, give, go_on, groups_of, planes, weights

import collage
from collage import saying
from collage.optimizers.wrap import Wrapped
from collage.strategies import STRATEGIES


@pytest.fixture(autouse=True)
def _say_everything_again():
    saying.warn_once.cache_clear()


class Net(nn.Module):
    """Weights of many kinds: some large, one in float32, one tied, one that some steps do not use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9000, 64)  # more than a megabyte in bf16
        self.mix = nn.Linear(64, 64)
        self.rare = nn.Linear(64, 64, bias=False)
        collage.to_bf16(self)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens, rare=True):
        x = self.mix(self.embed(tokens))
        x = self.rare(x) if rare else x
        return (x @ self.embed.weight.T).float() * self.scale


def loss_of(model, step, micro=0):
    tokens = torch.randint(9000, (2, 8), generator=torch.Generator().manual_seed(100 * step + micro))
    return nn.functional.cross_entropy(model(tokens, rare=step != 1).flatten(0, 1), tokens.flatten())


def made(name="AdamW", strategy="collage-plus", **settings):
    model, base = Net(), BASES[name]
    named = list(model.named_parameters())
    groups = [{"params": named[:2], "lr": 3e-3}, {"params": named[2:]}]
    opt = collage.wrap(base.kind, groups, **base.settings, strategy=strategy, **settings)
    if hasattr(opt, "train"):
        opt.train()
    return model, opt


def stepped(model, opt, steps=3, scheduler=None, start=0):
    for step in range(start, start + steps):
        loss_of(model, step).backward()
        opt.step()
        if scheduler:
            scheduler.step()
        opt.zero_grad()


def pair(name="AdamW", strategy="collage-plus", **settings):
    params = weights(dtype=STRATEGIES[strategy].dtype)
    base = BASES[name]
    return params, collage.wrap(base.kind, groups_of(params, base), **base.settings, strategy=strategy, **settings)


# Gradients


@pytest.mark.parametrize("name", ["AdamW", "SGD foreach", "ScheduleFree AdamW"])
def test_gradients_released_in_backward_make_the_bits_of_a_whole_step(name):
    runs = []
    for released in (True, False):
        model, opt = made(name, "collage-plus-sr")
        if released:
            collage.release_gradients(model, opt)
        stepped(model, opt, 4)
        runs.append(opt)
    assert_same_run(*runs)


def test_gradients_of_an_accumulator_and_clipped_ones():
    """Clipped gradients are those of the base in float32, clipped by the same function."""
    model, opt = made(strategy="fp32-master")
    control, _ = made()
    control.float()
    params = list(control.parameters())
    base = BASES["AdamW"]
    alone = base.kind([{"params": params[:2], "lr": 3e-3}, {"params": params[2:]}], **base.settings)
    accumulator = collage.GradientAccumulator(model)
    for step in range(3):
        for micro in range(2):
            with accumulator:
                loss_of(model, step, micro).backward()
        accumulator.finish()
        collage.clip_grad_norm_(model.parameters(), 0.5)
        for p, q in zip(model.parameters(), params, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        opt.step()
        alone.step()
        opt.zero_grad()
    for (name, p), q in zip(model.named_parameters(), params, strict=True):
        if p in opt.state:
            assert_same_bits(name, opt.state[p].get("param_master", p.detach()), q.detach())


def test_parameters_without_gradients_and_frozen_ones_stay():
    params, opt = pair("ScheduleFree AdamW", "fp32-master")
    own = weights(dtype=torch.float32)
    base = BASES["ScheduleFree AdamW"]
    alone = base.kind(groups_of(own, base), **base.settings)
    for each, which in ((params, opt), (own, alone)):
        which.train()
        for step in range(4):
            give(each, step)
            frozen = [each[0], *(each[2:] if step in (1, 2) else ())]  # a group without any gradient, too
            for p in frozen if step != 3 else ():
                p.grad = None
            which.step()
    for k, (p, q) in enumerate(zip(params, own, strict=True)):
        assert_same_bits(f"{k}", opt.state[p]["param_master"], q.detach())
        assert_same_values(f"{k}", dict(opt.base.state[p]), dict(alone.state[q]))
    assert [g["k"] for g in opt.param_groups] == [g["k"] for g in alone.param_groups] == [4, 4]


@pytest.mark.parametrize("name", ["AdamW", "ScheduleFree AdamW", "SOAP"])
def test_a_step_with_an_infinite_gradient_is_skipped_as_a_whole(name):
    """By a GradScaler and by skip_nonfinite: nothing moves, no counter of a group either."""
    runs = []
    for way in ("never", "scaler", "guard"):
        params, opt = pair(name, "collage-fp16", skip_nonfinite=way == "guard")
        if hasattr(opt, "train"):
            opt.train()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        scaler.scale(torch.ones(()))
        for step in range(4):
            if step == 2 and way == "never":
                continue
            give(params, step)
            for p in params if way != "guard" else ():
                p.grad *= 2.0**8
            if step == 2:
                params[1].grad[3, 3] = torch.inf
                before, groups = copy.deepcopy(dict(planes(opt))), copy.deepcopy(settings_of(opt))
            if way == "guard":
                opt.step()
            else:
                scaler.step(opt)
                scaler.update(2.0**8)
            if step == 2:
                assert_same_values("skipped", dict(planes(opt)), before)
                assert settings_of(opt) == groups
        for group in opt.param_groups:
            group.pop("skip_nonfinite")
        runs.append(opt)
        assert opt.skipped_steps == (way == "guard")
    assert_same_run(runs[1], runs[0])
    assert_same_run(runs[2], runs[0])


def settings_of(opt):
    return [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]


def test_a_closure_is_evaluated_once_and_its_loss_returned():
    params, opt = pair()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        give(params, 0)
        return 7.0

    assert opt.step(closure) == 7.0
    assert calls == [True]
    control_params, control = pair()
    give(control_params, 0)
    assert control.step() is None
    assert_same_run(opt, control)


# Hooks, schedulers and settings


@pytest.mark.parametrize("bucket_mb", [64, 1e-6])
def test_hooks_run_once_for_a_step(bucket_mb):
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    params, calls = weights(), []
    base = torch.optim.AdamW(params)
    base.register_step_pre_hook(lambda opt, args, kwargs: calls.append(("base", type(opt))))
    base.register_step_post_hook(lambda opt, args, kwargs: calls.append(("base after", type(opt))))
    opt = collage.wrap(base, bucket_mb=bucket_mb)
    opt.register_step_post_hook(lambda opt, args, kwargs: calls.append(("own", type(opt))))
    everywhere = [
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: calls.append(("all", type(opt)))),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: calls.append(("all after", type(opt)))),
    ]
    try:
        give(params, 0)
        opt.step()
    finally:
        for handle in everywhere:
            handle.remove()
    assert {kind for _, kind in calls} == {Wrapped}
    assert sorted(name for name, _ in calls) == ["all", "all after", "base", "base after", "own"]


@pytest.mark.parametrize(
    "kind",
    [
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=10),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 / (1 + k)),
        lambda opt: torch.optim.lr_scheduler.SequentialLR(
            opt,
            [torch.optim.lr_scheduler.LinearLR(opt), torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5)],
            milestones=[2],
        ),
    ],
)
def test_schedulers_drive_it_as_they_drive_the_base_and_say_nothing(kind):
    params, opt = pair(strategy="fp32-master")
    own = weights(dtype=torch.float32)
    alone = BASES["AdamW"].kind(groups_of(own, BASES["AdamW"]), **BASES["AdamW"].settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each, which in ((params, opt), (own, alone)):
            scheduler = kind(which)
            for step in range(5):
                give(each, step)
                which.step()
                scheduler.step()
    for k, (p, q) in enumerate(zip(params, own, strict=True)):
        assert_same_bits(f"{k}", opt.state[p]["param_master"], q.detach())
    assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in alone.param_groups]


def test_settings_that_a_loop_changes_are_the_next_steps():
    params, opt = pair(strategy="fp32-master")
    own = weights(dtype=torch.float32)
    alone = BASES["AdamW"].kind(groups_of(own, BASES["AdamW"]), **BASES["AdamW"].settings)
    for each, which in ((params, opt), (own, alone)):
        for step in range(4):
            if step == 2:
                which.param_groups[0]["betas"] = (0.5, 0.6)
                which.param_groups[1]["lr"] = 0.1
            give(each, step)
            which.step()
    for k, (p, q) in enumerate(zip(params, own, strict=True)):
        assert_same_bits(f"{k}", opt.state[p]["param_master"], q.detach())


def test_a_learning_rate_that_is_a_tensor():
    rates = [torch.tensor(1e-2), 1e-2]
    runs = []
    for lr in rates:
        params = weights()
        opt = collage.wrap(torch.optim.AdamW, params, lr=lr, foreach=False, strategy="fp32-master")
        for step in range(3):
            if step == 2:
                opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"] * 0 + 5e-3
            give(params, step)
            opt.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert_same_bits("weight", p.detach(), q.detach())
    assert rates[0].item() == pytest.approx(1e-2)


def test_groups_that_come_later_step_with_a_strategy_of_their_own():
    params = weights()
    opt = collage.wrap(torch.optim.Adagrad, params[:2], strategy="collage-plus")
    give(params[:2], 0)
    opt.step()
    opt.add_param_group({"params": params[2:], "lr": 0.5, "strategy": "fp32-master"})
    give(params, 1)
    opt.step()
    assert [g["lr"] for g in opt.param_groups] == [0.01, 0.5]
    assert "param_lo" in opt.state[params[0]]
    assert "param_master" in opt.state[params[2]]
    assert opt.base.state[params[2]]["sum"].dtype == torch.float32
    assert opt.base.param_groups is opt.param_groups
    own = [nn.Parameter(p.detach().float()) for p in weights()[2:]]
    alone = torch.optim.Adagrad(own, lr=0.5)
    for q, p in zip(own, params[2:], strict=True):
        q.grad = p.grad.float()
    alone.step()
    for p, q in zip(params[2:], own, strict=True):
        assert_same_bits("weight", opt.state[p]["param_master"], q.detach())


# Weights of other kinds


def test_float32_weights_among_low_ones_step_in_float32():
    params = weights()
    params[2].data = params[2].data.float()
    opt = collage.wrap(torch.optim.AdamW, params, strategy="collage-plus")
    q = nn.Parameter(params[2].detach().clone())
    alone = torch.optim.AdamW([q])
    for step in range(3):
        give(params, step)
        q.grad = params[2].grad.clone()
        opt.step()
        alone.step()
    assert_same_bits("weight", params[2].detach(), q.detach())
    assert_same_values("states", dict(opt.base.state[params[2]]), dict(alone.state[q]))
    assert "param_lo" in opt.state[params[0]]


@pytest.mark.parametrize("name", ["AdamW", "AdamW foreach", "Adafactor", "ScheduleFree AdamW"])
def test_weights_that_are_strided_scalar_or_empty(name):
    base = BASES[name]

    def made(dtype):
        g = torch.Generator().manual_seed(3)
        wide = torch.randn(12, 6, generator=g).bfloat16().to(dtype)
        image = torch.randn(4, 3, 5, 5, generator=g).bfloat16().to(dtype).contiguous(memory_format=torch.channels_last)
        return [nn.Parameter(x) for x in (wide.t(), image, wide.clone()[::2], torch.ones((), dtype=dtype))]

    params, own = made(torch.bfloat16), made(torch.float32)
    empty = [nn.Parameter(torch.zeros(0, 3).bfloat16())] if name != "Adafactor" else []  # which divides by its size
    opt = collage.wrap(base.kind, [*params, *empty], **base.settings, strategy="fp32-master", bucket_mb=1e-3)
    alone = base.kind(own, **base.settings)
    go_on([*params, *empty], opt, 0, 4, scheduled=False)
    go_on(own, alone, 0, 4, scheduled=False)
    for k, (p, q) in enumerate(zip(params, own, strict=True)):
        assert_same_bits(f"{k}", opt.state[p]["param_master"], q.detach())
        assert p.stride() == q.stride()


def test_frozen_weights_are_let_in_and_step_when_they_train():
    params = weights()
    params[1].requires_grad_(False)
    quantised = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    opt = collage.wrap(torch.optim.AdamW, [*params, quantised], strategy="collage-plus")
    give([params[0], *params[2:]], 0)
    opt.step()
    assert not opt.base.state.get(params[1])
    params[1].requires_grad_(True)
    give(params, 1)
    opt.step()
    assert float(opt.base.state[params[1]]["step"]) == 1


# What stands beside


def test_what_others_change_is_taken_as_it_is():
    params, opt = pair()
    go_on(params, opt, 0, 2, scheduled=False)
    low = opt.state[params[0]]["param_lo"].clone()
    with torch.no_grad():
        params[0].view(-1)[:5].add_(1.0)
        edited = params[0].detach().clone()
    opt.zero_grad()
    for group in opt.param_groups:
        group["lr"] = 0.0
    params[0].grad = torch.zeros_like(params[0])
    opt.step()
    assert_same_bits("edited", params[0].detach().view(-1)[:5], edited.view(-1)[:5])
    assert_same_bits("others", opt.state[params[0]]["param_lo"].view(-1)[5:], low.view(-1)[5:])


def test_resync_and_reset_of_moments():
    params, opt = pair()
    go_on(params, opt, 0, 2, scheduled=False)
    low = [opt.state[p]["param_lo"].clone() for p in params]
    opt.reset_moments()
    assert not any(opt.base.state.values())
    for p, x in zip(params, low, strict=True):
        assert_same_bits("lo", opt.state[p]["param_lo"], x)
    opt.resync()
    assert not any(opt.state[p]["param_lo"].any() for p in params)
    give(params, 2)
    opt.step()
    assert {float(opt.base.state[p]["step"]) for p in params} == {1.0}


def test_averages_and_exports_have_all_that_is_kept():
    model, opt = made(strategy="fp32-master")
    ema = collage.EMA(model, 0.9, format="fp32", optimizer=opt)
    expected = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    for step in range(3):
        stepped(model, opt, 1, start=step)
        ema.update()
        for name, p in model.named_parameters():
            full = opt.state[p].get("param_master", p.detach()).float() if opt.state.get(p) else p.detach().float()
            expected[name] = expected[name] + (full - expected[name]) * 0.1
    for name, x in expected.items():
        torch.testing.assert_close(ema.value(name), x, rtol=1e-5, atol=1e-7)  # float32, in another order
    full = collage.high_precision_state_dict(model, opt)
    for name, p in model.named_parameters():
        assert_same_bits(name, full[name], opt.state[p].get("param_master", p.detach()).float())
    other, other_opt = made(strategy="collage-exact")
    collage.load_high_precision_state_dict(other, other_opt, full)
    again = collage.high_precision_state_dict(other, other_opt)
    for name, x in full.items():
        assert_same_bits(name, again[name], x)
    with ema.averaged(), pytest.raises(RuntimeError, match="inside averaged"):
        opt.step()


def test_evaluations_inside_an_average_are_refused():
    model, opt = made("ScheduleFree AdamW")
    stepped(model, opt, 1)
    ema = collage.EMA(model, 0.9, optimizer=opt)
    with ema.averaged(), pytest.raises(RuntimeError, match=r"eval\(\) inside averaged"):
        opt.eval()


def test_evaluations_are_of_what_is_kept_and_not_of_visible_weights():
    """Away and back changes what it changes in float32, whatever bfloat16 shows."""
    params, opt = pair("ScheduleFree AdamW", "collage-exact")
    go_on(params, opt, 0, 5, scheduled=False)
    model = nn.ParameterList(params)
    before = collage.high_precision_state_dict(model, opt)
    opt.eval()
    opt.train()
    for name, x in collage.high_precision_state_dict(model, opt).items():
        torch.testing.assert_close(x, before[name], rtol=1e-6, atol=1e-7)  # float32's rounding, not bfloat16's
    assert not hasattr(pair("AdamW")[1], "eval")
    with pytest.raises(AttributeError, match="'Wrapped' object has no attribute 'nothing'"):
        _ = opt.nothing


def test_a_compiled_step_says_that_it_is_none():
    params, opt = pair()
    give(params, 0)
    with pytest.raises(Exception, match="a compiled step knows the rules of this package alone"):
        torch.compile(opt.step, backend="eager", fullgraph=True)()


def test_it_says_which_states_are_in_which_formats():
    params = weights()
    said = repr(collage.wrap(torch.optim.Rprop, params, states={"prev": "bf16:sr"}))
    assert "wraps torch.optim.rprop.Rprop" in said
    assert "group 0: prev bf16:sr; as the optimizer makes them: step_size" in said
