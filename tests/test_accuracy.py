"""`collage bench --accuracy`: every format is measured, wrong numbers are seen, other packages are what they are."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from collage.accumulators import Register
from collage.formats import FORMATS, Single
from collage.harness.bench.accuracy import entries, moments, peers, shown, weights
from collage.harness.bench.accuracy.held import Held, Stepped
from collage.harness.cli import main
from collage.rules import RULES
from collage.strategies import STRATEGIES

BETAS = (0.9, 0.95)
MOMENTS = {entry.name: entry for entry in entries.moments([], others=True)}
WEIGHTS = {entry.name: entry for entry in entries.weights([], others=True)}
AT = f"{BETAS[1]:g}"


def silent() -> None:
    pass


def lost(*names: str) -> dict[str, dict[str, float]]:
    return moments.measure({name: MOMENTS[name].make for name in names}, BETAS, silent)


# --- the rows come from the tables


def test_every_format_has_a_row() -> None:
    assert {n for n, f in FORMATS.items() if f.dtypes[0].is_floating_point} < WEIGHTS.keys()
    pairs = [entry.names for entry in MOMENTS.values() if entry.ours]
    for role, own in zip(entries.MOMENTS, zip(*pairs, strict=True), strict=True):
        assert set(own) == {name for name in FORMATS if entries._takes(role, name)}
    assert {strategy.formats(entries.MOMENTS) for strategy in STRATEGIES.values()} <= set(pairs)


def test_a_new_format_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "new", Single(torch.bfloat16))
    assert "new" in [entry.name for entry in entries.weights([], others=False)]
    assert "new" in [entry.name for entry in entries.moments([], others=False)]


def test_strategies_choose_the_rows() -> None:
    chosen = [STRATEGIES["collage-8bit"], STRATEGIES["bf16"]]
    assert [entry.name for entry in entries.weights(chosen, others=False)] == ["bf16", "bf16+int8:sr"]
    names = [entry.name for entry in entries.moments(chosen, others=False)]
    assert names == ["int8/128:sr + uint8/128:sr", "bf16", "fp32"]  # float32's update is what all are held against


# --- weights


def test_weights_keep_what_their_formats_can() -> None:
    found = {name: weights.measure(WEIGHTS[name], silent) for name in ("bf16", "fp32", "bf16+int8:sr", "bf16x3")}
    ulp = 2.0**-23
    for sign in (1, -1):
        key = weights.constant(1.0, sign * 1e-5)
        assert found["bf16"][key] == 0.0
        assert found["fp32"][key] == pytest.approx(round(1e-5 / ulp) * ulp / 1e-5, rel=2e-3)  # whole ulps of 1
        assert found["bf16+int8:sr"][key] == pytest.approx(1.0, abs=0.01)
        assert 0.01 < found["bf16+int8:sr"][f"{key} sd"] < 0.05
        assert found["bf16x3"][key] == pytest.approx(1.0, abs=2e-4)
    errors = [found[name][weights.noisy(1e-5)] for name in ("bf16", "bf16+int8:sr", "fp32", "bf16x3")]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[1] < 0.01


def test_the_walk_of_stochastic_rounding_is_as_long_as_theory_says() -> None:
    """var = quantum * sum |delta|, less where an increment is not small against the quantum."""
    found = weights.measure(WEIGHTS["bf16:sr"], silent)
    key = weights.constant(1.0, 1e-5)
    total = weights.CONSTANT * 1e-5
    assert found[f"{key} sd"] == pytest.approx((2.0**-7 * total) ** 0.5 / total, rel=0.15)


@pytest.mark.parametrize("name", ["e4m3+int8:sr", "e4m3+int16", "FlashOptim (emulated)"])
def test_weights_that_no_kernel_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CONSTANT", 100)
    monkeypatch.setattr(weights, "NOISY", 50)
    found = weights.measure(WEIGHTS[name], silent)
    assert found[weights.constant(0.02, 1e-5)] == pytest.approx(1.0, abs=0.1)
    assert 0 < found[weights.noisy(1e-3)] < 0.02


# --- moments


def test_float32_is_the_truth_and_eight_bits_are_near_it() -> None:
    found = lost("fp32", "int8/128:sr + uint8/128:sr", "int8/128 + uint8/128")
    exact, ours, nearest = found.values()
    for scenario in moments.SCENARIOS:
        assert exact[f"v {scenario.name} {AT}"] == pytest.approx(1.0, abs=1e-5)
        assert exact[f"error {scenario.name} {AT}"] < 1e-5
    assert exact[f"m constant {AT}"] == pytest.approx(1.0, abs=1e-6)
    assert ours[f"m constant {AT}"] == pytest.approx(1.0, abs=0.01)
    assert nearest[f"m constant {AT}"] < 0.9  # it sticks
    for when in ("", " dropped"):
        assert ours[f"v dense {AT}{when}"] == pytest.approx(1.0, abs=0.02)
    assert 0.02 < ours[f"error dense {AT}"] < 0.1
    for scenario in ("mates 100", "mates 1000"):
        assert ours[f"largest {scenario} {AT}"] < 2 * exact[f"largest {scenario} {AT}"]


def test_a_bf16_variance_sticks() -> None:
    found = moments.measure({"bf16": MOMENTS["bf16"].make}, (0.9, 0.99), silent)["bf16"]
    assert abs(found["v dense 0.99 dropped"] - 1.0) > 0.05


def test_the_same_numbers_every_time() -> None:
    assert lost("bf16:sr", "FlashOptim (emulated)") == lost("bf16:sr", "FlashOptim (emulated)")
    assert weights.measure(WEIGHTS["bf16x2:sr"], silent) == weights.measure(WEIGHTS["bf16x2:sr"], silent)


class Wrong:
    """An optimizer that holds a multiple of its second moment, or takes a step back."""

    def __init__(self, held: Held, factor: float, sign: float) -> None:
        self.held, self.factor, self.sign = held, factor, sign
        self.step, self.restart = held.step, held.restart

    def value(self, prefix: str) -> Tensor:
        return self.held.value(prefix) * {"exp_avg_sq": self.factor, "param": self.sign, "exp_avg": 1.0}[prefix]


@pytest.mark.parametrize(("factor", "sign"), [(1.1, 1.0), (1.0, -1.0)])
def test_a_wrong_number_is_seen(factor: float, sign: float) -> None:
    def make(*how: object) -> Held:
        return Wrong(MOMENTS["fp32"].make(*how), factor, sign)

    found = moments.measure({"wrong": make}, BETAS, silent)["wrong"]
    assert found[f"v dense {AT}"] == pytest.approx(factor, rel=1e-4)
    assert found[f"error dense {AT}"] == pytest.approx(1 - sign, abs=1e-4)


def test_a_number_without_kernels_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object) -> None:
        raise ValueError("no kernel")

    theta, grad = torch.zeros(4, 64), torch.full((4, 64), 0.3).bfloat16().float()
    hyper = (0.9, 0.99, 1e-8, 0.0)
    fast = Stepped(RULES["adamw"], ("fp32", "bf16:sr", "bf16x2:sr"), theta, 1.0, hyper)
    with monkeypatch.context() as patch:
        patch.setattr("collage.harness.bench.accuracy.held.choose", lambda *_: type("", (), {"step": no}))
        slow = Stepped(RULES["adamw"], ("fp32", "bf16:sr", "bf16x2:sr"), theta, 1.0, hyper)
    assert slow.backend.__name__ == "collage.backends.reference"  # type: ignore[attr-defined]
    for held in (fast, slow):
        for _ in range(3):
            held.step(grad)
    for prefix in ("param", "exp_avg", "exp_avg_sq"):
        assert fast.value(prefix).tolist() == slow.value(prefix).tolist()


# --- other packages

FEW = torch.tensor([1.0, -1.0, 0.5, 0.25, -0.1, 0.01, 0.003, 0.0, *[0.03] * 24])[None] * 0.02


def test_flashoptims_codes_are_those_of_its_kernels() -> None:
    """Numbers of flashoptim 0.1.4's kernels in Triton's interpreter, which equals these formats on 3 * 2**15 others."""
    codes, scale = peers.Grouped(torch.int8).encode(Register(FEW))
    assert codes[0, :9].tolist() == [127, -127, 85, 51, -23, 3, 1, 0, 7]
    assert scale.tolist() == [[0.0200042724609375]]
    values = [0.0200042724609375, -0.0200042724609375, 0.010061319917440414, 0.005025703925639391]
    assert peers.Grouped(torch.int8).value((codes, scale))[0, :4].tolist() == values
    codes, scale = peers.Grouped(torch.uint8).encode(Register(FEW * FEW))
    assert codes[0, :9].tolist() == [255, 255, 128, 64, 26, 3, 1, 0, 8]
    assert peers.Grouped(torch.uint8).value((codes, scale))[0, 2].item() == 0.00010082892549689859
    x = torch.tensor([[1.001, -1.001, 0.02, 1e-30, -0.0199, 1.00390625]])
    hi, error = peers.Corrected().encode(Register(x))
    assert hi.tolist() == x.bfloat16().tolist()
    assert error.tolist() == [[33, -33, -41, 66, -5, 127]]
    values = [1.001015067100525, -1.001015067100525, 0.019999826326966286, 1.0000034826343553e-30]
    assert peers.Corrected().value((hi, error))[0, :4].tolist() == values


def test_flashoptims_updates_explode_beside_a_larger_gradient() -> None:
    found = lost("FlashOptim (emulated)", "fp32")
    assert found["FlashOptim (emulated)"][f"largest mates 1000 {AT}"] > 1000
    assert found["fp32"][f"largest mates 1000 {AT}"] < 1


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(("name", "error"), [("optimi AdamW", 0.02), ("torchao AdamW8bit", 0.1)])
def test_a_package_that_is_installed_is_stepped(name: str, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = MOMENTS[name].missing()
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(moments, "LEAST", 20)
    found = moments.measure({name: MOMENTS[name].make}, (0.9, 0.9), silent)[name]
    assert 0 < found["error dense 0.9"] < error
    assert found["v dense 0.9"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.skipif(find_spec("optimi") is None, reason="optimi is not installed")
def test_optimis_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CONSTANT", 100)
    monkeypatch.setattr(weights, "NOISY", 50)
    found = weights.measure(WEIGHTS["optimi (Kahan)"], silent)
    assert found[weights.constant(0.02, 1e-5)] == pytest.approx(1.0, abs=0.1)


def test_a_package_that_is_missing_says_so() -> None:
    entry = MOMENTS["optimi AdamW"]._replace(package="no_such_package.optim")
    assert entry.missing() == "not installed: pip install '.[bench]'"
    assert MOMENTS["FlashOptim (emulated)"].missing() == ""


def test_a_package_that_fails_says_so() -> None:
    def make(*_: object) -> Held:
        raise RuntimeError("needs a GPU")

    entry = MOMENTS["optimi AdamW"]._replace(package="json", make=make)
    assert entry.missing() == "fails: RuntimeError: needs a GPU"


# --- the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        *((weights, name, 40) for name in ("CONSTANT", "NOISY", "STEPS")),
        *((moments, name, 0.001) for name in ("STEADY", "DROPPED")),
        (moments, "LEAST", 20),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("quick")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries.Entry, "missing", lambda self: "not installed: this test" if self.package else "")
    options = ["--strategies", "collage-plus-sr,bf16", "--out", str(tmp_path)]
    assert main(["bench", "--accuracy", *options]) == 0
    result = json.loads((tmp_path / "accuracy.json").read_text())
    assert [row["name"] for row in result["weights"]] == [
        "bf16", "bf16x2:sr", "FlashOptim (emulated)", "optimi (Kahan)",
    ]  # fmt: skip
    assert result["missing"].keys() == {"optimi (Kahan)", "optimi AdamW", "torchao AdamW8bit"}
    assert result["command"] == "collage bench --accuracy --strategies collage-plus-sr,bf16"
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "optimi AdamW: not measured" in out
    assert "torchao AdamW8bit: not installed: this test" in out
    for title, columns, rows in shown.tables(result):
        assert title in out
        for column in columns[1:]:
            assert column.key in rows["bf16"], (title, column.key)
            assert column.key not in (rows.get("optimi AdamW: not measured") or rows["optimi (Kahan): not measured"])


@pytest.mark.usefixtures("quick")
def test_others_can_be_left_out(tmp_path: Path) -> None:
    assert main(["bench", "--accuracy", "--no-others", "--strategies", "bf16", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "accuracy.json").read_text())
    assert [row["name"] for row in result["moments"]] == ["bf16", "fp32"]
    assert result["command"].endswith("--strategies bf16 --no-others")


def test_an_unknown_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--accuracy", "--strategies", "nope"]) == 2
    assert "unknown 'nope'" in capsys.readouterr().err
