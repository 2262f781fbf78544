"""An optimizer's saved state, ours or another's, in our keys; and the same written as another's.

A state of torch.optim is one of ours whose weights and moments have one component each. TransformerEngine and Apex keep
float32 masters, or the 16 bits that a bfloat16 weight lacks of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from collage.optimizers.converting import kept_under
from collage.optimizers.parameters import name_of
from collage.rules import RULES, Rule
from collage.strategies import ROLES, STRATEGIES, Strategy

# Prefix of the state keys of whatever an optimizer of ours keeps per element -> its slot.
SLOTS = {
    slot.prefix: slot
    for rule in RULES.values()
    for slot in rule.slots
    if rule.slots[0].prefix == "param" and slot.role in ROLES
}
_SINGLE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MASTERS = {"master_param": "param_master", "param": "param_master"}  # TransformerEngine's and Apex's keys -> ours
COLLAGE, TORCH, TE, APEX = "collage", "torch", "te", "apex"


@dataclass
class Parameter:
    """One parameter's share of a saved state."""

    id: Any
    name: str | None
    group: int
    state: dict[str, Any]  # in our keys


@dataclass
class Saved:
    """A saved state: whose it is, its groups, its parameters in order."""

    dialect: str
    groups: list[dict[str, Any]]
    parameters: list[Parameter] = field(default_factory=list)

    @property
    def is_named(self) -> bool:
        return all(parameter.name is not None for parameter in self.parameters)


def read(content: Any, what: str) -> Saved:
    """A saved state from what torch.load returned.

    Raises ValueError, beginning with `what`, for anything else.
    """
    groups, states = (content.get(key) if isinstance(content, dict) else None for key in ("param_groups", "state"))
    if not isinstance(states, Mapping) or not isinstance(groups, list) or not all("params" in g for g in groups):
        raise ValueError(f"{what}: not an optimizer's state, which has 'state' and 'param_groups' with 'params'")
    found = Saved(_dialect(groups, states), [dict(group) for group in groups])
    for index, group in enumerate(found.groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for key, name in zip(group["params"], names, strict=True):
            step = group.get("step", states.get("step"))
            found.parameters.append(Parameter(key, name, index, _ours(states.get(key) or {}, step, what)))
    return found


def _dialect(groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Any]) -> str:
    if all("strategy" in group for group in groups):
        return COLLAGE
    keys = {key for state in states.values() if isinstance(state, Mapping) for key in state}
    return TE if "master_param" in keys else APEX if "param" in keys else TORCH


def _ours(state: Mapping[str, Any], step: Any, what: str) -> dict[str, Any]:
    """One parameter's state, in our keys."""
    result: dict[str, Any] = {}
    for key, value in state.items():
        is_remainder = key in _MASTERS and value.dtype == torch.int16
        result["param_lo" if is_remainder else _MASTERS.get(key, key)] = value
    if state:
        result.setdefault("step", torch.as_tensor(1 if step is None else step))
    unknown = [
        key for key, value in result.items() if isinstance(value, Tensor) and value.numel() > 1 and not _prefix(key)
    ]
    if unknown:
        known = ", ".join(prefix for prefix in SLOTS if prefix != "param")
        raise ValueError(f"{what}: keeps {', '.join(unknown)}, of which no format is known; known: {known}")
    return {key: value for key, value in result.items() if value is not None}


def _prefix(key: str) -> str:
    """The slot that a key is of: the longest prefix."""
    return max((prefix for prefix in SLOTS if key == prefix or key.startswith(f"{prefix}_")), key=len, default="")


def rule_of(prefixes: Iterable[str]) -> Rule:
    """As much of a rule as the planes of these slots ask for, the weight's among them."""
    found = {"param", *prefixes}
    slots = tuple(slot for prefix, slot in SLOTS.items() if prefix in found)
    return replace(RULES["adamw"], name=f"slots {','.join(slot.prefix for slot in slots)}", slots=slots)


def slots_in(state: Mapping[str, Any]) -> list[str]:
    """The prefixes of what a state keeps."""
    return list(dict.fromkeys(filter(None, map(_prefix, state))))


def strategy_of(saved: Saved, parameter: Parameter, dtype: torch.dtype, shape: torch.Size, what: str) -> Strategy:
    """What a parameter's state is kept under, its weight being of this dtype and shape. Raises ValueError."""
    if saved.dialect == COLLAGE and parameter.state:
        under = Strategy.parse(saved.groups[parameter.group]["strategy"])
        found = kept_under(rule_of(slots_in(parameter.state)), (under.of(shape), STRATEGIES["fp32"]), parameter.state)
        if found is None:
            raise ValueError(
                f"{what}: the state of '{parameter.name or parameter.id}' has {', '.join(sorted(parameter.state))}, "
                f"which is not what strategy '{under}' keeps"
            )
        return found
    return plain(parameter.state, dtype, what)


def plain(state: Mapping[str, Any], dtype: torch.dtype, what: str) -> Strategy:
    """The strategy of a weight with moments of one component, and perhaps a float32 master or what it lacks of one."""
    if dtype not in _SINGLE:
        raise ValueError(f"{what}: weights of {name_of(dtype)}; float32, bfloat16 and float16 ones can be converted")
    visible = _SINGLE[dtype]
    rest = "int16" if "param_lo" in state else "fp32" if "param_master" in state else ""
    param = f"{visible}+{rest}" if rest and visible != "fp32" else visible
    moments = dict.fromkeys(ROLES[1:], "fp32")
    for prefix, slot in SLOTS.items():
        if prefix in state and slot.role in moments:
            if state[prefix].dtype not in _SINGLE:
                raise ValueError(f"{what}: {prefix} is {name_of(state[prefix].dtype)}; float ones can be converted")
            moments[slot.role] = _SINGLE[state[prefix].dtype]
    return Strategy(param, **moments)
