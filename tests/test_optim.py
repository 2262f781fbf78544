"""The optimizer as a torch.optim.Optimizer: what it takes, what it refuses, and that a refusal changes nothing."""

import copy
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import BARE, assert_same_bits, assert_same_planes, refused
from torch import nn

import collage
from collage.strategies import STRATEGIES

LOW = [name for name, s in STRATEGIES.items() if s.dtype == torch.bfloat16]


def model_of(dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def give_gradients(model, step, dtype=None):
    g = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def run(model, opt, steps, start=0):
    for step in range(start, start + steps):
        give_gradients(model, step)
        opt.step()


def bits_of(model, opt):
    """Every plane of every parameter, flat."""
    planes = {}
    for name, p in model.named_parameters():
        planes[name] = p.detach()
        planes |= {f"{name}.{key}": value for key, value in opt.state[p].items()}
    return planes


@pytest.mark.parametrize("strategy", BARE)
def test_names_groups_views_and_chunks_do_not_change_a_bit(strategy):
    """The same tensors, given by name or not, in one group or two: names matter to stochastic rounding alone."""
    dtype = STRATEGIES[strategy].dtype
    models = [model_of(dtype) for _ in range(3)]
    optimizers = [
        collage.AdamW(models[0].parameters(), strategy=strategy),
        collage.AdamW([{"params": [p]} for p in models[1].parameters()], strategy=strategy),
        collage.AdamW(
            models[2].parameters(), strategy=STRATEGIES[strategy], lr=torch.tensor(1e-3, dtype=torch.float64)
        ),
    ]
    for model, opt in zip(models, optimizers, strict=True):
        run(model, opt, 3)
    assert_same_planes(bits_of(models[0], optimizers[0]), bits_of(models[1], optimizers[1]))
    assert_same_planes(bits_of(models[0], optimizers[0]), bits_of(models[2], optimizers[2]))


@pytest.mark.parametrize("strategy", BARE)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (1023,), (1025,), (7, 5), (70_001,)])
def test_every_size(strategy, shape):
    """A tensor of any size is updated as its elements are: the first k of n are the k of a smaller one."""
    dtype = STRATEGIES[strategy].dtype
    torch.manual_seed(1)
    whole = torch.randn(80_000).to(dtype)
    grad = torch.randn(80_000).to(dtype)
    numel = torch.Size(shape).numel()
    results = []
    for data, g in ((whole.clone(), grad), (whole[:numel].view(shape).clone(), grad[:numel].view(shape))):
        p = nn.Parameter(data)
        opt = collage.AdamW([p], lr=1e-2, strategy=strategy)
        for _ in range(2):
            p.grad = g.clone()
            opt.step()
        results.append([p.detach(), *(v for k, v in opt.state[p].items() if k != "step")])
    for i, (big, small) in enumerate(zip(*results, strict=True)):
        assert small.shape == shape
        assert_same_bits(f"plane {i}", small.reshape(-1), big[:numel])


@pytest.mark.parametrize("strategy", ["collage-plus", "collage-plus-sr", "fp32-master", "paper-plus"])
def test_planes_take_the_strides_of_a_non_contiguous_parameter(strategy):
    torch.manual_seed(1)
    data, grad = torch.randn(6, 10).bfloat16(), torch.randn(6, 10).bfloat16()
    plain, turned = nn.Parameter(data.clone()), nn.Parameter(data.t().contiguous().t())
    assert not turned.is_contiguous()
    for p in (plain, turned):
        opt = collage.AdamW([("w", p)], strategy=strategy)
        p.grad = grad.clone()
        opt.step()
        states = [*opt.state[p].values()][1:]
        assert all(s.stride() == p.stride() for s in states)
        p.planes = [p.detach(), *states]
    for i, (a, b) in enumerate(zip(plain.planes, turned.planes, strict=True)):
        assert_same_bits(f"plane {i}", a, b)


def test_a_view_of_a_buffer_is_updated_in_place_and_alone():
    buffer = torch.ones(10).bfloat16()
    p = nn.Parameter(buffer[3:7])
    opt = collage.AdamW([p], lr=0.1)
    p.grad = torch.ones(4).bfloat16()
    opt.step()
    assert (buffer[3:7] != 1).all()
    assert (buffer[:3] == 1).all()
    assert (buffer[7:] == 1).all()


def test_closure_hooks_scheduler_and_parameters_without_gradient():
    model = model_of()
    opt = collage.AdamW(model.named_parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    untouched = model[2].weight.detach().clone()

    def closure():
        opt.zero_grad()
        loss = model[0](torch.ones(1, 8).bfloat16()).square().sum()
        loss.backward()
        calls.append("closure")
        return loss

    loss = opt.step(closure)
    assert loss.requires_grad
    assert calls == ["pre", "closure", "post"]
    schedule.step()
    assert opt.param_groups[0]["lr"] == 0.5
    assert_same_bits("no gradient", model[2].weight.detach(), untouched)
    assert model[2].weight not in opt.state


def test_maximize_is_minimize_of_the_negative():
    results = []
    for sign, maximize in ((1, False), (-1, True)):
        p = nn.Parameter(torch.ones(5).bfloat16())
        opt = collage.AdamW([p], lr=0.1, maximize=maximize)
        p.grad = sign * torch.tensor([1.0, -2.0, 0.0, 3.0, 0.1]).bfloat16()
        opt.step()
        results.append(p.detach())
    assert_same_bits("theta", *results)


def test_a_float32_gradient_is_read_as_it_is():
    """1 + 2**-12 is 1 in bfloat16: with a float32 gradient v must know the difference."""
    p = nn.Parameter(torch.ones(1).bfloat16())
    p.grad_dtype = torch.float32
    opt = collage.AdamW([p], betas=(0.9, 0.0), strategy="collage-plus")
    p.grad = torch.full((1,), 1 + 2.0**-12)
    opt.step()
    v = opt.state[p]["exp_avg_sq"].float() + opt.state[p]["exp_avg_sq_lo"].float()
    assert v.item() == pytest.approx((1 + 2.0**-12) ** 2, rel=2.0**-16)  # half an ulp of the pair
    assert v.item() != 1.0


def test_float32_parameters_beside_low_ones_are_updated_in_float32(caplog):
    model = model_of()
    model[2].float()
    with caplog.at_level(logging.INFO, logger="collage"):
        opt = collage.AdamW(model.named_parameters(), strategy="collage-plus")
    assert caplog.messages == ["2 parameters are float32 and are updated in float32"]
    run(model, opt, 2)
    assert sorted(opt.state[model[2].weight]) == ["exp_avg", "exp_avg_sq", "step"]
    assert opt.state[model[2].weight]["exp_avg"].dtype == torch.float32
    assert "param_lo" in opt.state[model[0].weight]


def test_strategy_per_group_and_add_param_group():
    model = model_of()
    opt = collage.AdamW([{"params": model[0].parameters(), "strategy": "fp32-master"}], strategy="bf16")
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.5})
    run(model, opt, 1)
    assert "param_master" in opt.state[model[0].weight]
    assert sorted(opt.state[model[2].weight]) == ["exp_avg", "exp_avg_sq", "step"]
    assert [g["strategy"] for g in opt.param_groups] == ["fp32-master", "bf16"]


def test_tied_parameters_step_once():
    model = model_of()
    model[0].weight = nn.Parameter(torch.ones(16, 8).bfloat16())
    tied = nn.ModuleDict({"a": model[0], "b": nn.Linear(8, 16, bias=False)})
    tied["b"].weight = tied["a"].weight
    opt = collage.AdamW(tied.named_parameters())
    give_gradients(tied, 0)
    opt.step()
    assert int(opt.state[tied["b"].weight]["step"]) == 1
    full = collage.high_precision_state_dict(tied, opt)
    assert {"a.weight", "b.weight"} <= full.keys()
    assert_same_bits("tied", full["a.weight"], full["b.weight"])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: needs a finite number >= 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr: needs a finite"),
        ({"lr": torch.ones(2)}, ValueError, "lr: a tensor needs one element"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: needs two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, ValueError, "betas: needs two numbers"),
        ({"eps": -1e-8}, ValueError, "eps: needs"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: needs"),
        ({"seed": -1}, ValueError, "seed: needs an integer"),
        ({"strategy": "collage"}, ValueError, "strategy: unknown 'collage'; known: bf16, "),
        ({"strategy": 3}, TypeError, "strategy: needs a name or a Strategy, got int"),
        ({"backend": "cuda"}, ValueError, "backend: unknown 'cuda'; known: auto, cpu, triton, reference"),
        ({"lr": "1e-3x"}, TypeError, r"lr: needs a number, got '1e-3x' \(str\)"),
        ({"seed": 1.0}, ValueError, "seed: needs an integer"),
        ({"fused": True}, TypeError, "cannot take fused=True; drop it"),
        ({"foreach": True, "differentiable": False}, TypeError, "cannot take foreach=True; drop it"),
        ({"fused": True}, TypeError, "cannot take fused"),
        ({"learning_rate": 1e-3}, TypeError, "cannot take learning_rate; it is unknown"),
    ],
)
def test_a_wrong_argument_is_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        collage.AdamW(model_of().parameters(), **kwargs)


@pytest.mark.parametrize(
    ("dtype", "strategy", "error", "message"),
    [
        (
            torch.float32,
            "collage-plus",
            ValueError,
            "all 4 trainable parameters are float32.*Say cast=True.*load the model in bfloat16.*'fp32'",
        ),
        (
            torch.float16,
            "collage-plus",
            TypeError,
            r"param '0.weight': strategy 'collage-plus' needs bfloat16, got float16",
        ),
        (torch.float64, "fp32", TypeError, "needs float32, got float64; cast it.*drops most of its bits"),
        (torch.bfloat16, "fp32", TypeError, r"param '0.weight': strategy 'fp32' needs float32, got bfloat16"),
        (torch.complex64, "collage-plus", TypeError, "got complex64; no strategy takes complex numbers"),
        (torch.float8_e4m3fn, "collage-plus", TypeError, "got float8_e4m3fn; is it a quantised weight. Then freeze it"),
    ],
)
def test_a_wrong_dtype_is_named_with_the_fix(dtype, strategy, error, message):
    named = [(n, nn.Parameter(p.detach().to(dtype))) for n, p in model_of().named_parameters()]
    with pytest.raises(error, match=message):
        collage.AdamW(named, strategy=strategy)


def test_a_refused_group_is_not_added():
    opt = collage.AdamW(model_of().parameters())
    with refused(opt, ValueError, "eps"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1).bfloat16())], "eps": -1})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("kind", ["sparse", "float64"])
def test_a_wrong_gradient_is_refused_before_anything_changes(kind):
    model = model_of()
    opt = collage.AdamW(model.named_parameters())
    run(model, opt, 1)
    give_gradients(model, 1)
    bias = model[2].bias
    if kind == "sparse":
        bias.grad = bias.grad.to_sparse()
    else:
        bias.grad_dtype = None
        bias.grad = bias.grad.double()
    with refused(
        opt,
        TypeError,
        r"param '2\.bias': (its gradient is sparse|it is bfloat16 and its gradient float64; use bfloat16 or)",
    ):
        opt.step()


@pytest.mark.parametrize("strategy", BARE)
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copied_optimizer_goes_on_bit_for_bit(strategy, how):
    model = model_of(STRATEGIES[strategy].dtype)
    opt = collage.AdamW(model.named_parameters(), strategy=strategy)
    run(model, opt, 2)
    pair = (model, opt)
    copied, opt2 = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    run(model, opt, 2, start=2)
    run(copied, opt2, 2, start=2)
    assert_same_planes(bits_of(model, opt), bits_of(copied, opt2))


@pytest.mark.parametrize("strategy", BARE)
def test_extreme_gradients_stay_extreme_and_never_break_the_planes(strategy):
    """Subnormal, huge, zero, Inf and NaN gradients on such weights: neighbours are not touched by a NaN."""
    values = torch.tensor([0.0, -0.0, 1.0, 1e-38, 1e-45, 3e38, -3e38, float("inf"), float("nan")])
    theta, grad = (x.reshape(-1) for x in torch.meshgrid(values, values, indexing="ij"))
    p = nn.Parameter(theta.to(STRATEGIES[strategy].dtype))
    opt = collage.AdamW([("w", p)], lr=1e-3, strategy=strategy)
    collage.monitor(opt, every=1)  # checks the planes before each step
    for _ in range(3):
        p.grad = grad.to(p.dtype)
        opt.step()
    assert p.detach().isnan()[grad.isnan()].all()
    tame = theta.isfinite() & (grad.abs() < 1e19) & (theta.abs() < 1e38)  # g * g overflows above 1.8e19
    assert p.detach()[tame].isfinite().all()


def test_a_backend_set_later_is_checked_before_the_step():
    w = nn.Parameter(torch.ones(3).bfloat16())
    opt = collage.AdamW([w], lr=1e-3)
    w.grad = torch.ones_like(w)
    opt.backend = "cuda"
    with refused(opt, ValueError, "backend: unknown 'cuda'; known: auto, cpu, triton, reference"):
        opt.step()


def test_a_refused_parameter_gets_no_state():
    w = nn.Parameter(torch.ones(4).bfloat16())
    opt = collage.AdamW([("w", w)], lr=1e-3)
    w.grad = torch.ones_like(w)
    memory = w.untyped_storage()
    memory.resize_(0)
    with pytest.raises(ValueError, match="param 'w': it and its optimizer state need memory"):
        opt.step()
    memory.resize_(8)
    w.data.fill_(1.0)
    opt.step()
    assert int(opt.state[w]["step"]) == 1


def test_a_strategy_changed_between_steps_draws_its_bits():
    """collage-plus-sr has the planes of collage-plus, and needs the parameter's own random bits besides."""
    results = []
    for before in ("collage-plus", "collage-plus-sr"):
        w = nn.Parameter(torch.ones(64).bfloat16())
        opt = collage.AdamW([("w", w)], lr=1e-3, strategy=before)
        w.grad = torch.zeros_like(w)
        opt.step()
        opt.param_groups[0]["strategy"] = "collage-plus-sr"
        w.grad = torch.full_like(w, 1e-3)
        opt.step()
        results.append([w.detach(), opt.state[w]["param_lo"], opt.state[w]["exp_avg"]])
    for k, (one, other) in enumerate(zip(*results, strict=True)):
        assert_same_bits(f"{k}", one, other)


@pytest.mark.parametrize("view", [lambda x: x[:, 3:29], lambda x: x[::2], lambda x: x.view(30, 8, 5)[:, :, 1:3]])
@pytest.mark.parametrize("strategy", ["collage-plus", "fp32-master"])
def test_parameters_that_are_views_with_gaps(strategy, view):
    """Their states are contiguous; they start as copies of the same numbers do."""
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for p in (nn.Parameter(view(x)), nn.Parameter(view(x).clone())):
        p.grad = torch.full_like(p, 1e-3)
        opt = collage.AdamW([("w", p)], lr=1e-3, strategy=strategy)
        opt.step()
        opt.resync()
        opt.step()
        results.append([p.detach(), *opt.state[p].values()])
    for k, (one, other) in enumerate(zip(*results, strict=True)):
        assert_same_bits(f"{k}", one, other)


def stepped(shape=(20, 30)):
    w = nn.Parameter(torch.ones(shape).bfloat16())
    w.grad = torch.full_like(w, 1e-3)
    opt = collage.AdamW([("w", w)], lr=1e-3)
    opt.step()
    return w, opt, opt.state[w]


def shrink_gradient(w, _):
    memory = torch.zeros(100_000).bfloat16()
    w.grad = memory[-600:].view(20, 30)
    memory.untyped_storage().resize_(4000)


def shrink_strided_gradient(w, _):
    memory = torch.zeros(30, 20).bfloat16()
    w.grad = memory.t()
    memory.untyped_storage().resize_(16)


MISCHIEF = {
    "a state transposed in place": lambda _, state: state["exp_avg"].t_(),
    "a state cut": lambda _, state: setattr(state["exp_avg"], "data", state["exp_avg"].data[:10]),
    "a state resized": lambda _, state: state["exp_avg"].resize_(10),
    "a state expanded": lambda _, state: setattr(state["exp_avg"], "data", state["exp_avg"].data[:1].expand(20, 30)),
    "a state seen as another dtype": lambda _, state: setattr(state["exp_avg"], "data", state["exp_avg"].data.float()),
    "weights expanded": lambda w, _: setattr(w, "data", w.data[:1].expand(20, 30)),
    "weights that overlap": lambda w, _: setattr(w, "data", w.data.as_strided((20, 30), (15, 1))),
    "a counter freed": lambda _, state: state["step"].untyped_storage().resize_(0),
    "a counter of another type": lambda _, state: state.update(step=3),
    "a gradient behind its memory": shrink_gradient,
    "a strided gradient behind its memory": shrink_strided_gradient,
}


@pytest.mark.parametrize("what", MISCHIEF)
def test_memory_is_checked_again_when_a_tensor_was_changed_in_place(what):
    w, opt, state = stepped()
    MISCHIEF[what](w, state)
    with pytest.raises((ValueError, TypeError), match="param 'w'"):
        opt.step()


def test_settings_changed_between_steps_are_checked_before_anything_is_counted():
    _, opt, state = stepped()
    for key, value in {"betas": (1.0, 0.999), "lr": float("nan"), "seed": -1}.items():
        before = opt.param_groups[0][key]
        opt.param_groups[0][key] = value
        with refused(opt, ValueError, f"{key}: needs"):
            opt.step()
        opt.param_groups[0][key] = before
    assert int(state["step"]) == 1


def test_names_are_unique_and_complete():
    x, y = (nn.Parameter(torch.ones(3).bfloat16()) for _ in range(2))
    with pytest.raises(ValueError, match="params: two parameters are named 'w'; give each a name of its own"):
        collage.AdamW([{"params": [("w", x)]}, {"params": [("w", y)]}])
    opt = collage.AdamW([("x", x)])
    opt.param_groups[0]["params"].append(y)
    x.grad = torch.ones_like(x)
    with refused(opt, ValueError, r"param_groups\[0\]: 2 parameters and 1 names; add parameters with"):
        opt.step()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_steps():
    """OpenMP's threads do not live on in it; waiting for them would never end."""
    code = (
        "import os, sys, torch, collage\n"
        "torch.set_num_threads(2)\n"
        "w = torch.nn.Parameter(torch.ones(400_000).bfloat16()); w.grad = torch.ones_like(w)\n"
        "opt = collage.AdamW([w]); opt.step()\n"
        "child = os.fork()\n"
        "opt.step()\n"
        "if not child: os._exit(0)\n"
        "sys.exit(os.waitpid(child, 0)[1])\n"
    )
    warn = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    assert subprocess.run(warn, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("name", ["maximize", "capturable", "skip_nonfinite"])
def test_switches_are_switches(name):
    w = torch.nn.Parameter(torch.ones(4).bfloat16())
    with pytest.raises(TypeError, match=f"{name}: needs True or False, got 'yes'"):
        collage.AdamW([("w", w)], **{name: "yes"})
