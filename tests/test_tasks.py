"""The tasks beside language models: their data, and a comparison that has a score."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits

from collage.harness.cli import main
from collage.harness.experiment import Experiment, Plan
from collage.harness.tasks import images
from collage.harness.tasks.examples import Examples
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


def idx(array: torch.Tensor, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, array.dim())) + struct.pack(f">{array.dim()}I", *array.shape) + array.numpy().tobytes()


def mnist(folder: Path, sizes: dict[str, int] | None = None, side: int = 28, **files: bytes) -> Path:
    """A folder of four tiny files, those in `files` (without what all names end with) as given."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    for part, count in (sizes or {"train": 70, "t10k": 12}).items():
        images = torch.randint(256, (count, side, side), generator=g, dtype=torch.uint8)
        labels = torch.randint(10, (count,), generator=g, dtype=torch.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{part}-{kind}".replace("-", "_")
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(files.get(name, gzip.compress(idx(array))))
    return folder


def test_images_of_a_folder_are_framed_and_standardised(tmp_path: Path) -> None:
    given = torch.arange(70 * 784, dtype=torch.float32).remainder(251).to(torch.uint8).view(70, 28, 28)
    folder = mnist(tmp_path / "fashion", train_images_idx3=gzip.compress(idx(given)))
    found = RunConfig.of("tiny-vit", "x", data=(str(folder),)).corpus()
    assert isinstance(found, Examples)
    pixels = found.train["pixel_values"]
    assert (found.name, pixels.shape, found.validation["labels"].shape) == ("fashion", (70, 1, 32, 32), (12,))
    framed = torch.nn.functional.pad(given.float(), (2, 2, 2, 2)).unsqueeze(1)
    assert_same_bits("pixels", pixels, (framed - framed.mean()) / framed.std())
    assert found.train["labels"].dtype == torch.int64
    (folder / "train-images-idx3-ubyte.gz").unlink()
    (folder / "train-images-idx3-ubyte").write_bytes(idx(given))
    assert images.mnist(folder).checksum() == found.checksum()  # without gzip, as MNIST is also spread


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train_labels_idx1": b"not gzip"}, r"train-labels-idx1-ubyte.gz cannot be read \(Not a gzipped file"),
        ({"train_labels_idx1": gzip.compress(b"text")}, r"is not an idx file of bytes \(begins with '74 65 78 74'\)"),
        ({"train_labels_idx1": gzip.compress(idx(torch.zeros(3), kind=13))}, "is not an idx file of bytes"),
        ({"train_images_idx3": gzip.compress(b"\0\0\x08\x03\0\0")}, "ends within its header"),
        ({"t10k_labels_idx1": gzip.compress(idx(torch.zeros(12).byte())[:-1])}, "has 11 bytes behind its header"),
        ({"t10k_labels_idx1": gzip.compress(idx(torch.zeros(11).byte()))}, r"\(t10k\) needs a label for each image"),
        ({"train_labels_idx1": gzip.compress(idx(torch.full((70,), 26).byte()))}, "need to be below 10, got 26"),
        ({"train_images_idx3": gzip.compress(idx(torch.zeros(70, 8, 8).byte()))}, "need 28 x 28 pixels"),
    ],
)
def test_a_folder_that_is_no_mnist_is_refused(files: dict[str, bytes], said: str, tmp_path: Path) -> None:
    folder = mnist(tmp_path / "x", **files)
    with pytest.raises(ValueError, match=said):
        images.mnist(folder)


def test_folders_are_one_and_have_every_file(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "x", {"train": 70})
    with pytest.raises(ValueError, match=r"has no t10k-images-idx3-ubyte\.gz; give the folder of MNIST's"):
        images.mnist(folder)
    with pytest.raises(ValueError, match="data: takes one folder of images, got 2"):
        images.examples(("a", "b"))


@pytest.mark.parametrize("model", ["tiny-resnet", pytest.param("tiny-vit", marks=pytest.mark.slow)])
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
        (["--task", "vision", "--data", "README.md"], "data: 'README.md' has no train-images-idx3-ubyte.gz; give the"),
        (["--task", "vision", "--data", "a", "b"], "data: takes one folder of images, got 2"),
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
