"""Start a test file as several processes of one gloo group on this machine; what its tasks use there."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from helpers import assert_same_bits
from torch import nn

from collage.harness.cli import leave
from collage.sharding import as_bytes, from_bytes


def launch(file: str, world: int, *arguments: str, seconds: float = 120) -> None:
    """Run ``python file ARGUMENTS`` as every rank of a world; fail with what they said if one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, file, *arguments],
            env=os.environ | place | {"RANK": str(k)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(world)
    ]
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * world, "\n".join(error[-1500:] for error in errors)


def perform(tasks: Mapping[str, Any]) -> None:
    """What a test file does as a rank: the task that its first argument names, with the others."""
    as_rank(tasks[sys.argv[1]], *sys.argv[2:])


def as_rank(task: Callable[..., None], *arguments: Any) -> None:
    """Do a task as one of a gloo group, and leave."""
    dist.init_process_group("gloo")
    task(*arguments)
    dist.destroy_process_group()
    leave(0)


def whole(tensor: Any) -> torch.Tensor:
    """The unsharded tensor, of 16-bit integers and of float8 too, which gloo does not gather."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.float().full_tensor().to(tensor.dtype)
    return from_bytes(as_bytes(tensor).full_tensor()) if tensor.dtype == torch.int16 else tensor.full_tensor()


def assert_same_as_alone(label: str, ours: nn.Module, opt: Any, alone: nn.Module, other: Any) -> None:
    """Every bit of weights and states, whatever their sharding, is that of a model which is not sharded."""
    for (name, p), q in zip(ours.named_parameters(), alone.parameters(), strict=True):
        assert_same_bits(f"{label} {name}", whole(p.detach()), q.detach())
        assert opt.state[p].keys() == other.state[q].keys(), name
        for key, value in other.state[q].items():
            assert_same_bits(f"{label} {name} {key}", whole(opt.state[p][key]), value)
