"""A model that was trained, converted and trained on: the loss goes on as if nothing had been converted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import collage
from collage import STRATEGIES
from collage.harness.cli import main
from collage.harness.tasks import recipes
from collage.harness.tasks.data import default_corpus
from collage.harness.train.computing import computed
from collage.strategies import Strategy

NATS = 0.01


class Training:
    """A small Llama on the embedded text, whose k-th step sees the same windows whoever makes it."""

    def __init__(self, batch: int = 4, length: int = 64) -> None:
        self.text, self.batch, self.length = default_corpus(), batch, length

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        built = recipes.build("tiny-llama", self.text.tokens.vocab_size, seed=0)
        return built.to(dtype) if dtype == torch.float32 else collage.to_bf16(built)

    def losses(self, model: Any, opt: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
        """Train; the loss of each step."""
        found = []
        for step in steps:
            g = torch.Generator().manual_seed(step)
            at = torch.randint(0, len(self.text.train) - self.length, (self.batch,), generator=g)
            ids = torch.stack([self.text.train[k : k + self.length] for k in at.tolist()]).long()
            loss = computed(model, {"input_ids": ids, "labels": ids}, torch.float32).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
            found.append(loss.item())
        return found


def optimizer_of(strategy: str, model: Any) -> collage.AdamW:
    return collage.AdamW(model.named_parameters(), lr=1e-3, strategy=strategy)


def save(folder: Path, model: Any, opt: torch.optim.Optimizer) -> Path:
    model.save_pretrained(folder)
    torch.save(opt.state_dict(), folder / "optimizer.pt")
    return folder


def resumed(training: Training, folder: Path, strategy: str) -> tuple[Any, torch.optim.Optimizer]:
    """The model and the optimizer that a folder holds; strategy: "torch" for torch's AdamW."""
    dtype = torch.float32 if strategy == "torch" else Strategy.parse(strategy).dtype
    model = training.model(dtype)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3) if strategy == "torch" else optimizer_of(strategy, model)
    opt.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return model, opt


def chain(folder: Path, start: Path, strategies: Iterable[str]) -> Path:
    """Converted through these in turn, by the command."""
    for k, strategy in enumerate(strategies):
        out = folder / f"{k}-{strategy}"
        assert main(["convert", str(start), str(out), "--to", strategy]) == 0
        start = out
    return start


def assert_goes_on(tmp_path: Path, training: Training, first: int, more: int, through: list[str]) -> None:
    """Each step's loss after the chain and back, and after leaving for torch, is within NATS of the run's own."""
    model = training.model(torch.bfloat16)
    opt = optimizer_of("fp32-master", model)
    training.losses(model, opt, range(first))
    start = save(tmp_path / "start", model, opt)
    own = training.losses(model, opt, range(first, first + more))
    back = chain(tmp_path, start, [*through, "fp32-master"])
    left = chain(tmp_path / "left", back, ["torch"])
    for folder, strategy in ((back, "fp32-master"), (left, "torch")):
        found = training.losses(*resumed(training, folder, strategy), range(first, first + more))
        apart = max(abs(a - b) for a, b in zip(found, own, strict=True))
        print(f"{strategy} after {len(through)} strategies: {apart:.5f} nats, losses {own[0]:.4f} to {own[-1]:.4f}")
        assert apart < NATS, f"{strategy}: {apart:.5f}"


def test_a_converted_run_goes_on(tmp_path: Path) -> None:
    assert_goes_on(tmp_path, Training(batch=2, length=32), 8, 4, ["collage-exact", "collage-8bit-plus", "collage-fp16"])


@pytest.mark.slow
def test_a_run_converted_through_every_strategy_goes_on(tmp_path: Path) -> None:
    assert_goes_on(tmp_path, Training(), 100, 50, list(STRATEGIES))
