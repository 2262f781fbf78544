"""The tasks beside language models: their data, and a comparison that has a score."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import assert_same_bits

from collage.harness.cli import main
from collage.harness.experiment import Experiment, Plan
from collage.harness.tasks import images
from collage.harness.tasks.recipes import RECIPES
from collage.harness.tasks.registry import TASKS, get_task
from collage.harness.train.config import RunConfig

SHORT = ("--steps", "3", "--every", "2", "--eval-sequences", "60", "--shadow", "16")


def test_rows_are_consistent() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert set(task.models) <= RECIPES.keys()
        RunConfig.of(task.models[0], "x", steps=task.steps, **task.settings)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"--task: unknown 'nope'; known: pretrain, finetune"):
        get_task("nope")


def test_digits_are_split_once_and_standardised() -> None:
    found = images.digits()
    assert found.checksum() == images.digits().checksum()
    assert found.train["pixel_values"].shape == (1437, 1, 32, 32)
    assert found.validation["labels"].shape == (360,)
    assert found.validation["labels"].unique().tolist() == list(range(10))
    pixels = found.train["pixel_values"]
    assert pixels.mean().item() == pytest.approx(0, abs=1e-5)  # a float32 sum of 1.5 M pixels
    assert pixels.std().item() == pytest.approx(1, abs=1e-5)
    assert_same_bits("a pixel is drawn as 4 x 4", pixels[..., ::4, ::4], pixels[..., 3::4, 3::4])


@pytest.mark.parametrize("model", TASKS["vision"].models)
def test_compare_images(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["compare", "--task", "vision", "--model", model, "--strategies", "bf16,fp32-master", *SHORT]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["task"], summary["score"]["name"]) == ("vision", "accuracy")
    for run in summary["runs"]:
        assert 0 <= run["score"] <= 1
        assert run["score"] * 60 == pytest.approx(round(run["score"] * 60))  # of 60 images
    assert "Accuracy" in capsys.readouterr().out
    assert (tmp_path / "out" / "plots" / "score.png").exists()
    assert "Accuracy" in (tmp_path / "out" / "report.html").read_text()


def test_experiments_repeat_bit_for_bit() -> None:
    """Whatever ran before: the same strategy and seed give the same losses."""
    task = TASKS["vision"]
    config = RunConfig.of("tiny-vit", "x", steps=3, eval_sequences=60, every=2)
    experiment = Experiment(Plan.of(task, config))
    first, other, again = (experiment.run("collage-plus-sr", seed) for seed in (1, 2, 1))
    assert first.curve == again.curve
    assert first.curve != other.curve
    assert first.score == again.score
    slower = experiment.run("collage-plus-sr", 1, lr=1e-5)
    assert slower.val_loss != first.val_loss


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--task", "vision", "--model", "tiny-llama"], "--model: task 'vision' trains tiny-resnet, tiny-vit; got"),
        (["--task", "vision", "--seq-len", "16"], "--seq-len: 'tiny-resnet' takes images of 32 x 32 pixels; leave it"),
        (["--task", "vision", "--data", "README.md"], "--data: 'tiny-resnet' is trained on images, not on text"),
        (["--task", "vision", "--finetune"], "--finetune: is --task finetune, got --task vision; leave out one"),
        (["--task", "vision", "--pretrain-steps", "3"], "--pretrain-steps, --finetune-data: only with --finetune"),
        (["--task", "vision", "--batch-size", "2000", "--micro-batch", "2000"], "digits has 1437 examples to train on"),
    ],
)
def test_errors_are_one_line(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["compare", "--task", "vision", "--out", str(tmp_path / "out")]) == 2
    assert "needs the package sklearn: install it with `pip install 'collage-optim[vision]'`" in capsys.readouterr().err


def test_a_classifier_is_trained_and_resumed(tmp_path: Path) -> None:
    argv = ["train", "--model", "tiny-resnet", *SHORT, "--save-every", "2", "--strategy", "collage-plus"]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "part")  # as if interrupted after the second step
    shutil.rmtree(tmp_path / "part" / "checkpoint-3")
    (tmp_path / "part" / "result.json").unlink()
    assert main([*argv, "--out", str(tmp_path / "part"), "--resume"]) == 0
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "part")]
    assert results[0]["val_loss"] == results[1]["val_loss"]
    assert results[0]["score"] == results[1]["score"]
    assert results[1]["since_step"] == 2
