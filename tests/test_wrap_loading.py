"""Wrapped optimizers that are saved, loaded, copied and pickled go on to the bits of a run that was not interrupted."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from helpers import assert_same_bits
from wrapped import (
    BASES,
    MATRICES,
    SHAPES,
    Base,
    assert_same_run,
    assert_same_values,
    give,
    go_on,
    groups_of,
    planes,
    trained,
    weights,
)

import collage
from collage.strategies import STRATEGIES

ALLOWED = [name for name, s in STRATEGIES.items() if s.register == torch.float32]
LARGE = {MATRICES: ((40, 160), (33, 20), (20, 30)), SHAPES: ((40, 160), (33, 20), (20,), (4, 3, 2))}  # some in blocks
QUICK = [
    ("AdamW", "collage-8bit"),
    ("AdamW", "collage-exact"),
    ("Adagrad", "collage-plus-sr"),
    ("ScheduleFree AdamW", "collage-exact"),
    ("SOAP", "collage-plus"),
    ("Lion", "collage-fp16"),
    ("Adafactor of transformers", "collage-plus"),
]
MANY = ["AdamW", "Adagrad", "ASGD", "SGD", "Muon", "Adafactor", "ScheduleFree RAdam", "SOAP", "Lion", "Adan"]


def made(name: str, strategy: str, seed: int = 0):
    """A wrapped optimizer and its parameters, some of a size that has blocks."""
    base = BASES[name]._replace(shapes=LARGE[BASES[name].shapes])
    params = weights(base.shapes, STRATEGIES[strategy].dtype)
    return params, collage.wrap(base.kind, groups_of(params, base), **base.settings, strategy=strategy, seed=seed)


def copied(params, values):
    with torch.no_grad():
        for p, x in zip(params, values, strict=True):
            p.copy_(x)


def through_a_file(saved):
    """What `torch.load` makes of it, which takes nothing but tensors and plain containers."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_goes_on(name: str, strategy: str) -> None:
    """From a state_dict, a deepcopy and a pickle."""
    params, opt = made(name, strategy)
    go_on(params, opt, 0, 3, scheduled=False)
    saved, low = through_a_file(opt.state_dict()), [p.detach().clone() for p in params]
    copies = [copy.deepcopy((params, opt)), pickle.loads(pickle.dumps((params, opt)))]
    go_on(params, opt, 3, 5, scheduled=False)
    for others, twin in copies:
        assert twin.param_groups is twin.base.param_groups
        go_on(others, twin, 3, 5, scheduled=False)
        assert_same_run(twin, opt)
    loaded_params, loaded = made(name, strategy)
    go_on(loaded_params, loaded, 7, 8, scheduled=False)  # something to be replaced
    loaded.load_state_dict(saved)
    copied(loaded_params, low)
    go_on(loaded_params, loaded, 3, 5, scheduled=False)
    assert_same_run(loaded, opt)


@pytest.mark.parametrize(("name", "strategy"), QUICK)
def test_a_run_goes_on(name, strategy):
    assert_goes_on(name, strategy)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), list(itertools.product(MANY, ALLOWED)))
def test_a_run_goes_on_under_every_strategy(name, strategy):
    assert_goes_on(name, strategy)


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "Muon", "ScheduleFree SGD", "SOAP"])
def test_the_keys_are_the_bases_and_those_of_planes(name):
    params, opt = made(name, "collage-plus")
    base = BASES[name]
    own = weights(LARGE[base.shapes], torch.float32)
    alone = base.kind(groups_of(own, base), **base.settings)
    for each, which in ((params, opt), (own, alone)):
        go_on(each, which, 0, 2, scheduled=False)
    ours, theirs = opt.state_dict(), alone.state_dict()
    for a, b in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert a.keys() >= b.keys()
        assert a["params"] == b["params"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        more = ours["state"][number].keys() - state.keys()
        assert state.keys() <= ours["state"][number].keys()
        assert more >= {"param_lo", "param_step"}
        assert all(key.removesuffix("_lo") in state for key in more - {"param_lo", "param_step"})


def test_remainders_are_bytes_in_a_state_dict():
    params, opt = made("AdamW", "collage-exact")
    go_on(params, opt, 0, 1, scheduled=False)
    state = opt.state_dict()["state"][0]
    words = [key for key, x in state.items() if isinstance(x, torch.Tensor) and x.dtype == torch.int8]
    assert words, state.keys()
    assert not any(x.dtype == torch.int16 for x in state.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "ASGD", "ScheduleFree AdamW", "SOAP", "Lion"])
def test_the_state_of_the_base_itself_is_taken(name):
    """What it kept in float32 is encoded; under float32 masters, to the bits of the base that goes on."""
    base = BASES[name]._replace(settings={**BASES[name].settings})
    params, alone = trained(base, 4)
    low = [nn.detach().clone() for nn in params]
    wrapped_params, opt = made_as(base)
    opt.load_state_dict(through_a_file(alone.state_dict()))
    for p, x in zip(wrapped_params, low, strict=True):  # what the weights were
        opt.theta(next(q for q in opt.parameters() if q.tensor is p))
        p.detach().copy_(x)
        opt.state[p]["param_master"].copy_(x)
    go_on(params, alone, 4, 7, scheduled=False)
    go_on(wrapped_params, opt, 4, 7, scheduled=False)
    for k, (p, q) in enumerate(zip(wrapped_params, params, strict=True)):
        assert_same_bits(f"master {k}", opt.state[p]["param_master"], q.detach())
        assert_same_values(f"{k}", dict(opt.base.state[p]), dict(alone.state[q]))


def made_as(base: Base):
    params = weights(base.shapes)
    return params, collage.wrap(base.kind, groups_of(params, base), **base.settings, strategy="fp32-master")


def test_a_raw_state_leaves_the_low_components_of_weights_that_were_cast():
    params = [torch.nn.Parameter(torch.full((8, 8), 1.0 + 2.0**-12))]
    alone = torch.optim.AdamW(params, lr=1e-3)
    give(params, 0)
    saved_before = [p.detach().clone() for p in params]
    alone.step()
    saved = alone.state_dict()
    copied(params, saved_before)
    opt = collage.wrap(torch.optim.AdamW, params, lr=1e-3, cast=True)
    opt.load_state_dict(saved)
    assert_same_bits("lo", opt.state[params[0]]["param_lo"].float(), torch.full((8, 8), 2.0**-12))
    assert_same_bits("m", opt.base.state[params[0]]["exp_avg"], saved["state"][0]["exp_avg"].bfloat16())


def test_a_constructed_one_goes_on_from_where_it_is():
    """Its states are encoded: nothing of a run is lost when it is wrapped."""
    base = BASES["AdamW"]
    params, alone = trained(base, 3)
    control_params, control = trained(base, 3)
    opt = collage.wrap(alone, strategy="fp32-master", cast=True)
    go_on(params, opt, 3, 6, scheduled=False)
    go_on(control_params, control, 3, 6, scheduled=False)
    assert {p.dtype for p in params} == {torch.bfloat16}
    for k, (p, q) in enumerate(zip(params, control_params, strict=True)):
        assert_same_bits(f"master {k}", opt.state[p]["param_master"], q.detach())


def named(strategy: str, order: list[int], **settings):
    params = weights(LARGE[SHAPES])
    pairs = [(f"p{k}", p) for k, p in enumerate(params)]
    groups = [
        {"params": [pairs[k] for k in order if k < 2]},
        {"params": [pairs[k] for k in order if k >= 2], "lr": 2e-3},
    ]
    if order[0] >= 2:
        groups.reverse()
    return params, collage.wrap(torch.optim.NAdam, groups, strategy=strategy, **settings)


@pytest.mark.parametrize("strategy", ["collage-plus-sr", "collage-8bit"])
def test_names_tell_parameters_apart_whatever_their_order(strategy):
    params, opt = named(strategy, [0, 1, 2, 3])
    go_on(params, opt, 0, 3, scheduled=False)
    saved, low = opt.state_dict(), [p.detach().clone() for p in params]
    others, other = named(strategy, [3, 2, 1, 0])
    other.load_state_dict(saved)
    copied(others, low)
    go_on(params, opt, 3, 5, scheduled=False)
    go_on(others, other, 3, 5, scheduled=False)
    for p, q in zip(params, others, strict=True):
        assert_same_bits("weight", q.detach(), p.detach())
        assert_same_values("theta", dict(other.state[q]), dict(opt.state[p]))
        assert_same_values("states", dict(other.base.state[q]), dict(opt.base.state[p]))


def damage(saved, kind):
    """A state_dict that is not to be taken."""
    saved = copy.deepcopy(saved)
    state = saved["state"][1]
    if kind == "misshapen":
        state["exp_avg"] = state["exp_avg"][:5]
    elif kind == "misshapen low":
        state["exp_avg_sq_lo"] = state["exp_avg_sq_lo"][:5]
    elif kind == "missing low":
        del state["exp_avg_sq_lo"]
    elif kind == "missing high":
        del state["exp_avg_sq"]
    elif kind == "missing single":
        del state["exp_avg"]
    elif kind == "missing of theta":
        del state["param_lo"]
    elif kind == "no step of theta":
        del state["param_step"]
    elif kind == "other dtype":
        state["exp_avg"] = state["exp_avg"].float()
    elif kind == "number":
        state["exp_avg"] = 1.0
    elif kind == "fewer groups":
        saved["param_groups"] = saved["param_groups"][:1]
    elif kind == "not a state":
        saved = {"model": 1}
    return saved


DAMAGES = [
    ("misshapen", "param '1': exp_avg has shape"),
    ("misshapen low", "param '1': its state 'exp_avg_sq' is in 'bf16x2', whose exp_avg_sq_lo is bfloat16"),
    ("missing low", "param '1': its state 'exp_avg_sq' is in 'bf16x2', whose exp_avg_sq_lo is .* got None"),
    ("missing high", "param '1': its state has no 'exp_avg_sq'"),
    ("missing single", "param '1': its state has no 'exp_avg'"),
    ("missing of theta", "param '1': strategy 'collage-plus' keeps step, param_lo"),
    ("no step of theta", "param '1': .*step"),
    ("other dtype", "param '1': its state 'exp_avg' is in 'bf16', whose exp_avg is bfloat16 .* got float32"),
    ("number", "param '1': exp_avg has shape"),
    ("fewer groups", "it is of other parameters, by name. Only in the state: none; only in this optimizer"),
    ("not a state", "state_dict: needs 'state'"),
]


@pytest.mark.parametrize(("kind", "match"), DAMAGES)
def test_a_damaged_state_is_refused_and_nothing_is_changed(kind, match):
    params, opt = made("AdamW", "collage-plus")
    go_on(params, opt, 0, 2, scheduled=False)
    saved = opt.state_dict()
    before = copy.deepcopy(dict(planes(opt)))
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(damage(saved, kind))
    assert_same_values("after", dict(planes(opt)), before)
    opt.load_state_dict(saved)
    assert_same_values("loaded", dict(planes(opt)), before)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"strategy": "collage-light"},
            r"param_groups\[0\]: the state was saved under strategy 'collage-plus'|exp_avg_sq",
        ),
        ({"states": {"exp_avg": "fp32"}}, "param '0': its state 'exp_avg' is in 'fp32'.*states= it was saved under"),
        ({"amsgrad": True}, "max_exp_avg_sq|amsgrad"),
    ],
)
def test_the_state_of_another_strategy_or_of_other_settings_is_refused(settings, match):
    params, opt = made("AdamW", "collage-plus")
    go_on(params, opt, 0, 2, scheduled=False)
    base = BASES["AdamW"]
    others = weights(LARGE[SHAPES])
    other = collage.wrap(base.kind, groups_of(others, base), **{**base.settings, **settings})
    with pytest.raises(ValueError, match=match):
        other.load_state_dict(opt.state_dict())
    assert not other.state
    assert not other.base.state


def test_another_base_is_refused():
    _, opt = trained(BASES["SGD"], 2, strategy="collage-plus")
    others = weights()
    other = collage.wrap(torch.optim.AdamW, groups_of(others, BASES["AdamW"]))
    with pytest.raises(ValueError, match=r"its state has no '(exp_avg|exp_avg_sq|step)', which the optimizer keeps"):
        other.load_state_dict(opt.state_dict())
    _, alone = trained(BASES["SGD"], 2)
    with pytest.raises(ValueError, match=r"its state has no '(exp_avg|exp_avg_sq|step)', which the optimizer keeps"):
        other.load_state_dict(alone.state_dict())
    assert not other.state
    assert not other.base.state


def test_an_empty_state_is_loaded_as_accelerate_does_when_it_prepares():
    params, opt = made("AdamW", "collage-plus")
    opt.load_state_dict(opt.state_dict())
    go_on(params, opt, 0, 2, scheduled=False)
    control_params, control = made("AdamW", "collage-plus")
    go_on(control_params, control, 0, 2, scheduled=False)
    assert_same_run(opt, control)
