"""`collage train` on two processes: DDP and FSDP2 train as one process does, and write and read its checkpoints.

torchrun starts this file once for all checks that need two processes; the others read what it left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from ranks import as_rank
from safetensors.torch import load_file

from collage.harness.cli import main
from collage.harness.train import checkpoints

STRATEGY = "collage-exact-lean"  # 16-bit remainders, which a shard saves as bytes, and stochastic rounding
SETTINGS = (
    "train", "--model", "tiny-llama", "--strategy", STRATEGY, "--steps", "6", "--batch-size", "4", "--micro-batch", "2",
    "--seq-len", "16", "--every", "2", "--eval-every", "4", "--eval-sequences", "5", "--save-every", "3", "--keep", "9",
    "--shadow", "0",
)  # fmt: skip

FP8 = ("--strategy", "collage-fp8")


def settings(folder: Path, name: str, *more: str) -> list[str]:
    files = ["--data", str(folder / "train.txt"), "--validation", str(folder / "validation.txt")]
    return [*SETTINGS, *files, "--out", str(folder / name), *more]


def texts(folder: Path) -> None:
    """Twenty windows of 16 bytes, five steps of four: the sixth is of the next epoch."""
    (folder / "train.txt").write_text("".join(chr(97 + (k * k) % 26) for k in range(320)))
    (folder / "validation.txt").write_text("abcdefghijklmnop" * 8)


def begun(folder: Path, source: str, name: str, step: int = 3) -> None:
    """A run that was interrupted after one checkpoint of another."""
    shutil.copytree(folder / source / f"checkpoint-{step}", folder / name / f"checkpoint-{step}")
    shutil.copy(folder / source / "metrics.jsonl", folder / name)


def on_every_rank(folder: Path) -> None:
    """What torchrun starts. Every process sees the same exit codes."""
    first = os.environ["RANK"] == "0"

    def train(name: str, *more: str) -> int:
        return main(settings(folder, name, *more))

    assert train("ddp") == 0
    assert train("shards", "--shard") == 0
    for source, name in (("ddp", "ddp-resumed"), ("shards", "shards-resumed"), ("one", "shards-of-one")):
        if first:
            begun(folder, source, name)
        assert train(name, "--resume", *(["--shard"] if "shards" in name else [])) == 0
    assert train("ddp-fp8", *FP8) == 0
    assert train("shards-fp8", "--shard", *FP8) == 0
    if first:
        begun(folder, "shards-fp8", "shards-fp8-resumed")
    assert train("shards-fp8-resumed", "--shard", "--resume", *FP8) == 0
    if first:
        begun(folder, "one", "one-in-shards", step=6)
    assert train("one-in-shards", "--shard", "--resume") == 0
    for more in (["--batch-size", "5", "--micro-batch", "5"], ["--data", "nope.txt"]):
        try:
            code = train("refused", *more)
        except SystemExit as end:
            code = int(str(end.code))
        assert code == 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run on one process, and those of two."""
    folder = tmp_path_factory.mktemp("runs")
    texts(folder)
    assert main(settings(folder, "one")) == 0
    assert main(settings(folder, "one-fp8", *FP8)) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights.safetensors")


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: the weights, and the optimizer's planes."""
    checkpoint = run / f"checkpoint-{step}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    planes = {f"{i}.{key}": plane for i, planes in saved.items() for key, plane in planes.items()}
    return load_file(checkpoint / "model.safetensors") | planes


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_same_bits(name, got[name], tensor)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_ddp_trains_as_one_process_does(runs: Any) -> None:
    """Bit for bit: the mean of two is rounded once, by DDP as by the accumulation of two passes."""
    folder, _ = runs
    assert_same(weights(folder / "ddp"), weights(folder / "one"))
    assert_same(state(folder / "ddp", 6), state(folder / "one", 6))
    assert_same(state(folder / "ddp-fp8", 6), state(folder / "one-fp8", 6))
    for got, want in zip(records(folder / "ddp"), records(folder / "one"), strict=True):
        if want["kind"] == "train":
            # the mean over two processes of float32 sums, instead of one sum: an ulp
            assert got.pop("loss") == pytest.approx(want.pop("loss"), rel=2**-22)
        assert got == want


def test_shards_train_as_one_process_does(runs: Any) -> None:
    """Nearly: a gradient's mean is rounded to bfloat16 once, not after every pass."""
    folder, _ = runs
    got, want = records(folder / "shards"), records(folder / "one")
    assert [(r["kind"], r["step"]) for r in got] == [(r["kind"], r["step"]) for r in want]
    for mine, theirs in zip(got, want, strict=True):
        # bfloat16 gradients differ by an ulp, 2**-8 of them; six steps of the rounding's size
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        if mine["kind"] == "train":  # sums over both processes
            assert mine["edq"] == pytest.approx(theirs["edq"], rel=1e-2)


def test_shards_write_the_checkpoints_of_one_process(runs: Any) -> None:
    folder, _ = runs
    got, want = state(folder / "shards", 6), state(folder / "one", 6)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
    files = [{file.name for file in (folder / run / "checkpoint-6").iterdir()} for run in ("shards", "one")]
    assert files[0] - files[1] == set(checkpoints.rng_files(2))
    assert files[1] - files[0] == set(checkpoints.rng_files(1))


@pytest.mark.parametrize("how", ["ddp", "shards", "shards-fp8"])
def test_resume_is_bit_exact(runs: Any, how: str) -> None:
    folder, _ = runs
    assert_same(state(folder / f"{how}-resumed", 6), state(folder / how, 6))
    assert_same(weights(folder / f"{how}-resumed"), weights(folder / how))
    metrics = [(folder / run / "metrics.jsonl").read_bytes() for run in (f"{how}-resumed", how)]
    assert metrics[0] == metrics[1]


def test_a_checkpoint_goes_into_shards_bit_for_bit(runs: Any) -> None:
    """Of the last step: nothing is trained any more, and the weights come out of the components as they were."""
    folder, _ = runs
    assert_same(weights(folder / "one-in-shards"), weights(folder / "one"))


def test_another_number_of_processes_goes_on(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, done = runs
    assert "going on from checkpoint-3" in done.stdout
    assert "it was made by 1 process: the curve goes on, with other last bits" in done.stdout
    begun(folder, "shards", "one-of-shards")
    assert main(settings(folder, "one-of-shards", "--resume")) == 0
    assert "it was made by 2 processes, sharded" in capsys.readouterr().out
    for run, begins in (("one-of-shards", "shards"), ("shards-of-one", "one")):
        told = {(r["kind"], r["step"]): r["loss"] for r in records(folder / begins)}
        for record in records(folder / run):
            # as above: gradients that were rounded otherwise
            assert record["loss"] == pytest.approx(told[record["kind"], record["step"]], rel=1e-3)


def test_one_process_prints_and_errors_are_told_once(runs: Any) -> None:
    _, done = runs
    assert done.stdout.count("collage-exact-lean: validation loss") == 6
    refused = "collage: --batch-size: 5 sequences cannot be shared evenly by 2 processes; give a multiple of 2"
    assert done.stderr.count(refused) == 1
    assert done.stderr.count("data 'nope.txt': no such file or folder") == 1


def test_other_epochs_are_not_mixed(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """22 windows are five steps and a half, or five, as the processes share them."""
    folder, _ = runs
    begun(folder, "ddp", "uneven", step=6)
    checkpoint = folder / "uneven" / "checkpoint-6"
    text = folder / "long.txt"
    text.write_text((folder / "train.txt").read_text() + "x" * 32)
    manifest = json.loads((checkpoint / "complete.json").read_text())
    manifest["run"]["data"] = [str(text)]
    del manifest["crc32"]
    from collage.harness.train.config import RunConfig

    files = {"data": (str(text),), "validation": (str(folder / "validation.txt"),)}
    config = RunConfig.of("tiny-llama", folder / "uneven", **files, seq_len=16)
    manifest["text"] = config.corpus().checksum()
    manifest["crc32"] = checkpoints.seal(manifest)
    (checkpoint / "complete.json").write_text(json.dumps(manifest))
    assert main([*settings(folder, "uneven", "--resume"), "--data", str(text)]) == 2
    error = capsys.readouterr().err
    assert "checkpoint-6 was made by 2 processes, here are 1; the 22 windows of text are not whole steps of 4" in error


def test_shards_of_one_process_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts(tmp_path)
    assert main(settings(tmp_path, "run", "--shard")) == 2
    assert "--shard: there is one process; start several (torchrun --nproc-per-node 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


HELD = """
import atexit, time, torch, torch.distributed as dist
from collage.harness.cli import leave
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(3), async_op=True).get_future().then(lambda _: time.sleep(1))  # a worker is still at it
atexit.register(print, "left")
print("said", end=" ")
leave(3)
"""


def test_a_worker_of_gloo_does_not_spoil_the_end_of_a_process() -> None:
    """Without WORLD_SIZE, a signal ends this one: its worker asks for the interpreter's lock when that has ended."""
    environment = {**os.environ, "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", HELD], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "said left\n"), done.stderr


def test_compare_is_not_for_several(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare"]) == 2
    assert "collage compare: runs in one process; leave out torchrun" in capsys.readouterr().err


if __name__ == "__main__":
    as_rank(on_every_rank, Path(sys.argv[1]))  # one group for all runs
