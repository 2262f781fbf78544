"""What torchtitan 0.3's `OptimizersContainer` asks of an optimizer, for a machine without torchtitan.

Groups come as dicts with names and torch's switches; states go out and in under names, flat, after a step of zero
gradients at lr 0 that makes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn


@dataclass(kw_only=True, slots=True)
class ParamGroupConfig:
    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


class OptimizersContainer(torch.optim.Optimizer):
    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list[ParamGroupConfig] = field(default_factory=list)
        implementation: str = "fused"

    def __init_subclass__(cls) -> None:
        cls.Config.build = lambda config, *, model_parts: cls(config, model_parts=model_parts)

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        switches = {"fused": config.implementation == "fused", "foreach": config.implementation == "foreach"}
        self.optimizers, every = [], []
        for part in model_parts:
            groups: dict[str, list[dict[str, Any]]] = {}
            left = dict(part.named_parameters())
            for chosen in config.param_groups:
                names = [name for name in left if re.search(chosen.pattern, name)]
                own = {"params": [left.pop(name) for name in names], "param_names": names}
                groups.setdefault(chosen.optimizer_name, []).append({**own, **switches, **chosen.optimizer_kwargs})
                every += own["params"]
            self.optimizers += [self._resolve_optimizer_factory(name)(own) for name, own in groups.items()]
        super().__init__(every, {})

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> type[torch.optim.Optimizer]:
        return {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]

    def __iter__(self) -> Any:
        return iter(self.optimizers)

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for optimizer in self.optimizers:
            _make_state(optimizer)
            saved = optimizer.state_dict()
            for group in saved["param_groups"]:
                for index, name in zip(group["params"], group["param_names"], strict=True):
                    flat |= {f"state.{name}.{key}": x for key, x in saved["state"][index].items()}
                    kept = group.keys() - {"params", "param_names"}
                    flat |= {f"param_groups.{name}.{key}": group[key] for key in kept}
        return flat

    def load_state_dict(self, flat: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            _make_state(optimizer)
            states, groups = {}, []
            for group in optimizer.param_groups:
                names, first = group["param_names"], len(states)
                for name, param in zip(names, group["params"], strict=True):
                    states[len(states)] = {key: flat[f"state.{name}.{key}"] for key in optimizer.state[param]}
                kept = group.keys() - {"params", "param_names"}
                own = {key: flat[f"param_groups.{names[0]}.{key}"] for key in kept}
                groups.append({"params": list(range(first, len(states))), **own})
            optimizer.load_state_dict({"state": states, "param_groups": groups})


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def modules() -> dict[str, ModuleType]:
    """What a script imports of torchtitan."""
    names = ("torchtitan", "torchtitan.components", "torchtitan.components.optimizer")
    made = {name: ModuleType(name) for name in names}
    vars(made[names[2]]).update(OptimizersContainer=OptimizersContainer, ParamGroupConfig=ParamGroupConfig)
    return made
