"""`collage train` killed at any moment, on one process and on two: what is resumed ends as what went on."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits
from safetensors.torch import load_file

from collage.harness.cli import main
from collage.harness.train import checkpoints

STEPS = 24


def arguments(folder: Path, name: str) -> list[str]:
    """A masked model over five epochs, which writes a checkpoint at every step."""
    return [
        "train", "--model", "tiny-bert", "--strategy", "collage-plus-sr", "--out", str(folder / name),
        "--steps", str(STEPS), "--batch-size", "4", "--micro-batch", "2", "--seq-len", "16", "--save-every", "1",
        "--every", "4", "--eval-every", "7", "--eval-sequences", "4", "--shadow", "0",
        "--data", str(folder / "train.txt"), "--validation", str(folder / "validation.txt"),
    ]  # fmt: skip


def start(command: list[str], processes: int) -> list[subprocess.Popen[str]]:
    """The processes of a run, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    ranks = [{**place, "RANK": str(k), "LOCAL_RANK": str(k)} if processes > 1 else {} for k in range(processes)]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "collage", *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", **rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]


def kill_at(moment: random.Random, started: list[subprocess.Popen[str]], out: Path) -> None:
    """SIGKILL a while after some checkpoint, or while some is being written; all processes, one after the other."""
    writing, step = moment.random() < 0.5, moment.randrange(1, STEPS - 1)
    while all(process.poll() is None for process in started):
        done = max((checkpoints.step_of(path) or 0 for path in checkpoints.all_in(out)), default=0)
        if done >= step and (not writing or any(out.glob(f"{checkpoints.STAGING}/*/*"))):
            break
        time.sleep(0.001)
    time.sleep(moment.uniform(0, 0.03))
    for process in moment.sample(started, len(started)):
        process.send_signal(signal.SIGKILL)
        time.sleep(moment.choice((0, 0.005)))
    for process in started:
        process.communicate(timeout=120)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """The weights, and every tensor of the last checkpoint."""
    last = out / f"checkpoint-{STEPS}"
    state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    planes = {f"{i}.{key}": plane for i, planes in state.items() for key, plane in planes.items()}
    return {f"final {name}": x for name, x in load_file(out / "weights.safetensors").items()} | {
        **load_file(last / "model.safetensors"),
        **planes,
    }


def assert_same_run(got: Path, want: Path) -> None:
    ours, theirs = tensors(got), tensors(want)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_same_bits(name, ours[name], tensor)
    assert (got / "metrics.jsonl").read_bytes() == (want / "metrics.jsonl").read_bytes()
    names = [sorted(path.name for path in out.glob("*checkpoint-*")) for out in (got, want)]
    assert names[0] == names[1]
    assert not (got / checkpoints.STAGING).exists()


def killed_and_resumed(folder: Path, processes: int, seed: int, kills: int) -> int:
    """A run killed so many times, against one that was not. Returns how many kills came while it wrote."""
    (folder / "train.txt").write_text("".join(chr(97 + (k * k) % 26) for k in range(320)))
    (folder / "validation.txt").write_text("abcdefghijklmnop" * 8)
    straight, killed, moment = folder / "straight", folder / "killed", random.Random(seed)
    if not straight.exists():
        finish(start(arguments(folder, "straight"), processes))
    written = 0
    for k in range(kills):
        resume = ["--resume"] if k else []
        kill_at(moment, start([*arguments(folder, "killed"), *resume], processes), killed)
        written += any(killed.glob(f"{checkpoints.STAGING}/*/*"))
    assert not (killed / "result.json").exists()
    said = finish(start([*arguments(folder, "killed"), "--resume"], processes))
    assert "going on from checkpoint-" in said
    assert_same_run(killed, straight)
    return written


def finish(started: list[subprocess.Popen[str]]) -> str:
    """Wait for a run's good end. Returns what it printed, which the first process alone does."""
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), said
    assert [out for out, _ in said[1:]] == [""] * len(said[1:])
    return said[0][0]


def test_killed_twice_and_resumed_is_the_run_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("".join(chr(97 + (k * k) % 26) for k in range(320)))
    (tmp_path / "validation.txt").write_text("abcdefghijklmnop" * 8)
    assert main(arguments(tmp_path, "straight")) == 0
    killed_and_resumed(tmp_path, 1, seed=0, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_twenty_moments(tmp_path: Path, processes: int) -> None:
    """Five runs that are killed four times each."""
    written = 0
    for seed in range(5):
        written += killed_and_resumed(tmp_path, processes, seed=100 + seed, kills=4)
        (tmp_path / "killed").rename(tmp_path / f"killed-{seed}")
    assert written >= 3
