"""The monitor: its sums against a float64 recomputation from the planes, and that it changes nothing."""

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import BARE, assert_same_bits, refused
from torch import nn

import collage
from collage.formats import format_of
from collage.monitor.sampling import Sampling
from collage.strategies import STRATEGIES


def setup(strategy, n=3000, lr=1e-3, **kwargs):
    dtype = STRATEGIES[strategy].dtype
    torch.manual_seed(0)
    params = {"w": nn.Parameter(torch.randn(n).to(dtype)), "norm": nn.Parameter(torch.ones(50, dtype=dtype))}
    return params, collage.AdamW(params.items(), lr=lr, strategy=strategy, **kwargs)


def give(params, step, scale=1.0):
    g = torch.Generator().manual_seed(step)
    for p in params.values():
        p.grad = (torch.randn(p.shape, generator=g) * scale).to(p.dtype)


def theta_planes(p, opt):
    extra = [opt.state[p][key] for key in ("param_lo", "param_master", "param_kahan") if key in opt.state[p]]
    return [plane.detach().clone() for plane in (p, *extra)]


class Spy:
    """A rule that remembers its updates."""

    def __init__(self, monkeypatch):
        self.deltas = []
        rule, with_amsgrad = collage.AdamW.rules
        spied = replace(rule, update=self.remember(rule.update))
        monkeypatch.setattr(collage.AdamW, "rules", (spied, with_amsgrad))

    def remember(self, update):
        def spying(slots, g, c):
            result = update(slots, g, c)
            self.deltas.append(result.delta.double())
            return result

        return spying


@pytest.mark.parametrize("strategy", BARE)
def test_sums_equal_a_recomputation_from_the_planes(strategy, monkeypatch):
    params, opt = setup(strategy, lr=1e-4, backend="reference")
    mon = collage.monitor(opt, every=1, shadow=None)
    spy = Spy(monkeypatch)
    sums = {name: [0.0] * 5 for name in params}
    edq = []
    for step in range(3):
        give(params, step)
        for p in params.values():
            opt.state[p] or opt.planes(next(x for x in opt.parameters() if x.tensor is p))
        old = {name: theta_planes(p, opt) for name, p in params.items()}
        spy.deltas.clear()
        opt.step()
        edq.append([0.0, 0.0])
        for (name, p), delta in zip(params.items(), spy.deltas, strict=True):
            new = theta_planes(p, opt)
            components = format_of(STRATEGIES[strategy].param).components
            pairs = list(zip(components(old[name]), components(new), strict=True))
            arrived = sum(b.double() - a.double() for a, b in reversed(pairs))
            visible = new[0].double() - old[name][0].double()
            still = torch.stack([a == b for a, b in zip(old[name], new, strict=True)]).all(0)
            row = [delta @ arrived, delta @ visible, delta @ delta, (delta != 0).sum(), ((delta != 0) & still).sum()]
            sums[name] = [a + float(b) for a, b in zip(sums[name], row, strict=True)]
            edq[-1] = [edq[-1][0] + float(row[0]), edq[-1][1] + float(row[2])]
    report = mon.report()
    total = [sum(column) for column in zip(*sums.values(), strict=True)]
    for quality, (dot, visible, norm2, nonzero, lost) in [
        *((report.by_parameter[name], row) for name, row in sums.items()),
        (report.total, total),
        (report.by_group[0], total),
    ]:
        assert quality.edq_ratio == pytest.approx(dot / norm2, rel=1e-12)
        assert quality.edq_visible == pytest.approx(visible / norm2, rel=1e-12)
        assert (quality.nonzero, quality.lost) == (nonzero, lost / nonzero)
        assert quality.steps == 3
    assert report.total.edq == pytest.approx(sum(d / math.sqrt(n) for d, n in edq) / 3, rel=1e-12)


@pytest.mark.parametrize("strategy", BARE)
def test_a_monitor_never_changes_a_bit(strategy):
    planes = []
    for watched in (False, True):
        params, opt = setup(strategy)
        if watched:
            collage.monitor(opt, every=2, shadow=7, strategies=["bf16", "collage-plus-sr", "kahan"])
        for step in range(5):
            give(params, step)
            assert opt.step() is None
        planes.append([x for p in params.values() for x in (p.detach(), *opt.state[p].values())])
    for i, (a, b) in enumerate(zip(*planes, strict=True)):
        assert_same_bits(f"plane {i}", a, b)


def test_bf16_loses_and_collage_does_not():
    """At theta = 1, steps of 1e-5 are far below half an ulp of bf16."""
    reports = {}
    for strategy in ("bf16", "collage-light", "collage-plus", "fp32-master"):
        params, opt = setup(strategy, lr=1e-5, weight_decay=0.0)
        mon = collage.monitor(opt, every=1)
        for step in range(20):
            give(params, step)
            opt.step()
        reports[strategy] = mon.report()
    assert reports["bf16"].frozen == ["norm"]
    assert reports["bf16"].total.lost > 0.9
    assert reports["bf16"].total.edq_ratio < 0.5
    for strategy in ("collage-light", "collage-plus", "fp32-master"):
        assert reports[strategy].frozen == []
        assert reports[strategy].total.edq_ratio == pytest.approx(1.0, abs=1e-3)
        assert reports[strategy].total.lost < 0.05


def test_the_shadow_sees_a_second_moment_that_stuck():
    """Gradients fall tenfold: the step's own sums are blind to it, v over its shadow is not."""
    totals, beside = {}, {}
    for strategy in ("collage-light", "collage-plus"):
        params, opt = setup(strategy, n=128, betas=(0.9, 0.998))
        mon = collage.monitor(opt, every=300, shadow=1, strategies=["bf16"])
        for step in range(1501):
            give(params, step, 1.0 if step < 100 else 0.01)
            opt.step()
            if step == 300:
                mon.reset()
        totals[strategy], beside[strategy] = mon.report().total, mon.report().beside
    light, plus = totals["collage-light"], totals["collage-plus"]
    assert light.v_ratio > 5
    # Increments are about one ulp of lo here, 1e-5 of a weight, and arrive in whole ones: half a percent in all.
    assert light.edq_ratio == pytest.approx(1.0, abs=1e-2)  # what it intended arrived; it intended too little
    assert light.edq_shadow < 0.6
    assert plus.v_ratio == pytest.approx(1.0, abs=1e-3)
    assert plus.edq_shadow == pytest.approx(1.0, abs=1e-2)
    assert plus.m_error < 0.01  # momentum in bf16: 2**-9 a step, over ten steps
    assert beside["collage-plus"]["bf16"].v_ratio > 5  # what bf16 would have lost on this very run


def test_the_shadow_is_the_fp32_run_of_its_elements():
    """On float32 parameters run and shadow are the same computation: error exactly 0, ratio exactly 1."""
    params, opt = setup("fp32")
    mon = collage.monitor(opt, every=1, shadow=3)
    for step in range(5):
        give(params, step)
        opt.step()
    total = mon.report().total
    assert (total.v_ratio, total.m_error) == (1.0, 0.0)


@pytest.mark.parametrize("strategy", ["collage-plus", "fp32"])
def test_the_shadow_follows_changing_batches_and_strides_of_any_kind(strategy):
    """Parameters come, pause and lie transposed in memory: the report is that of the same numbers laid in rows."""
    seen = []
    for transposed in (False, True):
        params, opt = setup(strategy)
        values = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).to(params["w"].dtype)
        params["late"] = nn.Parameter(values.t().contiguous().t() if transposed else values)
        opt.add_param_group({"params": [("late", params["late"])]})
        mon = collage.monitor(opt, every=3, shadow=7, strategies=["bf16"])
        for step in range(8):
            give(params, step)
            for name in {0: ["late"], 3: ["w"], 4: ["w", "late"]}.get(step, []):
                params[name].grad = None
            opt.step()
        report = mon.report()
        seen.append({name: (q.v_ratio, q.m_error, q.edq_shadow) for name, q in report.by_parameter.items()})
    assert seen[0] == seen[1]
    if strategy == "fp32":
        assert {(v, m) for v, m, _ in seen[0].values()} == {(1.0, 0.0)}


def test_the_shadow_reads_no_plane_at_steps_that_are_not_due(monkeypatch):
    params, opt = setup("collage-plus")
    collage.monitor(opt, every=10)
    sampled, take = [], Sampling.take
    monkeypatch.setattr(Sampling, "take", lambda *own: sampled.append(own) or take(*own))
    for step in range(2):
        sampled.clear()
        give(params, step)
        opt.step()
    assert len(sampled) == len(params)  # the gradients


def test_due_steps_windows_and_reset():
    params, opt = setup("bf16")
    mon = collage.monitor(opt, every=3)
    for step in range(7):  # measured: 0, 3, 6
        give(params, step)
        opt.step()
    assert mon.report().total.steps == 3
    assert mon.window().total.steps == 3
    assert mon.window().total == mon.window().total
    assert mon.window().total.edq is None
    mon.reset()
    assert mon.report().total.steps == 0


def step_in_parts(params, opt, parts):
    """One step of the optimizer in several calls, as where each gradient is released once it is used."""
    grads = {name: p.grad for name, p in params.items()}
    for part in parts:
        for name, p in params.items():
            p.grad = grads[name] if name in part else None
        opt.step()


PARTS = {
    "one by one": (["w"], ["norm"], ["late"]),
    "backwards": (["late"], ["norm"], ["w"]),
    "two": (["w", "late"], ["norm"]),
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("strategy", ["bf16", "collage-plus-sr", "fp32"])
def test_a_step_in_several_calls_is_one_step(strategy, every, parts):
    """Steps, EDQ, what was lost, the shadow and strategies beside: as if all had stepped in one call."""
    reports, windows = [], []
    for whole in (True, False):
        params, opt = setup(strategy)
        params["late"] = nn.Parameter(torch.randn(40, generator=torch.Generator().manual_seed(1)).to(params["w"].dtype))
        opt.add_param_group({"params": [("late", params["late"])], "lr": 1e-2})
        mon = collage.monitor(opt, every=every, shadow=2, strategies=["bf16", "kahan"])
        for step in range(7):
            give(params, step)
            step_in_parts(params, opt, [list(params)] if whole else parts)
            if step == 3:
                windows.append(mon.window())
        reports.append(mon.report())
    for one, other in (reports, windows):
        assert one.total.steps == other.total.steps
        assert one.by_parameter == other.by_parameter
        assert one.frozen == other.frozen
        for a, b in [(one.total, other.total), *zip(one.by_group, other.by_group, strict=True)]:
            assert (a.steps, a.nonzero, a.lost, a.edited) == (b.steps, b.nonzero, b.lost, b.edited)
            for field in ("edq", "edq_ratio", "edq_visible", "v_ratio", "m_error", "edq_shadow"):
                assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-12), field  # added in another order
        for name, a in one.beside.items():
            b = other.beside[name]
            assert (a.steps, a.nonzero, a.lost) == (b.steps, b.nonzero, b.lost)
            assert (a.edq, a.edq_ratio) == pytest.approx((b.edq, b.edq_ratio), rel=1e-12)
    assert reports[0].total.steps == len(range(0, 7, every))


def test_a_parameter_that_pauses_does_not_delay_the_count():
    """A step is over when one comes again; who has no gradient is not waited for."""
    params, opt = setup("bf16")
    mon = collage.monitor(opt, every=2)
    for step in range(6):  # measured: 0, 2, 4
        give(params, step)
        step_in_parts(params, opt, [["w"]] if step == 2 else [["w"], ["norm"]])
    assert mon.report().total.steps == 3
    assert mon.report().by_parameter["w"].steps == 3
    assert mon.report().by_parameter["norm"].steps == 2


def test_a_call_that_is_refused_is_not_counted():
    params, opt = setup("bf16")
    mon = collage.monitor(opt, every=2)
    give(params, 0)
    opt.step()
    give(params, 1)
    good = params["norm"].grad
    params["norm"].grad = good.to_sparse()
    with refused(opt, TypeError, "sparse"):
        opt.step()
    params["norm"].grad = good
    opt.step()
    give(params, 2)
    opt.step()
    assert mon.report().total.steps == 2  # 0 and 2


def test_undefined_is_none_and_the_report_is_json():
    params, opt = setup("collage-plus", weight_decay=0.0)
    mon = collage.monitor(opt, every=1)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    opt.step()
    total = mon.report().total
    assert (total.edq, total.edq_ratio, total.lost, total.m_error) == (None, None, None, None)
    params["w"].grad[0] = math.nan
    opt.step()
    assert json.loads(json.dumps(mon.report().to_dict(), allow_nan=False))["total"]["edq_ratio"] is None


@pytest.mark.parametrize("strategy", ["collage-plus", "fp32-master", "kahan"])
@pytest.mark.parametrize("seen", [True, False])
def test_a_monitor_sees_writes_that_no_counter_sees_and_its_books_stay_true(strategy, seen):
    """A measured step looks at every weight, and starts from the weights as they stand."""
    params, opt = setup(strategy, lr=1e-4)
    mon = collage.monitor(opt, every=1, shadow=None)
    give(params, 0)
    opt.step()
    with torch.no_grad():
        (params["w"] if seen else params["w"].data).mul_(2.0**-20)
    visible = params["w"].detach().clone()
    give(params, 1)
    with pytest.warns(RuntimeWarning, match=r"changed outside the optimizer: 'w' \(\d+ of 3000 weights\)"):
        opt.step()
    after = mon.report()
    assert (params["w"].detach().float() - visible.float()).abs().max() < 2e-4
    assert after.total.edq_ratio == pytest.approx(1.0, abs=0.01)  # against the weights before the edit: thousands
    assert 1500 < after.by_parameter["w"].edited <= 3000
    assert after.total.edited == after.by_group[0].edited == after.by_parameter["w"].edited
    assert after.by_parameter["norm"].edited == 0


@pytest.mark.parametrize("one", ["bf16", STRATEGIES["bf16"]])
def test_one_strategy_needs_no_list(one):
    params, opt = setup("collage-plus")
    mon = collage.monitor(opt, every=1, strategies=one)
    give(params, 0)
    opt.step()
    assert list(mon.report().beside) == ["bf16"]


def test_another_optimizer_is_refused():
    opt = torch.optim.AdamW(setup("fp32")[0].values())
    with pytest.raises(TypeError, match=r"needs one of this package, such as collage.AdamW, got torch\.optim.*AdamW"):
        collage.monitor(opt)


@pytest.mark.parametrize("kwargs", [{"every": 0}, {"every": 1.5}, {"shadow": 0}, {"strategies": ["x"]}])
def test_wrong_arguments_are_named(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs)).replace('strategies', 'strategy')}: "):
        collage.monitor(setup("bf16")[1], **kwargs)


def test_a_monitor_stays_when_a_state_is_loaded_and_its_shadow_starts_anew():
    params, opt = setup("fp32")
    mon = collage.monitor(opt, every=1, shadow=1)
    give(params, 0)
    opt.step()
    early = copy.deepcopy(opt.state_dict())
    for step in range(1, 20):
        give(params, step, 100.0)
        opt.step()
    opt.load_state_dict(early)
    give(params, 1)
    opt.step()
    assert mon.report().total.steps == 21
    assert (mon.report().total.v_ratio, mon.report().total.m_error) == (1.0, 0.0)


def test_a_resized_parameter_is_met_anew():
    w = nn.Parameter(torch.ones(100).bfloat16())
    opt = collage.AdamW([("w", w)], lr=1e-3)
    mon = collage.monitor(opt, every=1, shadow=1, strategies=["bf16", "bf16"])
    for n in (100, 200):
        w.grad = None
        w.data = torch.ones(n).bfloat16()
        opt.state.pop(w, None)
        w.grad = torch.ones_like(w)
        opt.step()
    assert mon.report().total.nonzero == 300
    assert mon.report().beside["bf16"].nonzero == 300


@pytest.mark.parametrize("strategy", BARE)
def test_empty_and_short_parameters_in_any_order(strategy):
    """What an uneven shard gives the last ranks. The check of whole weights once read a short one as a long one."""
    dtype = STRATEGIES[strategy].dtype
    for shapes in itertools.permutations([(0,), (0, 3), (8,), (70_001,), (7, 41, 101)]):
        g = torch.Generator().manual_seed(0)
        params = {str(shape): nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in shapes}
        opt = collage.AdamW(params.items(), strategy=strategy)
        mon = collage.monitor(opt, every=1, shadow=None)
        give(params, 0)
        opt.step()
        report = mon.report()
        assert list(report.by_parameter) == list(params)
        assert report.total.nonzero == sum(quality.nonzero for quality in report.by_parameter.values()) > 98_900
        assert report.total.edited == 0


class Whole(collage.AdamW):
    """Its second group is of a rule that says it is not elementwise."""

    def rule_of(self, group):
        return replace(super().rule_of(group), elementwise=group is not self.param_groups[-1])


def test_parameters_whose_elements_depend_on_each_other_are_left_out_of_the_shadow_and_named():
    params, _ = setup("bf16")
    opt = Whole([{"params": [pair]} for pair in params.items()], lr=1e-3, strategy="bf16")
    mon = collage.monitor(opt, every=1, shadow=16, strategies=["collage-plus"])
    for step in range(2):
        give(params, step)
        opt.step()
    report = mon.report()
    assert report.unfollowed == mon.window().unfollowed == report.to_dict()["unfollowed"] == ["norm"]
    followed, left_out = report.by_parameter["w"], report.by_parameter["norm"]
    assert followed.v_ratio == report.total.v_ratio == report.by_group[0].v_ratio
    assert (left_out.v_ratio, left_out.m_error, left_out.edq_shadow) == (None, None, None)
    assert (left_out.steps, left_out.nonzero) == (2, 100)  # what the step's own sums say is there
    assert collage.monitor(opt, shadow=None).report().unfollowed == []
