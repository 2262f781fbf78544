"""The recipe of docs/frameworks.md, in torchtitan's container of optimizers, or in one that asks the same of them."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import titan_interface
import torch
from helpers import assert_same_bits
from torch import nn

import collage

PAGE = Path(__file__).parent.parent / "docs" / "frameworks.md"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's example defines."""
    if find_spec("torchtitan") is None:
        for name, module in titan_interface.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    (code,) = re.findall(r"^```python\n(from dataclasses.*?torchtitan.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, "example", "exec"), names)
    return names


def made(recipe: dict[str, Any], strategy: str, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential()
    for name, module in (
        ("inner", nn.Linear(8, 16)),
        ("norm", nn.LayerNorm(16)),
        ("out", nn.Linear(16, 1, bias=False)),
    ):
        model.add_module(name, module)
    collage.to_bf16(model)
    return model, recipe["collage_adamw"](1e-2, strategy).build(model_parts=[model])


def train(model: nn.Module, optimizers: Any, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(x).square().mean().backward()
        optimizers.step()
        optimizers.zero_grad()


@pytest.mark.parametrize("strategy", ["collage-plus-sr", "collage-exact", "collage-8bit"])
def test_a_saved_container_goes_on_bit_for_bit(recipe: dict[str, Any], strategy: str) -> None:
    model, optimizers = made(recipe, strategy, seed=0)
    (ours,) = optimizers
    assert type(ours) is collage.AdamW
    assert [group["weight_decay"] for group in ours.param_groups] == [0.0, 0.1]
    train(model, optimizers, 0, 3)
    saved = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in optimizers.state_dict().items()}
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    train(model, optimizers, 3, 6)
    other, loaded = made(recipe, strategy, seed=1)
    loaded.load_state_dict(saved)
    other.load_state_dict(weights)
    train(other, loaded, 3, 6)
    for (name, p), q in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert_same_bits(name, q[1], p)
        for key, plane in ours.state[p].items():
            assert_same_bits(f"{name} {key}", loaded.optimizers[0].state[q[1]][key], plane)


def test_saving_before_the_first_step_changes_no_weight(recipe: dict[str, Any]) -> None:
    model, optimizers = made(recipe, "collage-plus", seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert "state.norm.weight.param_lo" in optimizers.state_dict()
    for name, p in model.named_parameters():
        assert_same_bits(name, p, before[name])


def test_torchs_own_optimizers_are_still_made(recipe: dict[str, Any]) -> None:
    resolve = recipe["CollageOptimizers"]._resolve_optimizer_factory
    assert (resolve("AdamW"), resolve("collage.Lion")) == (torch.optim.AdamW, collage.Lion)
