"""`collage.advise` and `collage advise`: each input moves the advice as it should; its numbers are the library's."""

import json
import re

import pytest
import torch
from helpers import BARE

import collage
from collage.advice import evidence
from collage.advice.memory import amount, moved_bytes, planes_bytes, total_bytes
from collage.advice.rehearsal import LONGEST, Moved, Rehearsed, Settings, rehearse, stream
from collage.advice.verdict import judged
from collage.advice.weights import ROWS, RUN, SINGLES, gathered, of
from collage.floors import unchanged
from collage.formats import format_of, split
from collage.harness.cli import main
from collage.monitor.quality import Quality, Report
from collage.rules.adamw import ADAMW
from collage.strategies import STRATEGIES, Strategy

FOUR = ("bf16", "collage-light", "collage-plus", "fp32-master")


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.LayerNorm(96), torch.nn.Linear(96, 128))


def advise(lr=1e-5, strategies=FOUR, steps=60, **settings):
    return collage.advise(model(), lr, strategies=strategies, steps=steps, bandwidth=20, **settings)


def row(advice, name):
    return next(row for row in advice.rows if row["strategy"] == name)


def test_a_fine_tuning_rate_loses_in_bf16_and_nowhere_else():
    advice = advise()
    assert [r["verdict"] for r in advice.rows] == ["loses", "safe", "safe", "safe"]
    assert advice.strategy == "collage-light"
    assert "Take collage-light" in advice.why
    assert "under bf16" in advice.why
    assert "nats" in advice.why  # the run it cites


def test_lr_a_smaller_one_loses_more():
    shares = [row(advise(lr), "bf16")["arrived"] for lr in (1e-6, 1e-5, 1e-4, 1e-3)]
    assert shares == sorted(shares)
    assert shares[0] < 0.05
    assert shares[-1] > 0.9
    stuck = [row(advise(lr), "bf16")["cannot_move"] for lr in (1e-6, 1e-3)]
    assert stuck[0] > 0.9 > 0.1 > stuck[1]


def test_final_lr_a_lower_end_loses_more():
    low, high = (row(advise(3e-4, final_lr=final), "bf16")["arrived"] for final in (0.0, 3e-4))
    assert low < high


def test_weight_decay_that_bf16_drops_arrives_elsewhere():
    assert row(advise(weight_decay=0.0), "bf16")["decay_arrives"] is None
    small = advise(weight_decay=0.1)
    assert row(small, "bf16")["decay_arrives"] < 0.05
    assert row(small, "collage-plus")["decay_arrives"] == pytest.approx(
        1, abs=0.05
    )  # rounding dithers so little a decay
    large = advise(1e-3, weight_decay=100.0)
    assert row(large, "bf16")["decay_arrives"] > row(small, "bf16")["decay_arrives"]


def test_beta2_the_longer_it_remembers_the_more_a_second_moment_sticks():
    ratios = [row(advise(betas=(0.9, beta2), steps=400), "collage-light")["v_ratio"] for beta2 in (0.9, 0.999)]
    assert abs(ratios[0] - 1) < abs(ratios[1] - 1)
    assert row(advise(betas=(0.9, 0.999), steps=400), "collage-plus")["v_ratio"] == pytest.approx(1, abs=1e-3)


def test_steps_a_longer_run_sticks_more_and_says_what_was_not_rehearsed():
    short, long = (row(advise(steps=steps), "collage-light")["v_ratio"] for steps in (50, 600))
    assert long > short
    assert "times as long" not in str(advise(steps=50))
    notes = advise(steps=2 * LONGEST, strategies=("bf16",)).notes
    assert any("2 times as long" in note for note in notes)


def test_memory_takes_what_fits_and_says_what_to_do_if_nothing_does():
    whole = {r["strategy"]: r["gigabytes"] * 1e9 for r in advise(memory="1GB").rows}
    assert all(r["fits"] for r in advise(memory="1GB").rows)
    between = (whole["collage-light"] + whole["collage-plus"]) / 2
    assert [r["fits"] for r in advise(memory=between).rows] == [True, True, False, False]
    little = advise(memory=whole["collage-light"] / 2)
    assert little.strategy is None
    assert "more ranks" in little.why
    assert [r["fits"] for r in advise().rows] == [None] * 4


def test_ranks_share_bytes_and_time():
    one, four = row(advise(), "collage-plus"), row(advise(ranks=4), "collage-plus")
    assert four["gigabytes"] < one["gigabytes"] / 3
    assert four["seconds_per_step"] < one["seconds_per_step"] / 3
    assert four["bytes_per_param"] == one["bytes_per_param"]


def test_bandwidth_sets_the_time():
    slow, fast = (collage.advise(model(), 1e-5, strategies=FOUR, steps=5, bandwidth=gb) for gb in (10, 40))
    assert [a["seconds_per_step"] for a in slow.rows] == [4 * b["seconds_per_step"] for b in fast.rows]
    assert row(slow, "bf16")["seconds_per_step"] < row(slow, "collage-plus")["seconds_per_step"]


def test_bandwidth_is_measured_if_not_given(monkeypatch):
    monkeypatch.setattr("collage.advice.bandwidth.measured", lambda: 10e9)
    own = collage.advise(model(), 1e-5, strategies=("bf16",), steps=5)
    assert own.rows == collage.advise(model(), 1e-5, strategies=("bf16",), steps=5, bandwidth=10).rows


def test_tuned_under_says_how_steps_grow_and_where_to_start():
    advice = advise(tuned_under="bf16")
    share = row(advice, "bf16")["arrived"]
    assert advice.tuned.growth == pytest.approx(1 / share)
    assert advice.tuned.start == pytest.approx(1e-5 * share, rel=0.05)  # two digits
    assert str(advice.tuned) in str(advice)
    assert advise().tuned is None
    reported = advise(tuned_under="bf16", arrived=0.25)
    assert (reported.tuned.growth, reported.tuned.start) == (4.0, 2.5e-6)


def test_bytes_are_those_of_live_tensors():
    for name, strategy in BARE.items():
        live = model().to(strategy.dtype)
        opt = collage.AdamW(live.named_parameters(), strategy=name)
        planes = [plane for p in opt.parameters() for slot in opt.planes(p) for plane in slot]
        kept = sum(plane.nbytes for plane in planes)
        shapes = of(live).shapes
        assert planes_bytes(ADAMW, strategy, shapes) == kept
        gradients = sum(p.nbytes for p in live.parameters())
        counters = sum(opt.state[p.tensor]["step"].nbytes for p in opt.parameters())
        assert total_bytes(ADAMW, strategy, shapes) == kept + gradients + counters


def test_a_master_is_read_and_its_copy_only_written():
    assert moved_bytes(STRATEGIES["fp32-master"], 14, 1) == 28  # option D's bytes per parameter
    assert moved_bytes(STRATEGIES["collage-plus"], 10, 1) == 22


@pytest.mark.parametrize("name", ["bf16", "collage-plus", "paper-plus", "kahan", "collage-8bit"])
def test_cannot_move_is_what_a_step_leaves_as_it_is(name):
    strategy = STRATEGIES[name]
    fmt, register, weights = format_of(strategy.param), strategy.register, torch.linspace(-2, 2, 999)
    delta = torch.tensor(1e-3, dtype=register)
    planes = split(fmt, weights)
    still = unchanged(fmt, register, planes, delta) & unchanged(fmt, register, planes, -delta)
    found = collage.advise({"w": weights}, 1e-3, steps=2, strategies=(name,), bandwidth=20).rows[0]["cannot_move"]
    assert found == pytest.approx(int(still.sum()) / 999, abs=1e-12)


def test_the_rehearsal_is_the_optimizer_itself():
    """Its movement is that of collage.AdamW on the same weights and gradients."""
    weights = model()[0].weight.detach()
    settings = Settings(lr=1e-4, final_lr=1e-4, weight_decay=0.0, betas=(0.9, 0.99), steps=20)
    (seen,) = rehearse([weights, torch.ones(0)], [Strategy.parse("bf16")], settings)
    moved = {}
    for name in ("bf16", "fp32"):
        param = torch.nn.Parameter(weights.bfloat16().to(STRATEGIES[name].dtype, copy=True))
        start = param.detach().double()
        opt = collage.AdamW([("w", param)], lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, strategy=name)
        size = weights.bfloat16().float().square().mean().sqrt()
        for gradient in stream(weights.shape, 20, 0.05 * float(size) / 1e-4):
            param.grad = gradient.to(param.dtype)
            opt.step()
        moved[name] = param.detach().double() - start
    share = (moved["bf16"] * moved["fp32"]).sum() / moved["fp32"].square().sum()
    assert seen.matrices.arrived == float(share)
    assert seen.vectors is None


def test_the_sample_is_of_every_parameter_in_proportion():
    big, small = torch.full((300, 200), 2.0), torch.full((100, 200), 3.0)
    weights = gathered([("big", (300, 200), big), ("norm", (7,), torch.ones(7)), ("small", (100, 200), small)])
    matrices = weights.matrices()
    assert matrices.shape == (ROWS, RUN)
    assert ((matrices == 2).sum(), (matrices == 3).sum()) == (ROWS * RUN * 3 // 4, ROWS * RUN // 4)
    assert weights.vectors().tolist() == [1.0] * SINGLES
    assert weights.count == 300 * 200 + 100 * 200 + 7


def test_weights_of_every_shape():
    tensors = {"conv": torch.randn(5, 3, 3, 3), "scalar": torch.tensor(2.0), "row": torch.randn(1, 300),
               "empty": torch.zeros(0, 4), "ids": torch.arange(4), "half": torch.randn(64).half(),
               "step": 3}  # fmt: skip
    advice = collage.advise(tensors, 1e-4, steps=3, bandwidth=20)
    assert len(advice.rows) == len(BARE)
    assert all(0 <= r["cannot_move"] <= 1 for r in advice.rows)
    assert of(tensors).count == 5 * 27 + 1 + 300 + 64


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ({"w": torch.tensor([float("nan"), 1.0])}, ValueError, "model: 'w' holds NaN or Inf"),
        ({"model": {"w": torch.ones(3)}}, TypeError, "model: 'model' is a dict; give the dict of the weights alone"),
        ({"w": torch.eye(3).to_sparse()}, ValueError, "model: 'w' is sparse"),
        (torch.nn.LazyLinear(3), ValueError, "model: 'weight' has no shape yet; call the lazy model once"),
    ],
)
def test_weights_that_cannot_be_looked_at(what, error, says):
    with pytest.raises(error, match=says):
        collage.advise(what, 1e-4, **QUICK)


QUICK = {"steps": 30, "bandwidth": 20, "strategies": ("bf16", "collage-plus")}


def test_what_the_caller_has_set_does_not_matter():
    w = torch.randn(64, 64)
    want = collage.advise({"w": w}, 1e-4, **QUICK).to_dict()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.device("meta"):
            assert collage.advise({"w": w}, 1e-4, **QUICK).to_dict() == want
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("given", [{"lr": 1e-20}, {"lr": 1e-4, "weight_decay": 1e9}])
def test_nothing_is_safe_where_float32_does_not_move_or_diverges(given):
    advice = collage.advise({"w": torch.randn(64, 64)}, **given, **QUICK)
    assert advice.strategy is None
    assert {row["verdict"] for row in advice.rows} <= {"unknown", "loses"}
    assert "nan" not in str(advice)


def test_what_has_to_be_cast_is_said():
    assert "These weights are float16" in collage.advise({"w": torch.randn(64, 64).half()}, 1e-4, **QUICK).notes[-1]
    held = collage.advise({"w": torch.randn(64, 64).bfloat16()}, 1e-4, **QUICK)
    assert not any("These weights are bfloat16" in note for note in held.notes)
    one = collage.advise({"w": torch.randn(64, 64)}, 1e-4, **{**QUICK, "strategies": "collage-plus"})
    assert [row["strategy"] for row in one.rows] == ["collage-plus"]


def test_frozen_parameters_are_left_out():
    own = model()
    own[0].weight.requires_grad_(False)
    assert of(own).count == sum(p.numel() for p in own.parameters() if p.requires_grad)


def test_every_run_of_the_table_is_of_a_strategy_and_the_nearest_is_cited():
    assert {run.strategy for run in evidence.runs()} <= STRATEGIES.keys()
    assert evidence.nearest("bf16", 1.1e-5).lr == 1e-5
    assert evidence.nearest("collage-fp16", 1e-5) is None


@pytest.mark.parametrize(("settings", "message"), [
    ({"lr": 0.0}, "lr: must be a positive number, got 0"),
    ({"lr": float("nan")}, "lr: must be a positive number, got nan"),
    ({"final_lr": -1.0}, "final_lr: must be zero or positive, got -1"),
    ({"weight_decay": -0.1}, "weight_decay: must be zero or positive, got -0.1"),
    ({"betas": (0.9, 1.0)}, r"betas: needs two numbers in \[0, 1\)"),
    ({"steps": 0}, "steps: needs an integer >= 1, got 0"),
    ({"ranks": 0}, "ranks: needs an integer >= 1, got 0"),
    ({"memory": "24G"}, "memory: needs a size such as 24GB, 22.5GiB or 80GB, got '24G'"),
    ({"memory": -3}, "memory: needs a size"),
    ({"strategies": ("collage-plis",)}, "strategy: unknown 'collage-plis'.*did you mean 'collage-plus'"),
    ({"tuned_under": "bf17"}, "strategy: unknown 'bf17'"),
    ({"arrived": 0.5}, "arrived: is of the strategy that lr was tuned under"),
    ({"tuned_under": "bf16", "arrived": 0.0}, "arrived: needs a share above 0"),
])  # fmt: skip
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        advise(**settings)


def test_models_that_cannot_be_looked_at_are_refused():
    with pytest.raises(ValueError, match="bandwidth: must be a positive number of GB per second, got 0"):
        collage.advise(model(), 1e-5, bandwidth=0.0)
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        collage.advise(torch.nn.Linear(2, 2, device="meta"), 1e-5)
    with pytest.raises(ValueError, match="model: has no floating-point weights"):
        collage.advise({"ids": torch.arange(3)}, 1e-5)
    with pytest.raises(TypeError, match=r"model: needs a torch.nn.Module or a dict of tensors, got str"):
        collage.advise("tiny-llama", 1e-5)


def test_a_converted_model_is_refused_and_what_it_exports_is_not():
    model = collage.fp8.convert(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)))
    for given in (model, model.state_dict()):
        with pytest.raises(ValueError, match=r"model: '0.weight': e4m3 codes, .* before collage.fp8.convert\(model\)"):
            collage.advise(given, lr=1e-4, bandwidth=20)
    assert collage.advise(collage.fp8.export(model), lr=1e-4, bandwidth=20, steps=5, strategies=("fp32",)).rows


def test_sizes_are_read():
    assert [amount(size) for size in ("24GB", "2KiB", "1.5 MiB", 7, 7.9)] == [24 * 10**9, 2048, 3 * 2**19, 7, 7]


# ---- the command ----

SHORT = ["--steps", "30", "--strategies", "bf16,collage-plus", "--bandwidth", "20"]


def test_the_command_prints_the_advice_and_writes_it(tmp_path, capsys):
    target = tmp_path / "advice.json"
    assert main(["advise", "tiny-llama", "--lr", "1e-5", *SHORT, "--memory", "1e9", "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(target.read_text(encoding="utf-8"))
    assert found["strategy"] == "collage-plus"
    assert found["why"] in printed
    assert [r["verdict"] for r in found["rows"]] == ["loses", "safe"]
    assert all(r["fits"] for r in found["rows"])


def test_a_report_says_how_much_arrived(tmp_path, capsys):
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"table": [{"strategy": "bf16", "edq_ratio": 0.2}]}), encoding="utf-8")
    argv = ["advise", "tiny-llama", "--lr", "1e-5", *SHORT, "--tuned-under", "bf16", "--report"]
    assert main([*argv, str(summary)]) == 0
    assert "start from lr 2e-6" in capsys.readouterr().out
    assert main([*argv, str(tmp_path)]) == 0  # the folder that holds it
    (tmp_path / "result.json").write_text(json.dumps({"strategy": "bf16", "edq_ratio": 0.5}), encoding="utf-8")
    assert main([*argv, str(tmp_path / "result.json")]) == 0
    assert "start from lr 5e-6" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "message"), [
    (["nope", "--lr", "1e-5"], "MODEL_OR_RECIPE 'nope': no such recipe, file or folder .* known names: tiny-gpt"),
    (["tiny-llama", "--lr", "-1"], "--lr: must be a positive number, got -1"),
    (["tiny-llama", "--lr", "1", "--final-lr", "-1"], "--final-lr: must be zero or positive"),
    (["tiny-llama", "--lr", "1", "--memory", "24"], None),
    (["tiny-llama", "--lr", "1", "--memory", "much"], "--memory: needs a size"),
    (["tiny-llama", "--lr", "1", "--strategies", "bf17"], "--strategies: unknown 'bf17'"),
    (["tiny-llama", "--lr", "1", "--tuned-under", "bf17"], "--tuned-under: unknown 'bf17'"),
    (["tiny-llama", "--lr", "1", "--report", "x.json"], "--report: is of a run .* give --tuned-under, too"),
    (["tiny-llama", "--lr", "1", "--tuned-under", "bf16", "--report", "x.json"], "--report 'x.json': cannot be read"),
    (["tiny-llama", "--lr", "1", "--json", "/nope/x.json"], "--json '/nope/x.json': no folder /nope"),
])  # fmt: skip
def test_the_command_names_the_flag_and_the_fix(argv, message, capsys):
    if message is None:
        assert main(["advise", *argv, "--steps", "2", "--strategies", "bf16", "--bandwidth", "1"]) == 0
        return
    assert main(["advise", *argv]) == 2
    assert re.search(message, capsys.readouterr().err)


# ---- from a monitor ----


def test_a_report_advises_from_what_it_saw():
    param = torch.nn.Parameter((torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 20).bfloat16())
    opt = collage.AdamW([("w", param)], lr=1e-5, strategy="bf16")
    monitor = collage.monitor(opt, every=1, shadow=1, strategies=("collage-light", "fp32-master"))
    gradients = torch.Generator().manual_seed(1)
    for _ in range(12):
        param.grad = torch.randn(64, 64, generator=gradients).bfloat16()
        opt.step()
    for group in opt.param_groups:
        group["lr"] = 1e-7  # a schedule's end
    report = monitor.report()
    advice = report.advice()
    assert (report.strategies, report.lr) == (["bf16"], 1e-5)
    assert [(r["strategy"], r["verdict"]) for r in advice.rows] == [
        ("bf16", "loses"), ("collage-light", "safe"), ("fp32-master", "safe"),
    ]  # fmt: skip
    assert advice.strategy == "collage-light"
    assert advice.rows[0]["arrived"] == report.total.edq_shadow
    assert advice.tuned.start == pytest.approx(1e-5 * report.total.edq_ratio, rel=0.05)  # two digits
    assert "bytes" in str(advice)
    assert "GB" not in str(advice).splitlines()[3]


def test_a_report_of_few_steps_knows_nothing_yet():
    empty = Report(Quality(0, None, None, None, None, 0), [], {}, [], {}, strategies=["bf16"])
    advice = empty.advice()
    assert advice.strategy is None
    assert advice.rows[0]["verdict"] == "unknown"


def test_a_report_is_judged_by_the_worst_of_its_groups():
    def seen(ratio):
        return Quality(20, 1.0, ratio, ratio, 0.0, 100)

    report = Report(seen(0.99), [seen(0.1), seen(1.0)], {}, [], {}, strategies=["bf16", "fp32"], lr=1e-4)
    (row,) = report.advice().rows
    assert (row["verdict"], row["arrived"]) == ("loses", 0.99)


def test_a_report_of_what_is_not_finite_says_so():
    nothing = Quality(20, None, float("nan"), None, 0.0, 100)
    advice = Report(nothing, [nothing], {}, [], {}, strategies=["bf16"], lr=1e-4).advice()
    assert advice.strategy is None
    assert advice.rows[0]["because"] == "no finite update was measured"


@pytest.mark.parametrize(
    ("decay", "steps", "arrived", "word"),
    [
        (1.0, 20_000, 1.0, "safe"),
        (0.5, 20_000, 1.0, "unknown"),  # 1.1 % of the weights should have gone
        (0.5, 200, 1.0, "safe"),  # 0.01 %
        (1.0, 20_000, 1.2, "unknown"),
    ],
)
def test_what_is_in_doubt(decay, steps, arrived, word):
    settings = Settings(lr=1e-5, final_lr=1e-6, weight_decay=0.1, betas=(0.9, 0.999), steps=steps)
    moved = Moved(arrived, off=0.05, noise=1e-3)
    assert judged(Rehearsed(moved, None, decay, 1.0, haste=1e-3), settings).word == word


def test_frozen_weights_take_memory():
    own = torch.nn.ModuleDict({"frozen": torch.nn.Linear(512, 512), "own": torch.nn.Linear(8, 8)})
    own["frozen"].requires_grad_(False)
    (row,) = collage.advise(own, 1e-3, memory="1MB", **{**QUICK, "strategies": "bf16"}).rows
    assert row["gigabytes"] * 1e9 > 4 * 512 * 512
    assert row["fits"] is False


def test_a_dictionary_counts_what_trains_once():
    own = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(2, 8, 3))
    own[2].weight = own[0].weight
    assert of(own.state_dict()).count == of(own).count


def test_weights_that_begin_at_zero_are_judged_by_where_they_go():
    advice = collage.advise({"w": torch.zeros(64, 64)}, 1e-3, steps=30, bandwidth=20, strategies="collage-plus")
    assert advice.rows[0]["verdict"] != "loses"
    assert "grows" not in advice.rows[0]["because"]


def test_where_nothing_was_lost_the_learning_rate_can_stay():
    own = {"w": torch.randn(64, 64)}
    advice = collage.advise(own, 1e-3, tuned_under="fp32", arrived=0.999, **QUICK)
    assert (advice.tuned.start, advice.tuned.growth) == (1e-3, 1.0)
    assert "lr 0.001 can stay" in str(advice)
