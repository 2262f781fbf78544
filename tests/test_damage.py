"""Damaged checkpoints of `collage train`, in more than 200 ways: each is found, or makes no difference."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits
from rich.console import Console

from collage.harness.cli import main
from collage.harness.tasks.data import Corpus
from collage.harness.train import checkpoints, resuming, training
from collage.harness.train.config import RunConfig

NEWEST, OLDER = "checkpoint-3", "checkpoint-2"

Damage = Callable[[Path, random.Random], None]  # of the newest checkpoint, or of one of its files


class Runs:
    """A run of three checkpoints."""

    def __init__(self, folder: Path) -> None:
        (folder / "train.txt").write_text("".join(chr(97 + (k * k) % 26) for k in range(320)))
        (folder / "validation.txt").write_text("abcdefghijklmnop" * 8)
        files = {"data": (str(folder / "train.txt"),), "validation": (str(folder / "validation.txt"),)}
        small = {
            "steps": 4,
            "batch_size": 4,
            "seq_len": 16,
            "eval_sequences": 4,
            "shadow": 0,
            "save_every": 1,
            "keep": 9,
        }
        self.config = RunConfig.of("tiny-gpt", folder / "run", **files, **small, resume=True)
        self.corpus: Corpus = self.config.corpus()
        training.run(self.config, self.corpus)
        shutil.rmtree(self.config.out / "checkpoint-4")

    def copy(self, folder: Path) -> Path:
        """The two newest checkpoints, without writing their contents again."""
        for name in (NEWEST, OLDER):
            shutil.copytree(self.config.out / name, folder / name, copy_function=os.link)
        return folder

    def begin(self, folder: Path) -> Path | None:
        """What `collage train --resume` goes on from."""
        return resuming.begin(replace(self.config, out=folder), self.corpus, Console(quiet=True))[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def written(file: Path, contents: bytes) -> None:
    file.unlink()  # it is a link
    file.write_bytes(contents)


def cut(file: Path, chance: random.Random) -> None:
    written(file, file.read_bytes()[: chance.randrange(file.stat().st_size)])


def flip(file: Path, chance: random.Random) -> None:
    contents = bytearray(file.read_bytes())
    contents[chance.randrange(len(contents))] ^= 1 << chance.randrange(8)
    written(file, bytes(contents))


def overwrite(file: Path, chance: random.Random) -> None:
    contents = bytearray(file.read_bytes())
    at, size = chance.randrange(len(contents)), chance.choice((1, 16, 512, 4096))
    contents[at : at + size] = chance.randbytes(len(contents[at : at + size]))
    written(file, bytes(contents))


def append(file: Path, chance: random.Random) -> None:
    written(file, file.read_bytes() + chance.randbytes(1))


def empty(file: Path, _: random.Random) -> None:
    written(file, b"")


def zeros(file: Path, _: random.Random) -> None:
    written(file, bytes(file.stat().st_size))


def delete(file: Path, _: random.Random) -> None:
    file.unlink()


def other_steps(file: Path, _: random.Random) -> None:
    written(file, (file.parent.parent / OLDER / file.name).read_bytes())


def folder_instead(file: Path, _: random.Random) -> None:
    file.unlink()
    file.mkdir()


OF_FILES: tuple[tuple[Damage, int], ...] = (
    (cut, 4), (flip, 8), (overwrite, 4), (append, 1), (empty, 1), (zeros, 1), (delete, 1), (other_steps, 1),
    (folder_instead, 1),
)  # fmt: skip


def damages(checkpoint: Path) -> Iterator[tuple[str, str, Damage]]:
    """Every file in every way, as often as said."""
    for file in sorted(path.name for path in checkpoint.iterdir()):
        for damage, times in OF_FILES:
            for _ in range(times):
                yield f"{damage.__name__} {file}", file, damage


def same_contents(one: Path, other: Path) -> bool:
    names = {path.name for path in other.iterdir()}
    return all((one / name).is_file() and (one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_every_damage_of_a_file_is_found(runs: Runs, tmp_path: Path) -> None:
    """The next older checkpoint is taken, and the damaged one set aside; or nothing has changed."""
    chance, numbers, found = random.Random(0), count(), 0
    for what, file, damage in damages(runs.config.out / NEWEST):
        folder = runs.copy(tmp_path / str(next(numbers)))
        damage(folder / NEWEST / file, chance)
        start = runs.begin(folder)
        assert start is not None, what
        if start.name == NEWEST:
            assert same_contents(start, runs.config.out / NEWEST), f"{what} was not found"
        else:
            assert (start.name, (folder / f"incomplete-{NEWEST}").exists()) == (OLDER, True), what
            found += 1
        shutil.rmtree(folder)
    assert found >= 200


def test_what_is_found_is_told(runs: Runs, tmp_path: Path) -> None:
    for k, (damage, words) in enumerate((
        (cut, r"optimizer.pt has \d+ bytes instead of"),
        (flip, "optimizer.pt has other contents than were written"),
        (delete, "optimizer.pt is missing"),
        (other_steps, "optimizer.pt has other contents than were written"),
    )):  # fmt: skip
        folder = runs.copy(tmp_path / str(k))
        damage(folder / NEWEST / "optimizer.pt", random.Random(1))
        _, said = checkpoints.newest_whole(folder)
        assert re.match(f"skipped checkpoint-3: {words}.*; set aside as incomplete-checkpoint-3", *said)


def resealed(manifest: Path, **changes: object) -> None:
    """A manifest that is whole and says something else."""
    content = {**json.loads(manifest.read_text()), **changes}
    del content["crc32"]
    written(manifest, json.dumps({**content, "crc32": checkpoints.seal(content)}).encode())


def test_what_belongs_elsewhere_is_refused_by_name(runs: Runs, tmp_path: Path) -> None:
    """A whole checkpoint of another run, text or version: nothing is set aside, the error says which."""

    manifest = json.loads((runs.config.out / NEWEST / "complete.json").read_text())
    run = manifest["run"]
    for k, (changes, words) in enumerate((
        ({"run": {**run, "strategy": "bf16"}}, "has other settings .strategy: saved 'bf16', here 'collage-plus'"),
        ({"run": {**run, "model": "tiny-bert"}}, "has other settings .model: saved 'tiny-bert', here 'tiny-gpt'"),
        ({"run": {**run, "lr": 0.5, "seed": 1}}, "has other settings .seed: saved 1, here 0; lr: saved 0.5"),
        ({"format": 3, "made_by": {"collage": "9.0"}}, "in format 3, of collage 9.0; collage .* reads format 2"),
        ({"text": 1}, "was trained on other text than --data"),
    )):  # fmt: skip
        folder = runs.copy(tmp_path / str(k))
        resealed(folder / NEWEST / "complete.json", **changes)
        with pytest.raises(ValueError, match=f"checkpoint-3 .*{words}"):
            runs.begin(folder)
        assert (folder / NEWEST).exists()


def test_a_checkpoint_under_another_name_or_with_more_in_it_is_damaged(runs: Runs, tmp_path: Path) -> None:
    stranger = "adapter_model.safetensors"
    for k, (damage, words) in enumerate((
        (lambda folder: (folder / NEWEST).rename(folder / "checkpoint-4"), "its complete.json is of step 3"),
        (lambda folder: (folder / NEWEST / stranger).write_bytes(b""), f"{stranger} does not belong to it"),
        (lambda folder: written(folder / NEWEST / "complete.json", b"{}"), "its complete.json is damaged"),
        (lambda folder: folder_instead(folder / NEWEST / "complete.json", random.Random()), "its complete.json cannot"),
    )):  # fmt: skip
        folder = runs.copy(tmp_path / str(k))
        damage(folder)
        start, said = checkpoints.newest_whole(folder)
        assert start == folder / OLDER
        assert words in said[0]


def test_another_version_that_wrote_it_is_told(runs: Runs, tmp_path: Path) -> None:
    folder = runs.copy(tmp_path)
    resealed(folder / NEWEST / "complete.json", made_by={"collage": "0.0.9", "torch": torch.__version__})
    start, said = checkpoints.newest_whole(folder)
    assert start == folder / NEWEST
    assert said[0].startswith("checkpoint-3 was written by collage 0.0.9 (here ")


def test_nothing_is_set_aside_where_nothing_is_whole(runs: Runs, tmp_path: Path) -> None:
    folder = runs.copy(tmp_path)
    for name in (NEWEST, OLDER):
        flip(folder / name / "model.safetensors", random.Random(2))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"is whole .checkpoint-3: model\.safetensors has other"):
            runs.begin(folder)
    assert sorted(path.name for path in checkpoints.all_in(folder)) == [OLDER, NEWEST]


@pytest.mark.parametrize("contents", ["", "{", "[1]", '{"other": 1}', "\x00\xff"])
def test_damaged_files_beside_the_checkpoints_are_told(
    runs: Runs, tmp_path: Path, contents: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.copy(tmp_path / "run")
    command = ["train", "--model", "tiny-gpt", "--out", str(folder), "--resume"]
    for name in ("settings.json", "result.json"):
        (folder / name).write_text(contents)
        assert main(command) == 2
        assert f"--resume: {folder / name} cannot be read; delete it" in capsys.readouterr().err
        (folder / name).unlink()
    (folder / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n' + contents + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl cannot be read; delete it"):
        runs.begin(folder)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(runs: Runs, tmp_path: Path) -> None:
    whole, damaged = runs.copy(tmp_path / "whole"), runs.copy(tmp_path / "damaged")
    flip(damaged / NEWEST / "optimizer.pt", random.Random(3))
    results = []
    for folder in (whole, damaged):
        start = runs.begin(folder)
        results.append(training.run(replace(runs.config, out=folder), runs.corpus, resume=start))
    assert [result.since_step for result in results] == [3, 2]
    for name, tensor in results[0].weights.items():
        assert_same_bits(name, results[1].weights[name], tensor)
