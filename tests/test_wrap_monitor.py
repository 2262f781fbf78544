"""What a monitor says of wrapped optimizers: what arrived, and what the same one would have done in float32."""

import pytest
import pytorch_optimizer
import torch
from torch import nn
from wrapped import BASES, Base, assert_same_run, give, go_on, groups_of, trained, weights

import collage
from collage.strategies import STRATEGIES

SHAPES = ((40, 160), (33, 20), (20,), (4, 3, 2))
ELEMENTWISE = [
    "AdamW",
    "Adagrad",
    "ASGD",
    "NAdam",
    "RMSprop",
    "Rprop",
    "SGD",
    "ScheduleFree AdamW",
    "Lion",
    "Adan of pytorch_optimizer",
]


def base_of(name: str) -> Base:
    """With a parameter that has blocks; small rates, as far as there are any."""
    return BASES[name]._replace(shapes=((40, 160), (33, 20), (20, 3)) if name == "Muon" else SHAPES)


def watched(name: str, strategy: str, steps: int, shadow: int | None = 4, every: int = 1, **more):
    """A run of small steps, the monitor first."""
    base = base_of(name)
    params = weights(base.shapes, STRATEGIES[strategy].dtype)
    opt = collage.wrap(base.kind, groups_of(params, base), **base.settings, strategy=strategy)
    monitor = collage.monitor(opt, every=every, shadow=shadow, **more)
    go_on(params, opt, 0, steps, scheduled=False)
    return opt, monitor


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Muon", "SOAP", "ScheduleFree AdamW"])
def test_a_monitor_changes_no_bit(name):
    opt, _ = watched(name, "collage-plus-sr", 4, strategies=("bf16",))
    base = base_of(name)
    params = weights(base.shapes)
    control = collage.wrap(base.kind, groups_of(params, base), **base.settings, strategy="collage-plus-sr")
    go_on(params, control, 0, 4, scheduled=False)
    assert_same_run(opt, control)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_under_float32_masters_the_shadow_is_the_run(name):
    _, monitor = watched(name, "fp32-master", 6)
    total = monitor.report().total
    assert total.edq_ratio == pytest.approx(1.0, abs=1e-6)  # what arrived is a difference of float32 numbers
    assert total.edq_shadow == pytest.approx(1.0, abs=1e-6)
    assert total.lost is not None
    assert monitor.report().unfollowed == []
    assert total.v_ratio in (None, 1.0)
    assert total.m_error in (None, 0.0)
    assert (total.v_ratio, total.m_error) != (None, None) or name in ("ASGD", "Rprop"), "it keeps a moment"


def test_plain_bfloat16_loses_what_the_shadow_has():
    _, monitor = watched("AdamW", "bf16", 30, strategies=("collage-plus", "fp32-master", "collage-8bit"))
    report = monitor.report()
    assert report.total.edq_ratio is not None
    assert report.total.edq_ratio < 0.99
    assert report.total.lost > 0.05
    assert report.beside["fp32-master"].edq_ratio == pytest.approx(1.0, abs=1e-6)
    assert report.beside["collage-plus"].edq_ratio == pytest.approx(1.0, abs=1e-3)
    assert report.beside["fp32-master"].lost < report.total.lost


def test_the_shadow_sees_a_second_moment_that_is_stuck():
    """At beta2 = 0.999 that of bfloat16 does not fall: after 100 small gradients it is the first one's still."""
    params = [nn.Parameter(torch.zeros(64).bfloat16())]
    ratios = {}
    for strategy in ("bf16", "collage-plus", "fp32-master"):
        opt = collage.wrap(torch.optim.AdamW, params, lr=1e-5, strategy=strategy)
        monitor = collage.monitor(opt, every=1, shadow=1)
        for step in range(100):
            params[0].grad = torch.full((64,), 1e-3 if step else 1.0).bfloat16()
            opt.step()
        ratios[strategy] = monitor.report().total.v_ratio
    assert ratios["bf16"] == pytest.approx(0.999**-99, rel=2e-2)  # 1.10; rounded to 8 bits at first
    assert ratios["collage-plus"] == pytest.approx(1.0, abs=1e-3)
    assert ratios["fp32-master"] == 1.0


def test_a_strategy_beside_says_what_a_run_under_it_says():
    """With every element followed: the same sums, of stochastic ones too."""
    names = ("bf16", "collage-plus", "collage-plus-sr", "collage-8bit")
    _, monitor = watched("AdamW", "fp32-master", 5, shadow=1, strategies=names)
    for name in names:
        _, own = watched("AdamW", name, 5, shadow=None)
        ours, theirs = monitor.report().beside[name], own.report().total
        for key in ("edq_ratio", "edq_visible"):
            assert getattr(ours, key) == pytest.approx(getattr(theirs, key), rel=1e-9), (
                name,
                key,
            )  # other order of sums
        assert (ours.lost, ours.nonzero) == (theirs.lost, theirs.nonzero), name


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "SOAP", "Shampoo"])
def test_what_is_not_elementwise_is_measured_and_not_followed(name):
    opt, monitor = watched(name, "collage-plus", 3, strategies=("bf16",))
    report = monitor.report()
    assert report.unfollowed == [p.name for p in opt.parameters()]
    assert report.total.v_ratio is report.total.edq_shadow is None
    assert report.total.edq_ratio == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("shape", [(40, 160), (300,)])
@pytest.mark.parametrize("kind", [pytorch_optimizer.Lamb, pytorch_optimizer.StableAdamW, torch.optim.AdamW])
def test_an_update_that_depends_on_a_norm_of_the_weight_is_not_elementwise(kind, shape):
    opt = collage.wrap(kind, [("w", p) for p in weights([shape])], lr=1e-3)
    monitor = collage.monitor(opt, every=1, shadow=4)
    go_on([p.tensor for p in opt.parameters()], opt, 0, 2, scheduled=False)
    assert monitor.report().unfollowed == ([] if kind is torch.optim.AdamW else ["w"])


def test_a_weight_whose_steps_are_below_its_floor_is_frozen():
    params = [nn.Parameter(torch.ones(100).bfloat16()), nn.Parameter(torch.zeros(100).bfloat16())]
    for strategy, frozen in (("bf16", ["0"]), ("collage-plus", [])):
        opt = collage.wrap(torch.optim.AdamW, params, lr=1e-5, weight_decay=0.0, strategy=strategy)
        monitor = collage.monitor(opt, every=1)
        for step in range(3):
            give(params, step)
            opt.step()
        assert monitor.report().frozen == frozen
        assert monitor.report().by_parameter["0"].lost == (1.0 if frozen else 0.0)


def test_a_window_and_a_reset():
    opt, monitor = watched("AdamW", "collage-plus", 4, every=2)
    assert monitor.report().total.steps == monitor.window().total.steps == 2
    params = [p.tensor for p in opt.parameters()]
    go_on(params, opt, 4, 6, scheduled=False)
    assert (monitor.report().total.steps, monitor.window().total.steps) == (3, 1)
    monitor.reset()
    assert monitor.report().total.steps == 0
    assert len(monitor.report().by_group) <= 2


def test_a_monitor_that_comes_later_follows_from_there():
    base: Base = BASES["AdamW"]._replace(shapes=SHAPES)
    params, opt = trained(base, 5, strategy="fp32-master")
    monitor = collage.monitor(opt, every=1, shadow=2)
    go_on(params, opt, 5, 8, scheduled=False)
    total = monitor.report().total
    assert total.v_ratio == 1.0
    assert total.m_error == 0.0
    assert total.edq_shadow == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "SOAP"])
def test_a_monitor_may_be_there_before_a_state_is_loaded(name):
    """As in a resumed run; the states that it meets are in planes of their formats."""
    opt, _ = watched(name, "collage-plus", 3)
    base = base_of(name)
    params = weights(base.shapes)
    resumed = collage.wrap(base.kind, groups_of(params, base), **base.settings, strategy="collage-plus")
    monitor = collage.monitor(resumed, every=1, shadow=2)
    with torch.no_grad():
        for p, q in zip(params, opt.parameters(), strict=True):
            p.copy_(q.tensor)
    resumed.load_state_dict(opt.state_dict())
    for run in (opt, resumed):
        go_on([p.tensor for p in run.parameters()], run, 3, 5, scheduled=False)
    assert_same_run(resumed, opt)
    total = monitor.report().total
    assert (total.steps, total.edited) == (2, 0)
    assert total.v_ratio == (pytest.approx(1.0, abs=1e-3) if base.elementwise else None)  # of two steps, v in bf16x2


def test_weights_that_others_change_are_followed_from_there():
    opt, monitor = watched("AdamW", "fp32-master", 2)
    params = [p.tensor for p in opt.parameters()]
    with torch.no_grad():
        params[0].clamp_(-0.1, 0.1)
    go_on(params, opt, 2, 4, scheduled=False)
    report = monitor.report()
    assert report.by_parameter["0"].edited > 0
    assert report.total.edq_shadow == pytest.approx(1.0, abs=1e-6)


def test_evaluations_are_no_edits(caplog):
    """Schedule-Free's train() and eval() write weights as a step does; nobody is told that somebody else has."""
    caplog.set_level("INFO", "collage")
    for strategy in ("fp32-master", "collage-exact", "collage-plus"):
        _, monitor = watched("ScheduleFree AdamW", strategy, 6)
        assert monitor.report().total.edited == 0
    assert "changed outside" not in caplog.text


@pytest.mark.parametrize("strategy", ["kahan", "paper-plus"])
def test_a_strategy_that_cannot_be_is_refused_beside_too(strategy):
    opt, _ = watched("AdamW", "collage-plus", 1)
    with pytest.raises(ValueError, match=f"'{strategy}' adds increments in bfloat16 arithmetic"):
        collage.monitor(opt, strategies=(strategy,))
    assert len(opt.monitors) == 1
