"""States of one strategy loaded under another: `load_state_dict(convert=True)`."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, assert_same_planes, planes_of, refused
from test_convert import run
from torch import nn

import collage
from collage.backends import reference
from collage.formats import format_of
from collage.strategies import STRATEGIES, Strategy

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {}, "Adam": {"amsgrad": True}, "SGD": {"momentum": 0.9}, "Lion": {}, "Muon": {"adamw": {"lr": 3e-4}},
}  # fmt: skip
EACH = ["bf16", "collage-plus", "collage-fp16", "kahan", "collage-exact", "fp32-master", "collage-8bit", "fp32"]


def model_of(strategy: str, beside: bool = False) -> nn.Module:
    """Two parameters with blocks of their own, three small ones; beside: a float32 one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64, bias=False))
    model.to(Strategy.parse(strategy).dtype)
    if beside:
        model[1].weight.data = model[1].weight.data.float()
    return model


def optimizer_of(name: str, model: nn.Module, strategy: str, **settings: Any) -> Any:
    return getattr(collage, name)(
        model.named_parameters(), **{"lr": 1e-3, "strategy": strategy, **OPTIMIZERS[name]} | settings
    )


def trained(strategy: str, name: str = "AdamW", steps: int = 3, beside: bool = False) -> tuple[nn.Module, Any]:
    model = model_of(strategy, beside)
    opt = optimizer_of(name, model, strategy)
    run(model, opt, steps)
    return model, opt


def converted(
    model: nn.Module, opt: Any, strategy: str, name: str = "AdamW", beside: bool = False
) -> tuple[Any, Any, Any]:
    """A model and an optimizer under the strategy, which have taken over the others' weights and state."""
    other = model_of(strategy, beside)
    theirs = optimizer_of(name, other, strategy)
    other.load_state_dict(model.state_dict())
    return other, theirs, theirs.load_state_dict(copy.deepcopy(opt.state_dict()), convert=True)


def decoded(opt: Any) -> dict[str, tuple[str, tuple[torch.Tensor, ...]]]:
    """The format and the planes of every slot of every parameter."""
    found = {}
    for parameter in opt.parameters():
        rule, formats = (
            opt.rule_of(parameter.group),
            opt.strategy_of(parameter).formats(opt.rule_of(parameter.group).roles),
        )
        for prefix, fmt, planes in zip(rule.prefixes, formats, opt.planes(parameter), strict=True):
            found[f"{parameter.name}.{prefix}"] = fmt, tuple(p.detach() for p in planes)
    return found


def values(opt: Any) -> dict[str, torch.Tensor]:
    """The float32 number of every slot of every parameter, by the reference backend."""
    found = {}
    for key, (fmt, planes) in decoded(opt).items():
        found[key] = torch.empty(planes[0].shape)
        reference.decode(fmt, [planes], [found[key]])
    return found


def assert_taken_over(old: Any, new: Any) -> None:
    """Every number is the old one, rounded once to its new format, and every counter the old one's."""
    wanted = values(old)
    for key, (fmt, planes) in decoded(new).items():
        got = torch.empty(planes[0].shape)
        reference.decode(fmt, [planes], [got])
        ulp = torch.maximum(format_of(fmt).spacing(planes).float(), wanted[key].abs() * 2.0**-23)  # decoding rounds too
        off = ((got - wanted[key]).abs() / ulp).max()
        assert off <= 0.75, f"{key} in {fmt}: off by {off:.2f} ulp"
    for ours, theirs in zip(old.parameters(), new.parameters(), strict=True):
        assert_same_bits(ours.name, new.state[theirs.tensor]["step"], old.state[ours.tensor]["step"])


PAIRS = [
    pytest.param(a, b, marks=() if a in EACH and b in EACH and (a, b) <= (b, a) else pytest.mark.slow)
    for a, b in itertools.permutations(STRATEGIES, 2)
]


@pytest.mark.parametrize(("saved", "strategy"), PAIRS)
@pytest.mark.parametrize("beside", [False, True], ids=["", "beside float32"])
def test_every_strategy_becomes_every_other(saved, strategy, beside):
    """Weights with all their components, moments, counters; what goes on is a run like any other."""
    model, opt = trained(saved, beside=beside and saved != "fp32")
    if saved == "fp32":  # a narrower model has lost its low bits already, and here they are the weights
        model.bfloat16().float()
    if saved == "collage-fp16" and Strategy.parse(strategy).dtype == torch.bfloat16:
        with pytest.raises(ValueError, match="float16 weights, whose visible ones do not fit"):
            converted(model, opt, strategy)
        return
    other, theirs, report = converted(model, opt, strategy, beside=beside and strategy != "fp32")
    assert_taken_over(opt, theirs)
    assert report.slots or saved == strategy
    run(other, theirs, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["fp32-master", "collage-8bit", "collage-exact"])
def test_every_optimizer(name, strategy):
    model, opt = trained("collage-plus", name)
    _, theirs, _ = converted(model, opt, strategy, name)
    assert_taken_over(opt, theirs)


def test_a_float32_master_goes_and_comes_back_bit_for_bit():
    """Its 32 bits are those of bf16+int16; moments of float32 stay what they are."""
    model, opt = trained("fp32-master")
    there, theirs, report = converted(model, opt, "param=bf16+int16,momentum=fp32,variance=fp32,arithmetic=float32")
    assert not any(lost.changed for lost in report.slots.values())
    _, ours, _ = converted(there, theirs, "fp32-master")
    assert_same_planes(planes_of(ours), planes_of(opt))


def test_groups_keep_strategies_of_their_own():
    """Each is taken from the one that it was saved under to the one that it has here."""
    groups = lambda model, first, second: [  # noqa: E731
        {"params": list(model[0].named_parameters()), "strategy": first},
        {"params": [(f"n.{k}", p) for k, p in model[1].named_parameters()], "strategy": second},
    ]
    model = model_of("bf16")
    opt = collage.AdamW(groups(model, "collage-plus", "fp32-master"))
    run(model[:2], opt, 2)
    other = model_of("bf16")
    other.load_state_dict(model.state_dict())
    theirs = collage.AdamW(groups(other, "collage-exact", "bf16"))
    theirs.load_state_dict(opt.state_dict(), convert=True)
    assert [group["strategy"] for group in theirs.param_groups] == ["collage-exact", "bf16"]
    assert_taken_over(opt, theirs)


def test_settings_come_with_the_state_and_the_strategy_stays():
    model, opt = trained("collage-plus")
    opt.param_groups[0]["lr"] = 5e-4
    _, theirs, _ = converted(model, opt, "fp32-master")
    assert theirs.param_groups[0]["lr"] == 5e-4
    assert theirs.param_groups[0]["strategy"] == "fp32-master"


def test_what_was_rounded_is_returned_and_said(caplog):
    model, opt = trained("fp32-master")
    with caplog.at_level(logging.INFO, "collage"):
        _, theirs, report = converted(model, opt, "collage-plus")
    lost = report.slots["exp_avg", "fp32", "bf16"]
    assert lost.changed > 0.9 * lost.numbers
    assert 0.45 < lost.largest <= 0.5
    assert 0.27 < lost.rms < 0.30  # uniform over an ulp: 12 ** -0.5
    assert report.slots["param", "bf16+fp32", "bf16x2"].largest <= 0.25
    assert f"state_dict: converted: {report}" in caplog.messages
    assert theirs.load_state_dict(theirs.state_dict()) is None


def test_what_a_state_of_torch_loses_is_said_too():
    model = model_of("fp32")
    opt = torch.optim.AdamW(model.named_parameters())
    run(model, opt, 2)
    theirs = optimizer_of("AdamW", model_of("collage-plus"), "collage-plus")
    report = theirs.load_state_dict(opt.state_dict(), convert=True)
    assert report.slots["exp_avg", "fp32", "bf16"].changed > 16000
    assert {name for name, *_ in report.slots} == {"exp_avg", "exp_avg_sq"}


def test_without_it_the_error_says_how():
    model, opt = trained("collage-plus")
    theirs = optimizer_of("AdamW", model, "fp32-master")
    with refused(
        theirs, ValueError, r"saved under strategy 'collage-plus'.*opt.load_state_dict\(state, convert=True\)"
    ):
        theirs.load_state_dict(opt.state_dict())


def test_a_model_that_was_not_loaded_yet_is_an_error():
    """Its low components belong to other weights, and would be lost in silence."""
    _, opt = trained("collage-plus")
    other = model_of("fp32-master")
    with torch.no_grad():
        other[0].weight.mul_(0.3)
        other[2].weight.mul_(0.3)
    theirs = optimizer_of("AdamW", other, "fp32-master")
    with refused(theirs, ValueError, "do not belong to the weights that the model has now; load its weights first"):
        theirs.load_state_dict(opt.state_dict(), convert=True)


def test_a_number_that_the_format_has_not_is_an_error():
    model, opt = trained("fp32-master")
    opt.state[model[0].weight]["exp_avg"][0, 0] = 1e6
    other = model_of("collage-fp16")
    other.load_state_dict(model.state_dict())
    theirs = optimizer_of("AdamW", other, "param=fp16x2,momentum=fp16,variance=bf16,arithmetic=float32")
    with refused(theirs, ValueError, "param '0.weight': 1 numbers of exp_avg are beyond what 'fp16' holds"):
        theirs.load_state_dict(opt.state_dict(), convert=True)


def test_low_components_that_are_here_stay_where_the_saved_state_has_none(caplog):
    """As of torch's states: `load_high_precision_state_dict` has put them there. Where nothing has, that is said."""
    model, opt = trained("fp32")
    full = {name: x.clone() for name, x in model.state_dict().items()}
    other = model_of("collage-exact")
    theirs = optimizer_of("AdamW", other, "collage-exact")
    collage.load_high_precision_state_dict(other, theirs, full)
    theirs.load_state_dict(opt.state_dict(), convert=True)
    for name, x in collage.high_precision_state_dict(other, theirs).items():
        assert_same_bits(name, x, full[name])
    with caplog.at_level(logging.INFO, "collage"):
        converted(model, opt, "collage-exact")
    assert "'0.weight' and 4 more: saved in 'fp32'" in caplog.text


def test_a_state_of_the_same_strategy_is_restored_byte_for_byte():
    model, opt = trained("collage-8bit")
    _, theirs, report = converted(model, opt, "collage-8bit")
    assert str(report) == "nothing"
    assert_same_planes(planes_of(theirs), planes_of(opt))


def test_weights_components_alone_are_a_state_where_no_step_was_made():
    """What `collage convert` leaves of a model without an optimizer: any rule takes it, and begins its moments at 0."""
    _, opt = trained("collage-plus", steps=0)
    for parameter in opt.parameters():
        opt.planes(parameter)
    saved = opt.state_dict()
    lows = {k: {key: x for key, x in own.items() if key in ("step", "param_lo")} for k, own in saved["state"].items()}
    group = {key: saved["param_groups"][0][key] for key in ("params", "param_names", "strategy")}
    for name in OPTIMIZERS.keys() - {"Muon"}:  # which makes two groups
        model = model_of("collage-plus")
        theirs = optimizer_of(name, model, "collage-plus", lr=0.25)
        theirs.load_state_dict({"state": copy.deepcopy(lows), "param_groups": [copy.deepcopy(group)]})
        assert theirs.param_groups[0]["lr"] == 0.25
        run(model, theirs, 1)
    stepped = {k: {**own, "step": torch.tensor(3)} for k, own in lows.items()}
    with pytest.raises(ValueError, match="keeps step, param_lo"):
        theirs.load_state_dict({"state": stepped, "param_groups": [group]})


@pytest.mark.parametrize("base", ["NAdam", "RMSprop", "Adagrad"])
@pytest.mark.parametrize(("saved", "strategy"), [("collage-plus", "fp32-master"), ("fp32-master", "collage-8bit")])
def test_a_wrapped_optimizers_states_too(base, saved, strategy):
    """By their names' formats; counters and what has no format as they are."""
    model, other = model_of(saved), model_of(strategy)
    opt = collage.wrap(getattr(torch.optim, base), model.named_parameters(), lr=1e-3, strategy=saved)
    run(model, opt, 3)
    other.load_state_dict(model.state_dict())
    theirs = collage.wrap(getattr(torch.optim, base), other.named_parameters(), lr=1e-3, strategy=strategy)
    with refused(theirs, ValueError, "opt.load_state_dict"):
        theirs.load_state_dict(copy.deepcopy(opt.state_dict()))
    report = theirs.load_state_dict(copy.deepcopy(opt.state_dict()), convert=True)
    moments = {name for name, *_ in report.slots} - {"param"}
    assert moments == {"NAdam": {"exp_avg", "exp_avg_sq"}, "RMSprop": {"square_avg"}, "Adagrad": {"sum"}}[base]
    for (_, _, target), lost in report.slots.items():  # codes are rounded with 16 bits of fraction, and not to 0
        assert lost.largest <= (1.0 if target.startswith("uint8") else 0.5 + 2.0**-16)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits("step", theirs.base.state[q]["step"], opt.base.state[p]["step"])
    run(other, theirs, 1)
