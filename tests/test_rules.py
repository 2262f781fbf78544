"""Every optimizer: against torch's own, under every strategy, watched, saved, copied, compiled, and what it refuses."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    NUMBERS,
    Case,
    assert_same_bits,
    assert_same_planes,
    assert_same_rows,
    batch_of,
    copy_of,
    planes_of,
    refused,
    row_of,
    settings_of,
)
from torch import Tensor, nn

import collage
from collage.backends import choose
from collage.formats import format_of
from collage.rules import RULES
from collage.strategies import STRATEGIES

DEVICE = torch.device("cpu")


class Lion64(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. 2023 in float64. torch has none."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, {"betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False, **settings})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["theta"], state["m"] = p.double(), torch.zeros_like(p, dtype=torch.float64)
                theta, m, g = state["theta"], state["m"], p.grad.double() * (-1 if group["maximize"] else 1)
                update = (beta1 * m + (1 - beta1) * g).sign() + group["weight_decay"] * theta
                theta -= group["lr"] * update
                state["m"] = beta2 * m + (1 - beta2) * g
                p.copy_(theta)


class Muon64(torch.optim.Optimizer):
    """Muon of matrices, as torch.optim.Muon has it, in float64; AdamW of the rest. torch's multiplies in bfloat16."""

    def __init__(self, params: Any, maximize: bool = False, **settings: Any) -> None:
        defaults = {"momentum": 0.95, "nesterov": True, "weight_decay": 0.1, "betas": (0.9, 0.999), **settings}
        super().__init__(params, {"maximize": maximize, **defaults})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"theta": p.double(), "m": torch.zeros_like(p).double(), "v": torch.zeros_like(p).double()}
                    state["t"] = 0
                state["t"] += 1
                g = p.grad.double() * (-1 if group["maximize"] else 1)
                update = self.muons(group, state, g) if p.dim() == 2 else self.adamws(group, state, g)
                state["theta"] -= group["lr"] * (update + group["weight_decay"] * state["theta"])
                p.copy_(state["theta"])

    def muons(self, group: Any, state: Any, g: Tensor) -> Tensor:
        mu = group["momentum"]
        state["m"] = mu * state["m"] + (1 - mu) * g
        x = mu * state["m"] + (1 - mu) * g if group["nesterov"] else state["m"]
        if x.shape[0] > x.shape[1]:
            return self.orthogonal(x.T).T * (x.shape[0] / x.shape[1]) ** 0.5
        return self.orthogonal(x)

    @staticmethod
    def orthogonal(x: Tensor) -> Tensor:
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x

    @staticmethod
    def adamws(group: Any, state: Any, g: Tensor) -> Tensor:
        (beta1, beta2), t = group["betas"], state["t"]
        state["m"] = beta1 * state["m"] + (1 - beta1) * g
        state["v"] = beta2 * state["v"] + (1 - beta2) * g * g
        return state["m"] / (1 - beta1**t) / ((state["v"] / (1 - beta2**t)).sqrt() + 1e-8)


class Kind(NamedTuple):
    """An optimizer of ours under some settings, and whose steps it should make."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    settings: dict[str, Any]
    keys: tuple[str, ...]  # of the slots in its state


ADAM, SGD = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
KINDS = {
    "adam": Kind(collage.Adam, torch.optim.Adam, {"weight_decay": 0.01}, ADAM),
    "adam-amsgrad": Kind(collage.Adam, torch.optim.Adam, {"amsgrad": True}, (*ADAM, "max_exp_avg_sq")),
    "adamw": Kind(collage.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}, ADAM),
    "adamw-amsgrad": Kind(
        collage.AdamW, torch.optim.AdamW, {"amsgrad": True, "weight_decay": 0.1}, (*ADAM, "max_exp_avg_sq")
    ),
    "sgd": Kind(collage.SGD, torch.optim.SGD, {"weight_decay": 0.01}, ()),
    "sgd-momentum": Kind(collage.SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}, SGD),
    "sgd-dampening": Kind(collage.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}, SGD),
    "sgd-nesterov": Kind(collage.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, SGD),
    "lion": Kind(collage.Lion, Lion64, {"weight_decay": 0.1}, ("exp_avg",)),
    "muon": Kind(collage.Muon, Muon64, {"ns_dtype": "float32"}, SGD),  # and AdamW in the second group
}
every_kind = pytest.mark.parametrize("kind", KINDS)
of_torch = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("lion", "muon")])


def params_of(dtype: torch.dtype) -> list[nn.Parameter]:
    """Of bfloat16 numbers, whatever the dtype."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(64, 32, generator=g).bfloat16()
    return [nn.Parameter(x.to(dtype)) for x in (first, torch.ones(300), torch.tensor(0.5))]


def groups_of(params: list[nn.Parameter], named: bool = True) -> list[dict[str, Any]]:
    """Two, with different settings."""
    names = [(f"p{k}", p) for k, p in enumerate(params)] if named else params
    return [{"params": names[:1]}, {"params": names[1:], "lr": 3e-3, "weight_decay": 0.02}]


def make(kind: str, strategy: str = "collage-plus", **settings: Any) -> tuple[list[nn.Parameter], Any]:
    params = params_of(STRATEGIES[strategy].dtype)
    ours = KINDS[kind]
    return params, ours.ours(groups_of(params), strategy=strategy, **{"lr": 1e-2, **ours.settings, **settings})


def make_theirs(kind: str, **settings: Any) -> tuple[list[nn.Parameter], Any]:
    params, theirs = params_of(torch.float32), KINDS[kind]
    return params, theirs.theirs(groups_of(params, named=False), lr=1e-2, **{**theirs.settings, **settings})


def run(params: list[nn.Parameter], opt: Any, start: int, stop: int, step: Callable[[], Any] | None = None) -> None:
    """Steps on a schedule, with gradients that do not depend on the weights and that bfloat16 holds."""
    for k in range(start, stop):
        g = torch.Generator().manual_seed(k)
        for p in params:
            x = torch.randn(p.shape, generator=g) + 0.3
            p.grad = (x * (x.abs() > 2.0**-10)).bfloat16().to(p.dtype)
        for group in opt.param_groups:
            group["lr"] *= 0.99
        (step or opt.step)()


def values(params: list[nn.Parameter], opt: Any) -> list[Tensor]:
    full = collage.high_precision_state_dict(nn.ParameterList(params), opt)
    return [full[str(k)] for k in range(len(params))]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest, of its tensor's rms. Where the orders of rounding differ and nothing else it is some ulps."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().max() / b.square().mean().sqrt()) for a, b in pairs)


# Against torch's own


@every_kind
@pytest.mark.parametrize("maximize", [False, True])
def test_fp32_follows_torchs_own(kind, maximize, record_property):
    mine, opt = make(kind, "fp32", maximize=maximize)
    others, theirs = make_theirs(kind, maximize=maximize)
    run(mine, opt, 0, 200)
    run(others, theirs, 0, 200)
    largest = difference([p.detach() for p in mine], [p.detach() for p in others])
    record_property("largest difference of rms", largest)
    assert largest <= 3e-5
    assert set(opt.state[mine[0]]) == {"step", *KINDS[kind].keys}


CLOSE = {  # to fp32 after 200 steps: largest error of a mean over a tensor's elements, of how far they went
    "collage-light": 0.02, "collage-plus": 0.02, "collage-plus-sr": 0.02, "collage-fp16": 0.02, "fp32-master": 1e-3,
    "kahan": 0.1, "paper-light": 0.1, "paper-plus": 0.1, "stochastic": 0.3,
}  # fmt: skip


@every_kind
@pytest.mark.parametrize("strategy", CLOSE)
def test_other_strategies_are_close_to_fp32(kind, strategy, record_property):
    ends = {}
    for name in ("fp32", strategy):
        params, opt = make(kind, name)
        run(params, opt, 0, 200)
        ends[name] = values(params, opt)
    for start, want, got in zip(params_of(torch.float32), ends["fp32"], ends[strategy], strict=True):
        went = (want - start).double().square().mean().sqrt()
        error = ((got - want).double().square().mean().sqrt() / went).item()
        record_property("error", error)
        assert error <= CLOSE[strategy]


@of_torch
@pytest.mark.parametrize("strategy", ["fp32", "collage-plus", "fp32-master"])
def test_a_state_of_torchs_goes_on_as_torchs(kind, strategy):
    """Its moments, maxima and buffers, with its settings."""
    theirs, other = make_theirs(kind)
    run(theirs, other, 0, 5)
    params = [nn.Parameter(p.detach().to(STRATEGIES[strategy].dtype)) for p in theirs]
    opt = KINDS[kind].ours(groups_of(params), lr=0.5, strategy=strategy, **KINDS[kind].settings)
    full = {str(k): p.detach() for k, p in enumerate(theirs)}
    collage.load_high_precision_state_dict(nn.ParameterList(params), opt, full)
    opt.load_state_dict(other.state_dict())
    assert [group["lr"] for group in opt.param_groups] == [group["lr"] for group in other.param_groups]
    run(theirs, other, 5, 25)
    run(params, opt, 5, 25)
    within = {"fp32": 3e-5, "fp32-master": 3e-5, "collage-plus": 1e-2}[strategy]  # whose momentum is bfloat16
    assert difference(values(params, opt), [p.detach() for p in theirs]) <= within
    counted = {int(opt.state[p]["step"]) for p in params}
    assert counted == ({25} if not kind.startswith("sgd") else {21} if "-" in kind else {20})  # torch's SGD counts none


@pytest.mark.parametrize("kind", ["sgd-momentum", "sgd-dampening", "sgd-nesterov"])
def test_a_momentum_buffer_of_none_is_one_that_the_first_gradient_fills(kind):
    """As torch's SGD has it in states that older releases saved before a step, and of parameters without gradients."""
    theirs, other = make_theirs(kind)
    run(theirs, other, 0, 3)
    saved = other.state_dict()
    saved["state"][1]["momentum_buffer"] = None
    other.load_state_dict(copy.deepcopy(saved))
    params = [nn.Parameter(p.detach().clone()) for p in theirs]
    opt = KINDS[kind].ours(groups_of(params), strategy="fp32", **KINDS[kind].settings)
    opt.load_state_dict(saved)
    run(theirs, other, 3, 10)
    run(params, opt, 3, 10)
    assert difference([p.detach() for p in params], [p.detach() for p in theirs]) <= 3e-5


# What is refused, with the reason, and changes nothing

REFUSED = {
    "torch's Adam into AdamW": ("adamw", "adam", "theirs", "Adam's with weight_decay=0.01, which is in its moments"),
    "torch's AdamW into Adam": ("adam", "adamw", "theirs", "AdamW's with weight_decay=0.1, which is decoupled"),
    "torch's amsgrad into none": ("adamw", "adamw-amsgrad", "theirs", "it has amsgrad=True, and this .*False"),
    "none of torch's into amsgrad": ("adamw-amsgrad", "adamw", "theirs", "it needs step, exp_avg, exp_avg_sq, max_exp"),
    "torch's Adam amsgrad into Adam": ("adam", "adam-amsgrad", "theirs", "it has amsgrad=True"),
    "torch's SGD into Lion": ("lion", "sgd-momentum", "theirs", "not one of Lion: it needs .*exp_avg, and has mome"),
    "torch's SGD into AdamW": ("adamw", "sgd-momentum", "theirs", "it needs step, exp_avg, exp_avg_sq, and has mom"),
    "torch's AdamW into SGD": ("sgd-momentum", "adamw", "theirs", "not one of torch.optim.SGD: it needs momentum_b"),
    "torch's AdamW into plain SGD": ("sgd", "adamw", "theirs", "not one of torch.optim.SGD: .*dampening and nesterov"),
    "torch's AdamW into Lion": ("lion", "adamw", "theirs", "not one of Lion: torch has no optimizer of this rule"),
    "our Adam into AdamW": ("adamw", "adam", "ours", "saved with decoupled_weight_decay=False, this optimizer has Tr"),
    "our AdamW into Adam": ("adam", "adamw", "ours", "saved with decoupled_weight_decay=True, this optimizer has Fal"),
    "our amsgrad into none": ("adamw", "adamw-amsgrad", "ours", "saved with amsgrad=True, this optimizer has False"),
    "none of ours into amsgrad": ("adam-amsgrad", "adam", "ours", "saved with amsgrad=False, this optimizer has True"),
    "our Nesterov into momentum": ("sgd-momentum", "sgd-nesterov", "ours", "saved with nesterov=True, this .*False"),
    "our SGD into Lion": ("lion", "sgd-momentum", "ours", "saved with nesterov=False, this optimizer has no such"),
    "our Lion into SGD": ("sgd-momentum", "lion", "ours", "exp_avg"),
    "our Lion into AdamW": ("adamw", "lion", "ours", "exp_avg_sq"),
    "our AdamW into Lion": ("lion", "adamw", "ours", "saved with decoupled_weight_decay=True, .* no such"),
    "our AdamW into plain SGD": ("sgd", "adamw", "ours", "saved with decoupled_weight_decay=True, .* no such"),
    "our plain SGD into Lion": ("lion", "sgd", "ours", "saved with nesterov=False, this optimizer has no such"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_states_of_other_rules_are_refused(case):
    into, of, whose, message = REFUSED[case]
    params, opt = make(into, "fp32" if whose == "theirs" else "collage-plus")
    collage.monitor(opt, every=1)
    run(params, opt, 0, 2)
    others, other = make_theirs(of) if whose == "theirs" else make(of)
    run(others, other, 0, 3)
    with refused(opt, ValueError, rf"(param_groups\[0\]|param 'p0').*: .*{message}"):
        opt.load_state_dict(other.state_dict())
    run(params, opt, 2, 3)


# A constant that becomes 0 in its arithmetic is an error that names the setting

ZEROS = {
    "adamw": [{"lr": 1e-46}, {"eps": 1e-60}, {"weight_decay": 1e-44}, {"betas": (1e-60, 0.999)}],
    "adamw-amsgrad": [{"eps": 1e-46}, {"betas": (0.9, 1e-50)}],
    "adam": [{"weight_decay": 1e-46}, {"lr": 1e-300}, {"eps": 5e-324}],
    "sgd": [{"lr": 1e-46}, {"weight_decay": 1e-46}],
    "sgd-momentum": [{"lr": 1e-46}, {"momentum": 1e-46}, {"weight_decay": 1e-50}],
    "sgd-nesterov": [{"momentum": 1e-60}],
    "lion": [{"lr": 1e-46}, {"weight_decay": 1e-44}, {"betas": (1e-60, 0.9)}, {"betas": (0.9, 1e-60)}],
}
ZERO_CASES = [(kind, setting) for kind, settings in ZEROS.items() for setting in settings]


@pytest.mark.parametrize(("kind", "setting"), ZERO_CASES, ids=str)
@pytest.mark.parametrize("when", ["made", "first", "later"])
def test_a_setting_that_becomes_0_is_named_before_anything_changes(kind, setting, when):
    """By the constructor, or by the step if it is set later: in the second of two groups, and both stay as they are."""
    (name, value) = next(iter(setting.items()))
    said = rf"{name}: .* becomes 0 in float32, as if it were not there; use a larger one, or 0"
    if when == "made":
        with pytest.raises(ValueError, match=said):
            make(kind, "collage-plus", **setting)
        return
    params, opt = make(kind)
    collage.monitor(opt, every=1)
    if when == "later":
        run(params, opt, 0, 2)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.param_groups[1][name] = value
    with refused(opt, ValueError, said):
        opt.step()


@pytest.mark.parametrize("lr", [1e-42, 1e-41])
def test_what_is_0_in_bfloat16_is_named_there(lr):
    """Whose smallest number is 9e-41; float32's is 1.4e-45."""
    make("adamw", "fp32", lr=lr, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"lr: .* becomes 0 in bfloat16"):
        make("adamw", "paper-plus", lr=lr, weight_decay=0.0)


def test_zeros_that_were_asked_for_are_none():
    for kind, settings in {
        "adamw": {"lr": 0.0, "eps": 0.0, "weight_decay": 0.0, "betas": (0.0, 0.0)},
        "sgd-momentum": {"lr": 0.0, "dampening": 1.0, "weight_decay": 0.0},
        "lion": {"lr": 0.0, "betas": (0.0, 0.0), "weight_decay": 0.0},
    }.items():
        params, opt = make(kind, "fp32", **settings)
        run(params, opt, 0, 2)
        assert int(opt.state[params[0]]["step"]) == 2


@pytest.mark.parametrize("strategy", ["fp32", "paper-plus"])
def test_no_later_step_meets_a_0_that_the_first_did_not(strategy):
    """lr * sqrt(1 - beta2**t) / (1 - beta1**t) falls for some steps; it is judged by a bound of all."""
    lr, steps = 1.0, 60
    while True:
        lr /= 1.07
        try:
            opt = make("adamw", strategy, lr=lr, weight_decay=0.0, eps=1.0)[1]
        except ValueError:
            break
        if lr < {"fp32": 1e-42, "paper-plus": 1e-37}[strategy]:
            rule, register = opt.rule_of(opt.param_groups[0]), STRATEGIES[strategy].register
            for step in range(1, steps):
                rule.fold(lr, rule.hyper(opt.param_groups[0]), step, register)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_step_names_it_too():
    torch._dynamo.reset()
    lr = torch.tensor(1e-2)
    w = nn.Parameter(torch.ones(30).bfloat16())
    opt = collage.AdamW([("w", w)], lr=lr, weight_decay=0.0)
    step = torch.compile(opt.step, fullgraph=True)
    w.grad = torch.ones_like(w)
    for _ in range(2):
        step()
    lr.fill_(1e-45)
    with refused(opt, ValueError, "lr: .* becomes 0 in float32"):
        step()


# Watched


@every_kind
@pytest.mark.parametrize("strategy", ["collage-plus", "collage-plus-sr", "fp32", "paper-plus", "collage-fp16"])
def test_a_monitor_sees_every_rule_and_changes_no_bit(kind, strategy):
    runs = []
    for watched in (False, True):
        params, opt = make(kind, strategy)
        mon = collage.monitor(opt, every=2, shadow=1, strategies=["bf16", "kahan"]) if watched else None
        run(params, opt, 0, 5)
        runs.append(planes_of(opt))
    assert_same_planes(*runs)
    assert mon is not None
    total = mon.report().total
    assert total.steps == 3
    muon = kind == "muon"  # whose second group is AdamW's, and followed by the shadow
    assert mon.report().unfollowed == (["p0"] if muon else [])
    assert (total.v_ratio is not None) == (muon or "exp_avg_sq" in KINDS[kind].keys)
    assert (total.m_error is not None) == bool(KINDS[kind].keys)
    assert total.edq_ratio == pytest.approx(1.0, abs=1e-2)
    assert total.edq_shadow == pytest.approx(1.0, abs=5e-2)
    assert set(mon.report().beside) == {"bf16", "kahan"}
    if strategy == "fp32":
        assert total.v_ratio in (None, 1.0)
        assert total.m_error in (None, 0.0)
        followed = mon.report().by_group[1] if muon else total
        assert followed.edq_shadow == pytest.approx(followed.edq_ratio, rel=1e-12)  # summed in another order
    elif total.v_ratio is not None:
        assert total.v_ratio == pytest.approx(1.0, abs=2e-2)


# Saved, copied, averaged, compiled

SAVED = pytest.mark.parametrize("strategy", ["collage-plus", "collage-plus-sr", "collage-fp16", "fp32-master", "kahan"])


@every_kind
@SAVED
def test_a_resumed_run_is_the_run(kind, strategy):
    params, opt = make(kind, strategy)
    run(params, opt, 0, 3)
    file = io.BytesIO()
    torch.save({"model": nn.ParameterList(params).state_dict(), "opt": opt.state_dict()}, file)
    run(params, opt, 3, 6)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, other = make(kind, strategy, lr=0.1)
    other.load_state_dict(saved["opt"])
    nn.ParameterList(others).load_state_dict(saved["model"])
    run(others, other, 3, 6)
    assert_same_planes(planes_of(other), planes_of(opt))
    assert settings_of(other) == settings_of(opt)


@every_kind
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_goes_on_bit_for_bit(kind, how):
    params, opt = make(kind, "collage-plus-sr")
    run(params, opt, 0, 2)
    pair = (params, opt)
    copied, other = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    run(params, opt, 2, 4)
    run(copied, other, 2, 4)
    assert_same_planes(planes_of(other), planes_of(opt))


@every_kind
@SAVED
def test_weights_go_out_in_full_precision_and_an_average_follows_them(kind, strategy):
    params, opt = make(kind, strategy)
    model = nn.ParameterList(params)
    run(params, opt, 0, 2)
    full = nn.ParameterList([nn.Parameter(x) for x in values(params, opt)])
    averages = collage.EMA(model, 0.9, "bf16x3", optimizer=opt), collage.EMA(full, 0.9, "bf16x3")
    form = format_of(STRATEGIES[strategy].param)
    for k in range(2, 5):
        run(params, opt, k, k + 1)
        for parameter, value in zip(opt.parameters(), values(params, opt), strict=True):
            assert_same_bits(parameter.name, value, form.value(opt.theta(parameter)))
            full[int(parameter.name[1:])].data.copy_(value)
        for average in averages:
            average.update()
    for name in averages[0].planes:
        assert_same_bits(name, averages[0].value(name), averages[1].value(name))


@every_kind
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_step_has_eagers_bits(kind):
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        params, opt = make(kind, "collage-plus-sr")
        run(params, opt, 0, 5, torch.compile(opt.step, fullgraph=True) if compiled else None)
        ends.append(planes_of(opt))
    assert_same_planes(*ends)


# Rules of one slot, against a few lines of float64

WITHIN = {"fp32": 1e-6, "bf16x2": 1e-4, "bf16x2:sr": 1e-4, "bf16x3": 1e-6, "bf16x3:sr": 1e-6, "fp16x2": 1e-5}
WITHIN |= {"bf16": 0.03, "fp16": 3e-3, "fp16:sr": 5e-3, "bf16:sr": 0.03, "bf16+fp32": 1e-6}  # rms error of 40 steps


def average(slots: list[Tensor], g: Tensor, lr: float, decay: float) -> list[Tensor]:
    a, theta = slots
    return [decay * a + (1 - decay) * theta, theta]


def accumulate(slots: list[Tensor], g: Tensor, lr: float, weight: float) -> list[Tensor]:
    return [slots[0] + weight * g]


def momentum(slots: list[Tensor], g: Tensor, lr: float, mu: float) -> list[Tensor]:
    b = mu * slots[0] + (1 - mu) * g
    return [b, b]


def momentum_nesterov(slots: list[Tensor], g: Tensor, lr: float, mu: float) -> list[Tensor]:
    b = mu * slots[0] + (1 - mu) * g
    return [b, (1 - mu) * g + mu * b]


def apply(slots: list[Tensor], g: Tensor, lr: float, decay: float) -> list[Tensor]:
    return [slots[0] - lr * (g + decay * slots[0])]


ONE_SLOT = [
    *((average, (own, "bf16x2")) for own in ("bf16x2:sr", "bf16x3", "fp32", "fp16x2")),
    *((average, ("fp32", theta)) for theta in ("bf16+fp32", "bf16+kahan", "fp16", "fp32")),
    *((accumulate, (own,)) for own in ("fp32", "bf16", "bf16x2", "bf16x3", "bf16x3:sr", "fp16x2", "fp16:sr")),
    *((momentum, formats) for formats in (("bf16", "bf16"), ("bf16x2", "fp32"), ("fp32", "bf16"), ("fp32", "fp32"))),
    *((momentum_nesterov, formats) for formats in (("bf16", "bf16"), ("bf16x2:sr", "fp32"), ("fp32", "fp32"))),
    *((apply, (own,)) for own in ("fp32", "bf16x2", "bf16x2:sr", "bf16x3", "fp16x2", "bf16+fp32")),
]


@pytest.mark.parametrize(
    ("update", "formats"), ONE_SLOT, ids=[f"{update.__name__}-{'-'.join(formats)}" for update, formats in ONE_SLOT]
)
def test_rules_of_one_slot_against_float64(update, formats):
    case = Case(RULES[update.__name__], formats, torch.float32, torch.bfloat16)
    row = row_of(case, "normal", 1500)._replace(sums=None)
    want = [format_of(f).value(planes).double() for f, planes in zip(formats, row.slots, strict=True)]
    before = copy_of(row)
    (setting,) = (NUMBERS[x.name][0] for x in case.rule.settings)
    for k in range(40):
        g = torch.randn(1500, generator=torch.Generator().manual_seed(k)).bfloat16()
        row = row._replace(grad=g if case.rule.gradient else None, step=k + 1)
        choose("auto", DEVICE).step(replace(batch_of(case, [row]), lr=1e-2))
        want = update(want, g.double(), 1e-2, setting)
    for slot, form, planes, exact in zip(case.rule.slots, formats, row.slots, want, strict=True):
        error = (format_of(form).value(planes).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error <= max(WITHIN[f] for f in (form, formats[0])) if slot.written else error == 0, (slot, error)
    for slot, now, then in zip(case.rule.slots, row.slots, before.slots, strict=True):
        if not slot.written:  # it is only looked at
            for a, b in zip(now, then, strict=True):
                assert_same_bits(slot.prefix, a, b)


def test_an_average_of_a_nan_or_infinite_weight_is_one_and_an_output_is_never_read():
    case = Case(RULES["momentum"], ("fp32", "fp32"), torch.float32, torch.bfloat16)
    row = row_of(case, "normal", 8)._replace(sums=None)
    garbage = copy_of(row)
    garbage.slots[1][0].fill_(torch.nan)
    for own in (row, garbage):
        choose("auto", DEVICE).step(batch_of(case, [own]))
    assert_same_rows([garbage], [row])
    case = Case(RULES["average"], ("bf16x3", "bf16x2"), torch.float32, torch.bfloat16)
    row = row_of(case, "normal", 3)._replace(sums=None)
    row.slots[1][0].copy_(torch.tensor([torch.nan, torch.inf, 1.0]))
    row.slots[1][1].zero_()
    choose("auto", DEVICE).step(batch_of(case, [row]))
    value = format_of("bf16x3").value(row.slots[0])
    assert (value[0].isnan(), value[1].item(), value[2].isfinite()) == (True, torch.inf, True)


def a_weight(numbers=(1.0,) * 8):
    return nn.Parameter(torch.tensor(numbers))


def test_a_momentum_may_come_and_go_with_its_setting():
    """OneCycleLR turns it on before the first step; what theta holds beside its visible component stays."""
    w = a_weight([1.0 + 2**-12] * 8)
    opt = collage.SGD([("w", w)], lr=1e-4, cast=True)
    before = opt.state[w]["param_lo"].clone()
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-4, total_steps=10)
    assert opt.param_groups[0]["momentum"] == 0.95
    assert_same_bits("lo", opt.state[w]["param_lo"], before)
    for momentum, keys in ((0.95, {"step", "param_lo", "momentum_buffer"}), (0.0, {"step", "param_lo"})) * 2:
        opt.param_groups[0]["momentum"] = momentum
        w.grad = torch.ones_like(w)
        opt.step()
        assert set(opt.state[w]) == keys
    assert int(opt.state[w]["step"]) == 4
    collage.high_precision_state_dict(nn.ParameterDict({"w": w}), opt)


def test_amsgrad_may_be_turned_on_in_a_group():
    w = a_weight()
    opt = collage.AdamW([("w", w)], cast=True)
    opt.param_groups[0]["amsgrad"] = True
    w.grad = torch.ones_like(w)
    opt.step()
    assert_same_bits("largest", opt.state[w]["max_exp_avg_sq"], opt.state[w]["exp_avg_sq"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: collage.Adam([{"params": [p], "decoupled_weight_decay": True}]), ValueError, "use collage.AdamW"),
        (lambda p: collage.AdamW([{"params": [p], "decoupled_weight_decay": False}]), ValueError, "use collage.Adam"),
        (lambda p: collage.Adam([p], amsgrad="False"), TypeError, "amsgrad: needs True or False, got 'False'"),
        (lambda p: collage.Lion([p], betas=0.9), TypeError, "betas: needs 2 numbers, got 0.9"),
        (lambda p: collage.SGD([p], momentum=None), TypeError, "momentum: needs a number, got None"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(nn.Parameter(torch.ones(2).bfloat16()))


def test_a_second_moment_in_float16_is_warned_of():
    w = nn.Parameter(torch.ones(2).half())
    with pytest.warns(RuntimeWarning, match="variance: in 'fp16x2' squares of gradients below some 5e-3 become 0"):
        collage.AdamW([w], strategy=collage.Strategy("fp16x2", "fp16x2", "fp16x2"))
    collage.SGD([w], momentum=0.9, strategy=collage.Strategy("fp16x2", "fp16x2", "fp16x2"))


def test_weights_that_float16_cannot_hold_are_refused_before_anything_changes():
    layer = collage.to_fp16(nn.Linear(1, 1))
    opt = collage.AdamW(layer.named_parameters(), strategy="collage-fp16")
    before = layer.weight.detach().clone()
    full = {"weight": torch.full((1, 1), 1e6), "bias": torch.ones(1)}
    with pytest.raises(ValueError, match=r"param 'weight': 1e\+06 is beyond float16's largest number"):
        collage.load_high_precision_state_dict(layer, opt, full)
    assert_same_bits("weight", layer.weight, before)
    wide = nn.Linear(1, 1)
    nn.init.constant_(wide.weight, 1e5)
    with pytest.raises(ValueError, match="param 'weight': 100000 is beyond float16's largest number"):
        collage.EMA(wide, 0.9, format="fp16x2")


def test_a_closure_is_refused_under_a_scaler():
    w = nn.Parameter(torch.ones(2).bfloat16())
    opt = collage.AdamW([w])
    w.grad = torch.ones_like(w)
    opt.found_inf = torch.zeros(())
    with pytest.raises(RuntimeError, match=r"closure: .*call scaler.step\(opt\) alone"):
        opt.step(lambda: 0.0)
