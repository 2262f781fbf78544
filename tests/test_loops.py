"""What training loops do to an optimizer: dtypes that change, frozen weights, states by name, settings of others."""

import copy
import gc
import itertools
import logging
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, assert_same_planes, refused
from torch import nn

import collage
from collage import saying
from collage.strategies import STRATEGIES

LOW = [name for name, s in STRATEGIES.items() if s.dtype == torch.bfloat16]


@pytest.fixture(autouse=True)
def _say_everything_again():
    saying.warn_once.cache_clear()


def weight(shape=(8,), dtype=torch.bfloat16, seed=0, **kwargs):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype), **kwargs)


def give(*params, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def planes(opt, p):
    return {"theta": p.detach().clone(), **{k: v.clone() for k, v in opt.state[p].items()}}


# Weights of other dtypes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float16, torch.float64,
                                   torch.complex64, torch.float32])  # fmt: skip
def test_frozen_parameters_of_any_dtype_are_let_in(dtype, caplog):
    frozen = nn.Parameter(torch.zeros(4).to(dtype), requires_grad=False)
    w = weight()
    with caplog.at_level(logging.INFO, logger="collage"):
        opt = collage.AdamW([("frozen", frozen), ("w", w)])
    give(w)
    opt.step()
    assert frozen not in opt.state
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (
            torch.float64,
            "param 'x': strategy 'collage-plus' needs bfloat16, got float64; cast it.*drops most of its bits",
        ),
        (torch.float16, "param 'x': strategy 'collage-plus' needs bfloat16, got float16; cast it"),
        (torch.complex64, "param 'x': .* no strategy takes complex numbers"),
    ],
)
def test_a_frozen_parameter_that_trains_later_is_judged_then(dtype, message):
    x, w = nn.Parameter(torch.zeros(4).to(dtype), requires_grad=False), weight()
    opt = collage.AdamW([("x", x), ("w", w)])
    give(x.requires_grad_(), w)
    before = w.detach().clone()
    with refused(opt, TypeError, message):
        opt.step()
    assert_same_bits("w", w.detach(), before)


def test_float32_counts_only_what_trains():
    frozen, w = weight(), weight(dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=r"all 1 trainable parameters are float32.*updated in float32.*adapters"):
        opt = collage.AdamW([("base", frozen.requires_grad_(False)), ("lora", w)])
    give(w)
    opt.step()
    assert opt.state[w]["exp_avg"].dtype == torch.float32
    frozen = weight(dtype=torch.float32).requires_grad_(False)
    with pytest.raises(ValueError, match=r"all 1 trainable parameters are float32.*cast=True"):
        collage.AdamW([("base", frozen), ("lora", w)])


def test_an_upcast_before_the_first_step_is_an_error_then_and_not_silent_float32_training():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).bfloat16()
    opt = collage.AdamW(model.named_parameters())
    model.float()
    give(*model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with refused(opt, ValueError, r"all 4 trainable parameters are float32.*cast after the optimizer was made"):
        opt.step()
    for p, b in zip(model.parameters(), before, strict=True):
        assert_same_bits("weight", p.detach(), b)


def test_an_upcast_of_one_after_steps_is_named(caplog):
    x, w = weight(), weight()
    opt = collage.AdamW([("x", x), ("w", w)])
    give(x, w)
    opt.step()
    x.data, x.grad = x.data.float(), None
    give(x, w)
    with refused(opt, ValueError, r"param 'x': strategy 'fp32' keeps .* was its dtype or its strategy changed"):
        opt.step()


def test_one_upcast_before_the_first_step_is_said_once():
    x, w = weight(), weight()
    opt = collage.AdamW([("x", x), ("w", w)])
    x.data = x.data.float()
    give(x, w)
    with pytest.warns(RuntimeWarning, match=r"1 parameters are float32 .* there were 0:"):
        opt.step()
    opt.step()


def test_a_refused_step_leaves_no_state_behind():
    """Neither of its own group nor of an earlier one: cast back, everything goes on."""
    x, y, z = weight(), weight(), weight()
    opt = collage.AdamW([{"params": [("z", z), ("x", x)]}, {"params": [("y", y)]}])
    give(y, z)
    opt.step()
    for p in (x, y, z):
        p.grad = None
        p.data = p.data.float()
    give(x, y, z)
    with refused(opt, ValueError, "were cast after"):
        opt.step()
    z.grad = None
    z.data = z.data.bfloat16()
    give(z)
    with refused(opt, ValueError, "param 'y'"), pytest.warns(RuntimeWarning, match="2 parameters are"):
        opt.step()
    assert x not in opt.state
    for p in (x, y):
        p.grad = None
        p.data = p.data.bfloat16()
    give(x, y)
    opt.step()
    assert sorted(opt.state[x]) == sorted(opt.state[y])


def test_a_float32_weight_says_what_its_gradient_should_be():
    w = weight(dtype=torch.float32)
    opt = collage.AdamW([("w", w)], strategy="fp32")
    w.grad_dtype = None
    w.grad = torch.ones(8).bfloat16()
    with refused(opt, TypeError, r"param 'w': it is float32 and its gradient bfloat16; use float32 for the"):
        opt.step()


# cast=True


@pytest.mark.parametrize("strategy", LOW)
def test_cast_keeps_what_it_cuts_off(strategy):
    """The planes of float32 weights that are split, as `load_high_precision_state_dict` splits them."""
    torch.manual_seed(0)
    full = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    model = copy.deepcopy(full)
    before = [id(p) for p in model.parameters()]
    model[0].weight.grad = torch.ones(7, 5)
    opt = collage.AdamW(model.named_parameters(), strategy=strategy, cast=True)
    other = copy.deepcopy(full)
    collage.to_bf16(other)
    opt2 = collage.AdamW(other.named_parameters(), strategy=strategy)
    collage.load_high_precision_state_dict(other, opt2, full.state_dict())
    assert before == [id(p) for p in model.parameters()]
    assert model[0].weight.grad is None
    assert model[1].running_mean.dtype == torch.float32
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        give(p, q)
        assert_same_planes(planes(opt, p), planes(opt2, q))
        give(p), give(q)
    opt.step(), opt2.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_planes(planes(opt, p), planes(opt2, q))


def test_cast_takes_groups_added_later_ties_and_strides_and_leaves_the_rest():
    w, tied, frozen = weight((4, 6), torch.float32), weight((3,), torch.float32), weight((3,), torch.float32)
    turned = nn.Parameter(torch.randn(6, 4).t())
    frozen.requires_grad_(False)
    model = nn.ParameterDict({"w": w, "a": tied, "turned": turned, "frozen": frozen})
    model.register_parameter("b", tied)
    opt = collage.AdamW([{"params": [("w", w), ("full", weight(dtype=torch.float32))], "strategy": "fp32"},
                         {"params": [("a", tied), ("frozen", frozen)]}], cast=True)  # fmt: skip
    opt.add_param_group({"params": [("turned", turned)], "strategy": "fp32-master"})
    assert [model[n].dtype for n in ("w", "a", "b", "turned", "frozen")] == [
        torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]  # fmt: skip
    assert turned.stride() == (1, 4) == opt.state[turned]["param_master"].stride()
    assert model["a"] is model["b"]
    copied = copy.deepcopy(opt)
    late = weight(dtype=torch.float32)
    copied.add_param_group({"params": [("late", late)]})
    assert late.dtype == torch.bfloat16


def test_cast_refuses_before_anything_is_cast():
    buffer = torch.zeros(10)
    x, y, z = nn.Parameter(buffer[:5]), nn.Parameter(buffer[5:]), weight(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"param 'x': cast=True would part it from 'y', with which it shares memory"):
        collage.AdamW([("z", z), ("x", x), ("y", y)], cast=True)
    with pytest.raises(ValueError, match="eps"):
        collage.AdamW([{"params": [("z", z)]}, {"params": [("x", x)], "eps": -1}], cast=True)
    with pytest.raises(TypeError, match="got float64"):
        collage.AdamW([("z", z), ("x", weight(dtype=torch.float64))], cast=True)
    assert {p.dtype for p in (x, y, z)} == {torch.float32}


def test_cast_refuses_what_it_would_part_or_make_infinite_and_is_no_setting_of_a_group():
    shared = torch.zeros(4)
    x, frozen = nn.Parameter(shared), nn.Parameter(shared, requires_grad=False)
    with pytest.raises(ValueError, match=r"param 'x': cast=True would part it from 'frozen'"):
        collage.AdamW([("x", x), ("frozen", frozen)], cast=True)
    huge, halves = nn.Parameter(torch.tensor([1.0, 3.4e38])), collage.Strategy("fp16", "fp32", "fp32")
    with pytest.raises(ValueError, match=r"param 'w': 3.4e\+38 is beyond bfloat16's largest number"):
        collage.AdamW([("w", huge)], cast=True)
    with pytest.raises(ValueError, match=r"param 'w': 100000 is beyond float16's largest number, 65504; use bfloat16"):
        collage.AdamW([("w", nn.Parameter(torch.tensor([1e5])))], cast=True, strategy=halves)
    for cast in (True, False):
        with pytest.raises(ValueError, match="cast: one for the whole optimizer"):
            collage.AdamW([{"params": [("w", weight())], "cast": cast}])
    assert {p.dtype for p in (x, frozen, huge)} == {torch.float32}


@pytest.mark.parametrize("theirs", [True, False])
def test_a_state_of_torchs_without_steps_leaves_what_a_cast_cut_off_and_one_of_ours_says_that_there_is_nothing(theirs):
    w = nn.Parameter(torch.full((4,), 1.001))
    saved = (torch.optim.AdamW if theirs else collage.AdamW)([("w", weight((4,)))]).state_dict()
    assert not saved["state"]
    opt = collage.AdamW([("w", w)], cast=True)
    opt.load_state_dict(saved)
    full = collage.high_precision_state_dict(nn.ParameterDict({"w": w}), opt)
    expected = 1.001 if theirs else w.detach()[0].item()
    assert full["w"][0].item() == pytest.approx(expected, rel=2.0**-16)  # half an ulp of the pair


# States by name


def run(params, opt, start, stop):
    for step in range(start, stop):
        for name, p in params.items():
            give(p, seed=step * 100 + ord(name[0]))
        opt.step()


def named(groups):
    """(parameters by name, optimizer). The decay of a group depends on what is in it."""
    params = {name: weight((5,), seed=ord(name)) for name in itertools.chain.from_iterable(groups)}
    listed = [
        {"params": [(n, params[n]) for n in names], "weight_decay": 0.2 if "a" in names else 0.1} for names in groups
    ]
    return params, collage.AdamW(listed, lr=1e-2, strategy="collage-plus-sr")


@pytest.mark.parametrize(
    ("saved", "here"),
    [([["a", "b", "c"]], [["c", "a", "b"]]), ([["a"], ["b", "c"]], [["c", "b"], ["a"]])],
    ids=["in a group", "groups too"],
)
def test_another_order_is_found_by_name(saved, here):
    """Moments of equal shapes would be swapped in silence; settings go with the groups."""
    params, opt = named(saved)
    run(params, opt, 0, 3)
    state, weights = copy.deepcopy(opt.state_dict()), {n: p.detach().clone() for n, p in params.items()}
    run(params, opt, 3, 5)
    others, opt2 = named(here)
    for name, p in others.items():
        p.data.copy_(weights[name])
    opt2.load_state_dict(state)
    run(others, opt2, 3, 5)
    for name in params:
        assert_same_planes(planes(opt, params[name]), planes(opt2, others[name]))
    assert [group["param_names"] for group in opt2.param_groups] == here


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ([["a", "b", "d"]], r"Only in the state: 'c'; only in this optimizer: 'd'"),
        ([["a", "b"]], r"Only in the state: 'c'; only in this optimizer: none"),
        ([["a", "b", "c", "d"]], r"Only in the state: none; only in this optimizer: 'd'"),
    ],
)
def test_other_names_are_an_error_that_shows_both(here, message):
    params, opt = named([["a", "b", "c"]])
    run(params, opt, 0, 1)
    _, opt2 = named(here)
    with refused(opt2, ValueError, message):
        opt2.load_state_dict(opt.state_dict())
    assert not opt2.state


def test_other_groups_of_the_same_names_are_an_error():
    params, opt = named([["a"], ["b", "c"]])
    run(params, opt, 0, 1)
    _, opt2 = named([["a", "b"], ["c"]])
    with refused(opt2, ValueError, r"param_groups\[0\]: it has the parameters 'a', 'b', and no group"):
        opt2.load_state_dict(opt.state_dict())


def test_names_on_one_side_only_are_matched_by_position_and_shapes_say_both():
    x, y = weight((3,)), weight((4,))
    opt = collage.AdamW([("x", x), ("y", y)])
    give(x, y)
    opt.step()
    unnamed = collage.AdamW([y, x])
    with refused(unnamed, ValueError, r"param '0 \(saved as x\)': param_lo has shape \(3,\).*start its state anew"):
        unnamed.load_state_dict(opt.state_dict())
    unnamed = collage.AdamW([x, y])
    unnamed.load_state_dict(opt.state_dict())
    ours = collage.AdamW([("p", x), ("q", y)])
    state = copy.deepcopy(opt.state_dict())
    del state["param_groups"][0]["param_names"]
    ours.load_state_dict(state)
    assert ours.param_groups[0]["param_names"] == ["p", "q"]


@pytest.mark.parametrize("size", [1, 3])
def test_an_unequal_count_without_names_is_torchs_own_error(size):
    x, y, z = weight((3,)), weight((3,)), weight((7,))
    opt = collage.AdamW([x, y])
    give(x, y)
    opt.step()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        collage.AdamW([z, x, y][:size]).load_state_dict(opt.state_dict())


# Settings


def test_numbers_of_numpy_become_pythons(tmp_path):
    w = weight()
    opt = collage.AdamW(
        [("w", w)], lr=np.float32(0.5), betas=[np.float64(0.5), 0], eps=np.array(1e-3), seed=np.int64(3)
    )
    give(w)
    opt.step()
    opt.param_groups[0]["lr"] = np.float64(0.25)  # as a schedule of one's own sets it
    opt.step()
    group = opt.param_groups[0]
    assert [type(group[k]) for k in ("lr", "eps", "seed")] == [float, float, int]
    assert group["betas"] == (0.5, 0.0)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    assert torch.load(tmp_path / "opt.pt", weights_only=True)["param_groups"][0]["lr"] == 0.25


def test_settings_of_torch_that_are_off_are_taken_and_those_that_are_on_refused_in_groups_too():
    off = {"foreach": False, "fused": None, "differentiable": False}
    given = {"params": [weight()], **off}
    opt = collage.AdamW([given], **off)
    assert not off.keys() & opt.param_groups[0].keys()
    with pytest.raises(TypeError, match="AdamW: cannot take fused=True"):
        collage.AdamW([{"params": [weight()], "fused": True}])


def test_a_state_without_a_later_setting_and_with_an_int_step_loads():
    w = weight()
    opt = collage.AdamW([("w", w)], seed=5)
    give(w)
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    for key in ("seed", "capturable", "maximize"):
        del state["param_groups"][0][key]
    state["state"][0]["step"] = 1
    other = collage.AdamW([("w", w)], seed=9)
    other.load_state_dict(state)
    assert (other.param_groups[0]["seed"], other.param_groups[0]["maximize"]) == (9, False)
    assert_same_bits("step", other.state[w]["step"], opt.state[w]["step"])
    other.step()


@pytest.mark.parametrize("start", [1 / 3, 0.1])
def test_a_schedule_may_end_a_rounding_below_zero(start):
    """LinearLR multiplies its way down to end_factor=0, and ends at -1e-20 as often as not."""
    w = weight()
    opt = collage.AdamW([("w", w)], lr=1e-3)
    below = 0
    for total in range(2, 60):
        opt.param_groups[0]["lr"] = opt.param_groups[0]["initial_lr"] = 1e-3
        schedule = torch.optim.lr_scheduler.LinearLR(opt, start_factor=start, end_factor=0.0, total_iters=total)
        for _ in range(total + 1):
            give(w)
            opt.step()
            schedule.step()
        below += opt.param_groups[0]["lr"] < 0
    assert below > 0


def test_a_step_without_any_gradient_says_so_once():
    opt = collage.AdamW([("w", weight())])
    with pytest.warns(RuntimeWarning, match="no parameter has a gradient"):
        opt.step()
    opt.step()


# States taken away


@pytest.mark.parametrize("strategy", ["collage-plus", "fp32-master", "kahan"])
def test_reset_moments_keeps_the_components_that_clearing_the_state_loses(strategy):
    x, w = weight(seed=1), weight()
    opt = collage.AdamW([("x", x), ("w", w)], lr=1e-5, strategy=strategy)
    for step in range(3):
        give(x, w, seed=step)
        opt.step()
    before = collage.high_precision_state_dict(nn.ParameterDict({"w": w}), opt)["w"]
    opt.reset_moments()
    after = collage.high_precision_state_dict(nn.ParameterDict({"w": w}), opt)["w"]
    assert_same_bits("the weights", after, before)
    moments = [v for k, v in opt.state[w].items() if not k.startswith("param")]
    assert all((m == 0).all() for m in moments)
    opt.state.clear()
    with pytest.warns(RuntimeWarning, match=r"state of 'x' and 1 more was cleared.*reset_moments"):
        opt.step()


def test_a_state_that_goes_with_its_weights_is_no_loss():
    w = weight()
    opt = collage.AdamW([("w", w)])
    give(w)
    opt.step()
    opt.state.pop(w)
    w.data = torch.ones(20).bfloat16()
    w.grad = torch.ones(20).bfloat16()
    opt.step()
    opt.load_state_dict({**opt.state_dict(), "state": {}})
    opt.step()


def test_a_layer_taken_out_of_a_group_is_an_error_that_says_how():
    x, w = weight(), weight()
    opt = collage.AdamW([("x", x), ("w", w)])
    del opt.param_groups[0]["params"][0]
    give(w)
    with refused(opt, ValueError, r"1 parameters and 2 names.*out of 'params' and 'param_names' together"):
        opt.step()
    del opt.param_groups[0]["param_names"][0]
    opt.step()


def test_a_resized_weight_is_named_by_all_that_read_its_state():
    emb = nn.Embedding(4, 8).bfloat16()
    opt = collage.AdamW(emb.named_parameters())
    give(emb.weight)
    opt.step()
    emb.weight.data, emb.weight.grad = torch.ones(6, 8).bfloat16(), None
    for read in (
        opt.resync,
        lambda: collage.high_precision_state_dict(emb, opt),
        lambda: collage.load_high_precision_state_dict(emb, opt, {"weight": torch.ones(6, 8)}),
        lambda: collage.EMA(emb, 0.9, optimizer=opt),
    ):
        with pytest.raises(ValueError, match=r"param 'weight': param_lo has shape \(4, 8\), .* start its state anew"):
            read()


def test_warnings_point_at_the_users_line():
    opt = collage.AdamW([("w", weight())])
    with pytest.warns(RuntimeWarning, match="no parameter has a gradient") as told:
        opt.step()
    assert told[0].filename == __file__


# One optimizer per parameter


def test_optimizers_that_take_turns_with_unnamed_parameters_are_told_that_they_share_bits():
    x, y = weight(), weight()
    optimizers = [collage.AdamW([p], strategy="collage-plus-sr") for p in (x, y)]
    give(x, y)
    for opt in optimizers:
        opt.step()
    with pytest.warns(RuntimeWarning, match=r"unnamed parameters of two optimizers.*\[\(name, p\)\]"):
        optimizers[0].step()
    for opt in optimizers:
        opt.step()  # once


@pytest.mark.parametrize("apart", ["names", "seeds", "nearest", "one after another"])
def test_and_others_are_not(apart):
    x, y = weight(), weight()
    given = [[("x", x)], [("y", y)]] if apart == "names" else [[x], [y]]
    strategy = "collage-plus" if apart == "nearest" else "collage-plus-sr"
    optimizers = [collage.AdamW(p, strategy=strategy, seed=k * (apart == "seeds")) for k, p in enumerate(given)]
    give(x, y)
    order = [0, 0, 0, 1, 1, 1] if apart == "one after another" else [0, 1, 0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in order:
            optimizers[k].step()
    if apart == "names":
        assert (opt_bits(optimizers[0], x) != opt_bits(optimizers[1], y)).any()


def opt_bits(opt, p):
    return opt.state[p]["exp_avg"]


def test_a_parameter_of_a_dropped_group_is_not_kept_alive():
    w, x = weight((1000,)), weight()
    opt = collage.AdamW([{"params": [("w", w)]}, {"params": [("x", x)]}])
    for step in range(3):
        give(w, x)
        if step == 1:
            w.grad = None
        opt.step()
    gone = weakref.ref(w)
    opt.state.pop(w)
    del opt.param_groups[0], w
    x.grad = torch.ones(8).bfloat16()
    opt.step()
    gc.collect()
    assert gone() is None
