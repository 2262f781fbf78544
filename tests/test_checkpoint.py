"""Nothing is lost: state_dict round trips, torch's own states, float32 weights in and out, a resumed run."""

import copy
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import BARE, assert_same_bits, assert_same_planes, refused
from torch import nn

import collage
from collage.strategies import STRATEGIES


def model_of(strategy="collage-plus"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))
    for p in model.parameters():
        p.data = p.data.to(STRATEGIES[strategy].dtype)
    return model


def run(model, opt, start, stop):
    for step in range(start, stop):
        g = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        opt.step()


def planes(model, opt):
    return {
        f"{name}.{key}": value
        for name, p in model.named_parameters()
        for key, value in {"theta": p.detach(), **opt.state[p]}.items()
    }


SCRIPT = """
import sys
folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
from test_checkpoint import *
for strategy in BARE:
    model = model_of(strategy)
    opt = collage.AdamW(model.named_parameters(), lr=1e-2, strategy=strategy)
    saved = torch.load(f"{folder}/{strategy}.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    run(model, opt, 4, 7)
    torch.save(planes(model, opt), f"{folder}/{strategy}.done.pt")
"""


def test_a_run_resumed_in_another_process_is_the_run(tmp_path):
    """Every strategy: 4 steps, save, a new process, load, 3 steps; bit for bit the run of 7."""
    straight = {}
    for strategy in BARE:
        model = model_of(strategy)
        opt = collage.AdamW(model.named_parameters(), lr=1e-2, strategy=strategy)
        run(model, opt, 0, 4)
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / f"{strategy}.pt")
        run(model, opt, 4, 7)
        straight[strategy] = planes(model, opt)
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), str(Path(__file__).parent)], check=True)
    for strategy, want in straight.items():
        assert_same_planes(torch.load(tmp_path / f"{strategy}.done.pt", weights_only=True), want)


def test_an_empty_state_loads():
    model = model_of()
    opt = collage.AdamW(model.parameters())
    opt.load_state_dict(opt.state_dict())
    run(model, opt, 0, 1)


def test_settings_that_change_numerics_come_back():
    opt = collage.AdamW(model_of("stochastic").parameters(), strategy="stochastic", seed=7, lr=0.5)
    other = collage.AdamW(model_of("stochastic").parameters(), strategy="stochastic")
    other.load_state_dict(opt.state_dict())
    assert (other.param_groups[0]["seed"], other.param_groups[0]["lr"]) == (7, 0.5)


def test_another_strategy_is_refused_and_nothing_changes():
    model = model_of()
    saved = collage.AdamW(model.named_parameters(), strategy="collage-light")
    run(model, saved, 0, 1)
    opt = collage.AdamW(model.named_parameters(), strategy="collage-plus")
    opt.resync()
    run(model, opt, 0, 1)
    with refused(opt, ValueError, r"param_groups\[0\]: .*'collage-light'.*'collage-plus' \(variance: saved bf16"):
        opt.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["state"][0].pop("param_lo"), "param '0.weight': strategy 'collage-plus' keeps step, param_lo"),
        (lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"].float()), r"exp_avg \(float32\)"),
        (lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"][:2]), "exp_avg has shape"),
    ],
)
def test_a_damaged_state_is_refused(damage, message):
    model = model_of()
    opt = collage.AdamW(model.named_parameters())
    run(model, opt, 0, 1)
    saved = copy.deepcopy(opt.state_dict())
    damage(saved)
    with refused(opt, ValueError, message):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("strategy", BARE)
def test_the_optimizer_may_be_loaded_before_the_model(strategy):
    """As torch.distributed.checkpoint.state_dict.set_state_dict does: bit for bit the run, and nothing is said."""
    model = model_of(strategy)
    opt = collage.AdamW(model.named_parameters(), lr=1e-2, strategy=strategy)
    run(model, opt, 0, 4)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    run(model, opt, 4, 6)
    other = model_of(strategy)
    opt2 = collage.AdamW(other.named_parameters(), strategy=strategy)
    opt2.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    run(other, opt2, 4, 6)
    assert_same_planes(planes(other, opt2), planes(model, opt))


def test_a_state_of_other_weights_gives_way_to_them_with_a_warning():
    model = model_of("fp32-master")
    opt = collage.AdamW(model.named_parameters(), lr=1e-3, strategy="fp32-master")
    run(model, opt, 0, 2)
    saved = copy.deepcopy(opt.state_dict())
    with torch.no_grad():
        model[0].weight.mul_(2)
    before = model[0].weight.detach().clone()
    opt.load_state_dict(saved)
    with pytest.warns(RuntimeWarning, match=r"changed outside the optimizer: '0.weight' \(72 of 72 weights\).*another"):
        run(model, opt, 2, 3)
    assert (model[0].weight - before).abs().max() < 0.02


@pytest.mark.parametrize("strategy", BARE)
@pytest.mark.parametrize("fused", [False, True])
def test_a_torch_adamw_state_is_taken_over(strategy, fused):
    """Switch in midway: the moments are split into the strategy's planes, hyper-parameters come along."""
    model = model_of("fp32")
    theirs = torch.optim.AdamW(model.parameters(), lr=0.25, betas=(0.8, 0.99), fused=fused)
    run(model, theirs, 0, 3)
    moments = {name: theirs.state[p] for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = p.data.to(STRATEGIES[strategy].dtype)
    opt = collage.AdamW(model.named_parameters(), strategy=strategy)
    opt.load_state_dict(theirs.state_dict())
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["strategy"]) == (0.25, (0.8, 0.99), strategy)
    assert "fused" not in group
    precision = {"fp32": 0.0, "bf16": 2.0**-8, "bf16:sr": 2.0**-8, "bf16x2": 2.0**-16, "bf16x2:sr": 2.0**-16}
    for name, p in model.named_parameters():
        mine = opt.state[p]
        assert int(mine["step"]) == 3
        v = mine["exp_avg_sq"].float() + (mine["exp_avg_sq_lo"].float() if "exp_avg_sq_lo" in mine else 0)
        error = (v - moments[name]["exp_avg_sq"]).abs() / moments[name]["exp_avg_sq"]
        assert error.max() <= precision[STRATEGIES[strategy].of(p.shape).variance]
    run(model, opt, 3, 4)


@pytest.mark.parametrize("strategy", ["collage-plus", "fp32-master", "kahan"])
def test_a_torch_state_leaves_the_components_of_float32_weights_alone(strategy):
    """The way over from torch: its weights in float32, then its moments."""
    full = model_of("fp32")
    theirs = torch.optim.AdamW(full.parameters())
    run(full, theirs, 0, 1)
    model = model_of(strategy)
    opt = collage.AdamW(model.named_parameters(), strategy=strategy)
    collage.load_high_precision_state_dict(model, opt, full.state_dict())
    before = collage.high_precision_state_dict(model, opt)
    opt.load_state_dict(theirs.state_dict())
    after = collage.high_precision_state_dict(model, opt)
    for key in before:
        assert_same_bits(key, after[key], before[key])
    assert any((after[name] != p.float()).any() for name, p in model.named_parameters())
    assert int(opt.state[model[0].weight]["step"]) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad=True"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "Adam's with weight_decay=0.1"),
        (torch.optim.NAdam, "momentum_decay, as NAdam"),
        (torch.optim.RAdam, "no setting amsgrad"),
        (torch.optim.RMSprop, "needs step, exp_avg, exp_avg_sq, and has square_avg, step"),
        (torch.optim.Adamax, "needs step, exp_avg, exp_avg_sq, and has exp_avg, exp_inf, step"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "needs step, exp_avg, exp_avg_sq, and has momentum_buffer"),
    ],
)
def test_other_rules_of_torch_are_refused(make, message):
    model = model_of("fp32")
    theirs = make(model.parameters())
    run(model, theirs, 0, 1)
    opt = collage.AdamW(model.parameters(), strategy="fp32")
    with refused(opt, ValueError, rf"param_groups\[0\]: .* not one of torch.optim.AdamW: .*{message}"):
        opt.load_state_dict(theirs.state_dict())


def test_adam_without_decay_is_adamw():
    model = model_of("fp32")
    theirs = torch.optim.Adam(model.parameters())
    run(model, theirs, 0, 1)
    opt = collage.AdamW(model.parameters(), strategy="fp32")
    opt.load_state_dict(theirs.state_dict())
    assert opt.param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.clear(), "state_dict: needs 'state' .* and 'param_groups'"),
        (lambda s: s["param_groups"][0].pop("params"), "state_dict: needs 'state' .* and 'param_groups'"),
        (lambda s: s["state"].update({0: 1}), "state_dict: needs 'state' .* and 'param_groups'"),
        (lambda s: s["state"][0].update(step="3"), "param '0.weight': step needs to be a tensor, got '3'"),
        (lambda s: s["state"][0].update(step=torch.tensor(-1)), "param '0.weight': step needs one whole number >= 0"),
        (lambda s: s["state"][0].update(step=torch.tensor([1, 2])), "param '0.weight': step needs one whole number"),
        (lambda s: s["state"][0].update(exp_avg=None), "param '0.weight': exp_avg needs to be a tensor, got None"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(1)), r"param '0.weight': exp_avg has shape \(1,\)"),
    ],
)
def test_a_malformed_state_is_refused(ours, damage, message):
    model = model_of("fp32")
    opt = collage.AdamW(model.named_parameters(), strategy="fp32")
    theirs = opt if ours else torch.optim.AdamW(model.named_parameters())
    run(model, theirs, 0, 1)
    saved = copy.deepcopy(theirs.state_dict())
    damage(saved)
    with refused(opt, ValueError, message):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("strategy", ["collage-plus", "fp32-master", "kahan", "paper-light"])
def test_float32_weights_go_in_and_come_out(strategy):
    """bf16x2 holds 16 bits of a float32; the master holds all of them."""
    full = model_of("fp32").state_dict()
    model = model_of(strategy)
    opt = collage.AdamW(model.named_parameters(), strategy=strategy)
    collage.load_high_precision_state_dict(model, opt, full)
    back = collage.high_precision_state_dict(model, opt)
    assert back.keys() == full.keys()
    model_of("fp32").load_state_dict(back, strict=True)
    for key, value in full.items():
        assert back[key].dtype == value.dtype
        error = ((back[key] - value).abs() / value.abs().clamp(min=1e-30)).max().item()
        assert error <= (0.0 if strategy == "fp32-master" else 2.0**-16)  # half an ulp of the second component
    for p, value in zip(model.parameters(), [full[n] for n, _ in model.named_parameters()], strict=True):
        assert_same_bits("theta", p.detach(), value.bfloat16())
    run(model, opt, 0, 1)


def test_high_precision_weights_are_more_than_the_visible_ones():
    model = model_of()
    opt = collage.AdamW(model.named_parameters(), lr=1e-4)
    run(model, opt, 0, 3)
    full = collage.high_precision_state_dict(model, opt)
    assert any((full[name] != p.float()).any() for name, p in model.named_parameters())
    assert full["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), r"missing keys \['0.bias'\]"),
        (lambda s: s.update(extra=torch.ones(1)), r"unexpected keys \['extra'\]"),
        (
            lambda s: s.update({"0.bias": torch.ones(3)}),
            r"state_dict\['0.bias'\]: has shape \(3,\), the model's is \(12,\)",
        ),
    ],
)
def test_a_wrong_state_dict_is_refused_before_anything_changes(change, message):
    model = model_of()
    opt = collage.AdamW(model.named_parameters())
    run(model, opt, 0, 1)
    before = copy.deepcopy(planes(model, opt))
    full = {k: v + 1 for k, v in collage.high_precision_state_dict(model, opt).items()}
    change(full)
    with pytest.raises(ValueError, match=message):
        collage.load_high_precision_state_dict(model, opt, full)
    assert_same_planes(before, planes(model, opt))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.lm_head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.wte.weight


@pytest.mark.parametrize("stored", ["wte.weight", "lm_head.weight"])
def test_tied_weights_may_be_stored_once(stored):
    model = Tied().bfloat16()
    opt = collage.AdamW(model.named_parameters())
    full = {stored: torch.randn(5, 3, generator=torch.Generator().manual_seed(0))}
    collage.load_high_precision_state_dict(model, opt, full)
    for value in collage.high_precision_state_dict(model, opt).values():
        assert torch.allclose(value, full[stored], rtol=2.0**-16, atol=0)
    with pytest.raises(ValueError, match="missing keys"):
        collage.load_high_precision_state_dict(model, opt, {})


def test_the_optimizer_must_be_one_of_ours_and_of_this_model():
    model = model_of()
    full = collage.high_precision_state_dict(model, collage.AdamW(model.named_parameters()))
    for opt, error, message in (
        (collage.AdamW(model_of().named_parameters()), ValueError, "none of the model's .* not even '0.weight'"),
        (torch.optim.AdamW(model.parameters()), TypeError, r"needs one of this package.*got torch\.optim.*AdamW"),
    ):
        with pytest.raises(error, match=message):
            collage.load_high_precision_state_dict(model, opt, full)
        with pytest.raises(error, match=message):
            collage.high_precision_state_dict(model, opt)
    some = collage.AdamW([p for name, p in model.named_parameters() if name.startswith("2.")])
    collage.load_high_precision_state_dict(model, some, full)  # the others are frozen


def test_weights_changed_outside_are_not_saved_and_it_is_said_once(caplog):
    model = model_of("fp32-master")
    opt = collage.AdamW(model.named_parameters(), strategy="fp32-master")
    run(model, opt, 0, 1)
    with torch.no_grad():
        model[0].weight.fill_(3.0)
        model[2].weight[0, :2] = 3.0
    before = copy.deepcopy(planes(model, opt))
    with pytest.warns(RuntimeWarning, match=r"'0.weight' \(72 of 72 weights\), '2.weight' \(2 of 36 weights\)"):
        full = collage.high_precision_state_dict(model, opt)
    assert (full["0.weight"] == 3.0).all()
    assert_same_planes(before, planes(model, opt))  # an export leaves the state as it is
    collage.high_precision_state_dict(model, opt)
    run(model, opt, 1, 2)  # it has been said
    loaded = copy.deepcopy((model, opt))
    with torch.no_grad():
        loaded[0][0].weight[0, :5] = 4.0
    with caplog.at_level(logging.INFO, logger="collage"):
        for _ in range(2):  # without a step before
            collage.high_precision_state_dict(*loaded)
        run(*loaded, 2, 3)
    assert len([m for m in caplog.messages if "'0.weight' (5 of 72 weights); taken as they are now" in m]) == 1


@pytest.mark.parametrize("strategy", ["collage-plus", "collage-light", "collage-plus-sr"])
def test_one_value_in_a_thousand_is_a_tie(strategy):
    """There lo is half an ulp of an odd hi: about 2**-10 of all. Of 500,000 values the deviation is 4.5 % of that."""
    w = nn.ParameterDict({"w": torch.randn(500_000, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()})
    opt = collage.AdamW(w.named_parameters(), strategy=strategy)
    for step in range(10):
        w["w"].grad = torch.randn(500_000, generator=torch.Generator().manual_seed(step)).bfloat16()
        opt.step()
    hi, lo = w["w"].detach().float(), opt.state[w["w"]]["param_lo"].float()
    full = collage.high_precision_state_dict(w, opt)["w"]
    other = full.bfloat16().float() != hi
    assert other.float().mean().item() == pytest.approx(2.0**-10, rel=0.2)
    ulp = hi.abs().frexp().exponent.sub(8).float().exp2()
    assert (lo.abs() == ulp / 2)[other].all()
    collage.load_high_precision_state_dict(w, opt, {"w": full})
    assert_same_bits("the value", collage.high_precision_state_dict(w, opt)["w"], full)


def test_several_optimizers():
    model, whole = model_of(), model_of()
    params = dict(model.named_parameters())
    split = [
        collage.AdamW([(n, p) for n, p in params.items() if n.startswith("0")], lr=1e-2),
        collage.AdamW([(n, p) for n, p in params.items() if not n.startswith("0")], lr=1e-2, strategy="fp32-master"),
    ]
    opt = collage.AdamW(
        [{"params": [(n, p) for n, p in whole.named_parameters() if n.startswith("0")]},
         {"params": [(n, p) for n, p in whole.named_parameters() if not n.startswith("0")], "strategy": "fp32-master"}],
        lr=1e-2,
    )  # fmt: skip
    run(whole, opt, 0, 3)
    for step in range(3):
        run(model, split[0], step, step + 1)
        split[1].step()
    want = collage.high_precision_state_dict(whole, opt)
    assert_same_planes(collage.high_precision_state_dict(model, split), want)
    shifted = {key: value * (1 + 2.0**-12) if value.is_floating_point() else value for key, value in want.items()}
    collage.load_high_precision_state_dict(model, tuple(split), shifted)
    collage.load_high_precision_state_dict(whole, opt, shifted)
    assert_same_planes(collage.high_precision_state_dict(model, split), collage.high_precision_state_dict(whole, opt))
    with pytest.raises(ValueError, match="two of those given have param '0"):
        collage.high_precision_state_dict(model, [split[0], split[0]])
    with pytest.raises(ValueError, match="needs the one that trains the model, or all of them; got none"):
        collage.high_precision_state_dict(model, [])


def test_trained_weights_without_an_optimizer_do_not_lose_their_tails_in_silence(caplog):
    model = model_of()
    opt = collage.AdamW([(n, p) for n, p in model.named_parameters() if n.startswith("2.")])
    with pytest.raises(ValueError, match=r"has none of '0.weight' and 3 more, which are trained, .* give every optim"):
        collage.high_precision_state_dict(model, opt)
    rest = collage.AdamW([(n, p) for n, p in model.named_parameters() if not n.startswith("2.")])
    full = {key: value * (1 + 2.0**-12) if value.is_floating_point() else value for key, value in
            collage.high_precision_state_dict(model, [opt, rest]).items()}  # fmt: skip
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has none of '0.weight' and 2 more, which are trained, .* give every optim"):
        collage.load_high_precision_state_dict(model, opt, full)
    assert_same_planes(before, model.state_dict())
    assert not opt.state
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    with caplog.at_level(logging.INFO, logger="collage"):
        collage.load_high_precision_state_dict(model, opt, full)
    assert "rounded to their own dtype: '0.weight' and 2 more; frozen" in caplog.text
    assert_same_bits("frozen", model[0].weight.detach(), full["0.weight"].bfloat16())
    for p in model.parameters():
        p.requires_grad_(True)
    rounded = {k: v.bfloat16().float() if k[0] != "2" and v.is_floating_point() else v for k, v in full.items()}
    rounded["0.weight"][0, 0] = torch.nan
    collage.load_high_precision_state_dict(model, opt, rounded)  # nothing to lose


def test_trained_weights_that_the_state_dict_does_not_show_are_an_error():
    """As FSDP1 gathers its flat parameters: the components would have no key."""
    model = model_of()
    opt = collage.AdamW(model.named_parameters())
    full = collage.high_precision_state_dict(model, opt)
    hook = model.register_state_dict_post_hook(lambda m, state, *_: state.update({"2.bias": state["2.bias"] + 0}))
    collage.high_precision_state_dict(model, opt)  # has no components yet
    before = copy.deepcopy(planes(model, opt))
    with pytest.raises(ValueError, match=r"other tensors in the place of '2.bias' .*FSDP1.*fully_shard"):
        collage.load_high_precision_state_dict(model, opt, full)
    assert_same_planes(before, planes(model, opt))
    run(model, opt, 0, 1)
    with pytest.raises(ValueError, match=r"other tensors in the place of '2\.bias'"):
        collage.high_precision_state_dict(model, opt)
    hook.remove()
    collage.high_precision_state_dict(model, opt)


def test_weights_that_were_replaced_under_the_optimizer_are_an_error():
    model = model_of()
    opt = collage.AdamW(model.named_parameters())
    nn.utils.parametrizations.weight_norm(model[2])
    parametrized = collage.AdamW(model.named_parameters())
    run(model, parametrized, 0, 1)
    full = collage.high_precision_state_dict(model, parametrized)
    assert full["2.parametrizations.weight.original0"].dtype == torch.float32
    nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    with pytest.raises(
        ValueError, match=r"has none of '2.weight', and trains '2.parametriz.* and 1 more, which the mod"
    ):
        collage.high_precision_state_dict(model, parametrized)
    del opt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_cast_after_the_optimizer_was_made_are_not_exported_without_their_tails(dtype):
    model = model_of()
    opt = collage.AdamW(model.named_parameters())
    run(model, opt, 0, 1)
    want = collage.high_precision_state_dict(model, opt)
    model[0].weight.data = model[0].weight.data.to(dtype)
    with pytest.raises((TypeError, ValueError), match=r"param '0.weight': .*p.data = p.data.to"):
        collage.high_precision_state_dict(model, opt)
    if dtype == torch.float32:
        model[0].weight.data = model[0].weight.data.bfloat16()  # as the message says
        assert_same_planes(collage.high_precision_state_dict(model, opt), want)


class Versioned(nn.Module):
    """Reads by its version what it loads, and keeps an entry of its own of any length."""

    _version = 2

    def __init__(self, n=1):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3).bfloat16())
        self.scale = nn.Parameter(torch.tensor(1 / 3, dtype=torch.float64), requires_grad=False)
        self.extra = torch.arange(n)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_versions_extra_entries_and_float64_weights_come_along(tmp_path):
    model, other = Versioned(3), Versioned(5)
    opt, opt2 = collage.AdamW(model.named_parameters()), collage.AdamW(other.named_parameters())
    for p in (model.w, other.w):
        p.grad = torch.ones_like(p)
    opt.step()
    torch.save(collage.high_precision_state_dict(model, opt), tmp_path / "full.pt")
    full = torch.load(tmp_path / "full.pt", weights_only=True)
    assert full["scale"].dtype == torch.float64
    collage.load_high_precision_state_dict(other, opt2, full)
    assert_same_planes(collage.high_precision_state_dict(other, opt2), full)
    assert other.extra.tolist() == [0, 1, 2]
    for key, value in (("w", torch.ones(3, dtype=torch.int8)), ("w", [1.0]), ("scale", torch.tensor(1j))):
        with pytest.raises(ValueError, match=rf"state_dict\['{key}'\]: is (int8|list|complex64), the model's is"):
            collage.load_high_precision_state_dict(other, opt2, full | {key: value})


@pytest.mark.parametrize("strategy", ["collage-plus", "fp32-master", "kahan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_import_in_the_middle_of_a_run_is_no_edit(strategy, dtype):
    """Gradients are there, and a monitor: no step warns, nothing counts as edited, the shadow goes on from it."""
    model = model_of(strategy)
    opt = collage.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.5, strategy=strategy)
    mon = collage.monitor(opt, every=1, shadow=1)
    run(model, opt, 0, 2)
    full = {k: (v * 1000).to(dtype) if v.is_floating_point() else v for k, v in model_of("fp32").state_dict().items()}
    collage.load_high_precision_state_dict(model, opt, full)
    for key, value in collage.high_precision_state_dict(model, opt).items():
        assert torch.allclose(value.double(), full[key].double(), rtol=2.0**-16, atol=0)  # two components of 8 bits
    mon.reset()
    opt.step()
    run(model, opt, 2, 4)
    total = mon.report().total
    assert total.edited == 0
    assert total.edq_shadow == pytest.approx(1.0, abs=0.01)  # 75 from the old weights: 1000 times less decay


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_that_prefix_names(wrap):
    """The keys are those of the module that is given; whose weights they are is a matter of identity."""
    model = model_of()
    opt = collage.AdamW(model.named_parameters())
    run(model, opt, 0, 1)
    inner, outer = (collage.high_precision_state_dict(m, opt) for m in (model, wrap(model)))
    assert list(outer) == list(wrap(model).state_dict())
    assert_same_planes({key.partition(".")[2]: value for key, value in outer.items()}, dict(inner))
    collage.load_high_precision_state_dict(wrap(model), opt, outer)
    with pytest.raises(ValueError, match="unexpected keys"):
        collage.load_high_precision_state_dict(model, opt, outer)


def test_a_frozen_quantised_weight_beside_trained_ones():
    model = model_of()
    model.codes = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    model.packed = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    opt = collage.AdamW(model.named_parameters())
    full = collage.high_precision_state_dict(model, opt)
    assert (full["codes"].dtype, full["packed"].dtype) == (torch.float32, torch.int8)
    collage.load_high_precision_state_dict(model, opt, full)
