"""One script under Accelerate on two processes: replicas stay the same, and what is loaded goes on bit for bit."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from helpers import assert_same_bits
from ranks import as_rank, launch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import collage


def prepared(accelerator: Accelerator, strategy: str, seed: int) -> list[Any]:
    """What a script prepares: model, optimizer, data, schedule."""
    torch.manual_seed(seed)
    model = collage.to_bf16(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1)))
    opt = collage.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, strategy=strategy)
    inputs = torch.randn(48, 8, generator=torch.Generator().manual_seed(7)).bfloat16()
    data = DataLoader(TensorDataset(inputs), batch_size=4)
    return list(accelerator.prepare(model, opt, data, torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9**step)))


def train(accelerator: Accelerator, parts: list[Any], first: int, last: int) -> None:
    """Batches of an epoch, two to a step."""
    model, opt, data, schedule = parts
    for k, (x,) in enumerate(data):
        if first <= k < last:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                schedule.step()
                opt.zero_grad()


def planes(parts: list[Any]) -> dict[str, torch.Tensor]:
    """Every bit of the weights and of the optimizer's state."""
    named = parts[0].named_parameters()
    return {f"{name} {key}": x for name, p in named for key, x in {"": p.detach(), **parts[1].state[p]}.items()}


def script(folder: Path, strategy: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    whole = prepared(accelerator, strategy, seed=0)
    watch = collage.monitor(whole[1], every=1)
    train(accelerator, whole, 0, 2)
    accelerator.save_state(str(folder / strategy))
    train(accelerator, whole, 2, 6)
    assert watch.report().total.steps == 3
    for name, x in planes(whole).items():
        first = x.clone()
        dist.broadcast(first.view(torch.uint8) if first.dim() else first, 0)  # gloo sends no 16-bit integers
        assert_same_bits(f"{strategy} {name} of another process", x, first)
    accelerator.free_memory()
    resumed = prepared(accelerator, strategy, seed=1)
    accelerator.load_state(str(folder / strategy))
    train(accelerator, resumed, 2, 6)
    for name, x in planes(whole).items():
        assert_same_bits(f"{strategy} {name} resumed", planes(resumed)[name], x)


def scripts(folder: Path) -> None:
    for strategy in ("collage-plus-sr", "collage-exact", "fp32-master"):
        script(folder, strategy)


def test_two_processes_stay_the_same_and_resume(tmp_path: Path) -> None:
    launch(__file__, 2, str(tmp_path))


if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = os.environ["RANK"]  # by which Accelerate sees that it is launched
    as_rank(scripts, Path(sys.argv[1]))
