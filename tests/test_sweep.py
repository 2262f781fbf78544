"""`collage sweep`: finished runs are found again, an interrupt loses one at most, and the map says where who loses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from collage.harness.cli import main
from collage.harness.experiment import Experiment, Plan
from collage.harness.machine import machine
from collage.harness.sweep.axes import AXES
from collage.harness.sweep.running import _of_finished
from collage.harness.sweep.store import Asked, Store
from collage.harness.sweep.study import Study
from collage.harness.tasks.registry import TASKS
from collage.harness.train.config import RunConfig

RUN = RunConfig.of("tiny-llama", "x", steps=100)
ABOUT = {"cpu": "Some CPU", "threads": "1", "torch": "2.13.0+cpu", "kernels": "avx2", "compute": "float32"}
SMALL = ["--batch-size", "2", "--seq-len", "16", "--every", "2", "--eval-sequences", "2", "--steps", "3"]
SWEEP = ["sweep", "--axis", "lr", "--values", "1e-4,1e-3,1e-2", "--strategies", "bf16,collage-plus,fp32-master"]


class Result:
    """A made-up result: bf16 loses below lr 1e-3, and diverges from 1e-2 on."""

    def __init__(self, strategy: str, seed: int, lr: float) -> None:
        loss = 2.0 + 0.01 * seed + (0.5 if strategy == "bf16" and lr < 1e-3 else 0.0)
        self.loss = math.nan if strategy == "bf16" and lr >= 1e-2 else loss
        self.strategy, self.seed, self.curve, self.seconds = strategy, seed, {0: 3.0, 3: loss}, 2.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy, "seed": self.seed, "initial_loss": 3.0, "val_loss": self.loss, "score": None,
            "edq_ratio": 0.5 if self.strategy == "bf16" else 1.0, "seconds": self.seconds,
        }  # fmt: skip


class Made:
    """Runs of no time, and what was asked of them: (strategy, seed, lr)."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, int, float]] = []
        self.interrupted_after: int | None = None

    def run(self, strategy: str, seed: int, *, tick: Any, lr: float, **_: Any) -> Result:
        if len(self.runs) == self.interrupted_after:
            raise KeyboardInterrupt
        tick(strategy, 3)(3)
        self.runs.append((strategy, seed, lr))
        return Result(strategy, seed, lr)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """In place of every experiment's runs."""
    result = Made()
    monkeypatch.setattr(Experiment, "run", lambda self, strategy, seed, **rest: result.run(strategy, seed, **rest))
    return result


# The store


def kept(store: Store, asked: Asked, strategy: str = "bf16") -> Path:
    store.folder.mkdir(exist_ok=True)
    store.add(asked, Result(strategy, 0, 1e-2), 5.0, ABOUT)
    (path,) = store.folder.glob(f"{asked.name}*")
    return path


def test_a_run_is_found_by_what_was_asked_for(tmp_path: Path) -> None:
    asked, store = Asked.of("pretrain", RUN), Store(tmp_path)
    kept(store, asked)
    found = store.find(Asked.of("pretrain", RUN))
    assert found is not None
    assert found.run["strategy"] == "bf16"
    assert math.isnan(found.run["val_loss"])  # not the null of its file
    assert found.machine == "Some CPU, avx2 kernels, float32, threads 1, torch 2.13.0"
    assert [one.asked for one in store.all()] == [asked]
    others = [{"lr": 2e-3}, {"seed": 1}, {"strategy": "bf16"}, {"eval_sequences": 8}, {"weight_decay": 0.0}]
    for other in others:
        assert store.find(Asked.of("pretrain", RunConfig.of("tiny-llama", "x", steps=100, **other))) is None, other
    assert store.find(Asked.of("finetune", RUN)) is None
    assert store.find(Asked.of("pretrain", RUN, RUN)) is None
    assert store.told == []
    assert store.find(Asked.of("pretrain", RunConfig.of("tiny-llama", "elsewhere", steps=100, eval_every=7))) == found


def test_a_setting_that_is_zero_is_not_one_that_is_unset() -> None:
    zero, unset = (Asked("t", {"model": "m", "strategy": "s", "seed": 0, "eps": eps}) for eps in (0.0, 1e-8))
    assert zero.name != unset.name
    assert Asked.of("pretrain", RunConfig.of("tiny-llama", "x", weight_decay=0.0)).settings["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda text: text[:100], "cannot be read"),
        (lambda text: text.replace('"seconds": 5.0', '"seconds": 6.0'), "has other contents than were written"),
        (lambda text: "[]", "cannot be read"),
    ],
)
def test_a_damaged_file_is_told_and_not_counted(damage: Any, problem: str, tmp_path: Path) -> None:
    asked, store = Asked.of("pretrain", RUN), Store(tmp_path)
    path = kept(store, asked)
    path.write_text(damage(path.read_text()))
    assert store.find(asked) is None
    assert store.all() == []
    assert store.told == [f"{path.name} {problem}: that run is not counted"]
    kept(store, asked)
    assert store.find(asked) is not None


def test_a_file_under_another_runs_name_is_not_taken_for_it(tmp_path: Path) -> None:
    asked, other, store = Asked.of("pretrain", RUN), Asked.of("finetune", RUN), Store(tmp_path)
    kept(store, asked).rename(tmp_path / f"{other.name}.json")
    assert store.find(other) is None
    assert store.told == [f"{other.name}.json is of a run with other settings: that run is not counted"]


# The axes


@pytest.mark.parametrize("name", AXES)
def test_every_axis_has_values_around_a_runs_own(name: str) -> None:
    axis = AXES[name]
    values = axis.defaults(RUN)
    assert axis.own(RUN) in values
    assert len(values) >= 3
    assert list(values) == sorted(set(values))
    for value in values:
        assert axis.own(axis.config(RUN, value)) == value


def test_an_axis_takes_along_what_follows_from_it() -> None:
    assert AXES["beta2"].config(RUN, 0.95).betas == (0.9, 0.95)
    assert AXES["steps"].config(RUN, 20).warmup_steps == 2
    assert AXES["batch-size"].config(RUN, 24).micro_batch == 8


# The command


def test_a_sweep_that_is_interrupted_goes_on(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*SWEEP, *SMALL, "--seeds", "2", "--out", str(tmp_path)]
    made.interrupted_after = 5
    assert main(line) == 130
    assert "the same command goes on from there" in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists()
    made.interrupted_after = None
    assert main(line) == 0
    assert "18 runs, 5 of them finished before; the 13 left take about 26 s here" in capsys.readouterr().out
    strategies = ("bf16", "collage-plus", "fp32-master")
    whole = [(name, seed, lr) for seed in (0, 1) for lr in (1e-4, 1e-3, 1e-2) for name in strategies]
    assert made.runs == whole  # none twice; the first seed's map comes first
    assert main(line) == 0
    assert made.runs == whole


def test_a_sweep_says_where_who_loses(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SWEEP, *SMALL, "--seeds", "2", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    told = ["bf16 loses more than 0.01 nats from lr 0.0001 down and from 0.01 up; it diverges at 0.01.",
            "collage-plus loses no more than 0.01 nats at lr from 0.0001 to 0.01."]  # fmt: skip
    assert summary["sentences"] == told
    shown = capsys.readouterr().out
    assert all(line in shown for line in told)
    assert "+0.5000 ± 0.0000" in shown
    assert "diverged" in shown
    cells = {(cell["strategy"], cell["value"]): cell for cell in summary["cells"]}
    assert cells["bf16", 1e-4]["differences"]["val_loss"]["mean"] == pytest.approx(0.5)
    assert cells["bf16", 1e-2]["state"] == "diverged"
    assert {path.name for path in tmp_path.glob("*.png")} == {"heat-val_loss.png", "heat-edq_ratio.png"}
    assert all((tmp_path / name).exists() for name in summary["runs"])


def test_runs_of_a_sweep_are_those_of_a_comparison(tmp_path: Path) -> None:
    line = ["--strategies", "bf16,fp32-master", *SMALL]
    assert main(["sweep", "--axis", "lr", "--values", "1e-3,2e-3", "--out", str(tmp_path / "sweep"), *line]) == 0
    assert main(["compare", "--lr", "2e-3", "--out", str(tmp_path / "compare"), *line]) == 0
    swept = [one.run for one in Store(tmp_path / "sweep" / "runs").all() if one.asked.settings["lr"] == 2e-3]
    compared = json.loads((tmp_path / "compare" / "summary.json").read_text())["runs"]
    assert {run["strategy"]: run["val_loss"] for run in swept} == {r["strategy"]: r["val_loss"] for r in compared}
    assert {run["strategy"]: run["edq_ratio"] for run in swept} == {r["strategy"]: r["edq_ratio"] for r in compared}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--values", "1e-3,nope"], "--values: 'nope' is no number"),
        (["--values", "1e-3,0.001"], "--values: each once"),
        (["--axis", "batch-size", "--values", "1.5"], "--batch-size: is what --axis varies; give --values instead"),
        (["--axis", "warmup-steps", "--values", "1.5"], "--values: warmup-steps takes whole numbers, got 1.5"),
        (["--values", "-1"], "--values: lr: needs a finite number > 0, got -1.0"),
        (["--strategies", "bf16"], "--strategies: a sweep compares with fp32-master on the same seed; add it"),
        (["--axis", "beta2", "--optimizer", "sgd", "--lr", "0.1"], "--axis beta2: 'sgd' has no such setting"),
        (["--axis", "beta2", "--values", "1.5"], "--values: betas: both need to be in [0, 1)"),
        (["--seeds", "0"], "--seeds: needs a number above 0"),
        (["--strategies", "nope"], "--strategies: unknown 'nope'"),
    ],
)
def test_errors_are_one_line(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--axis", "lr", "--out", str(tmp_path), *SMALL, *given]) == 2
    told, err = capsys.readouterr()
    assert told == ""
    assert message in err
    assert err.count("\n") == 1


def test_how_long_the_rest_takes_is_told_by_runs_of_their_kind_on_this_machine(tmp_path: Path) -> None:
    study = Study(Plan(TASKS["pretrain"], RUN), ("bf16", "fp32-master"), (0, 1), AXES["steps"], (100, 200))
    jobs, store, here = study.jobs(), Store(tmp_path), machine(RUN.compute_dtype())
    stored = [store.add(job.asked, Result("bf16", 0, 1e-4), 3.0, here) for job in jobs[:1]]  # of 100 steps in 2 seconds
    assert _of_finished(jobs[1:], stored) == pytest.approx((2 + 4 + 4) + (2 + 2 + 4 + 4) + 2 * 1.0)
    elsewhere = [store.add(job.asked, Result("bf16", 0, 1e-4), 3.0, ABOUT) for job in jobs[:1]]
    assert _of_finished(jobs[1:], elsewhere) == 0.0


def test_another_sweep_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text('{"task": "pretrain", "axis": "beta2"}')
    assert main([*SWEEP, *SMALL, "--out", str(tmp_path)]) == 2
    assert "holds summary.json of pretrain along beta2; choose another" in capsys.readouterr().err
