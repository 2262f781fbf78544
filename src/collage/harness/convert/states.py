"""An optimizer's saved state, ours or another's, in our keys: what it keeps of each parameter, and in which formats.

A state of torch.optim is one of ours whose weights and moments have one component each. TransformerEngine and Apex
keep float32 masters, or the 16 bits that a bfloat16 weight lacks of one. Whatever else an optimizer keeps has a format
by its name, as where it is wrapped, or stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.formats import format_of
from collage.harness.tasks.weights import float32_of
from collage.layout import Plane
from collage.optimizers.loading import other_rule, require_state_dict
from collage.optimizers.parameters import name_of
from collage.optimizers.wrapping.loading import STEP
from collage.optimizers.wrapping.slots import ROLES, Formats
from collage.rules import RULES
from collage.strategies import STRATEGIES, Strategy

COLLAGE, TORCH, TE, APEX = "collage", "torch", "te", "apex"
_SINGLE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MASTERS = ("master_param", "param")  # what TransformerEngine and Apex call ours
_SUFFIXES = ("_lo", "_lo2", "_scale", "_master", "_kahan")


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
    wrapped: bool = False  # of an optimizer that is none of ours

    @property
    def is_named(self) -> bool:
        return all(parameter.name is not None for parameter in self.parameters)


class Number(NamedTuple):
    """What is kept of each element: the prefix of its keys, its format, and the key of each plane."""

    prefix: str
    format: str
    keys: tuple[str, ...]


def read(content: Any, what: str) -> Saved:
    """A saved state from what torch.load returned.

    Raises ValueError, beginning with `what`, for anything else.
    """
    try:
        require_state_dict({**content, "state": _by_parameter(content["state"])})
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{what}: not an optimizer's state, which has 'state' and 'param_groups'") from None
    states, groups = _by_parameter(content["state"]), content["param_groups"]
    found = Saved(_dialect(groups, states), [dict(group) for group in groups])
    for index, group in enumerate(found.groups):
        names = group.get("param_names") or [None] * len(group["params"])
        step = group.get("step", content["state"].get("step"))
        for key, name in zip(group["params"], names, strict=True):
            own = _ours(states.get(key) or {}, step) if found.dialect in (TE, APEX) else states.get(key) or {}
            found.parameters.append(Parameter(key, name, index, dict(own)))
    _require_bias_correction(found, what)
    _require_alike(found, what)
    found.wrapped = _is_wrapped(found)
    return found


def _require_alike(saved: Saved, what: str) -> None:
    """Raise ValueError where a parameter lacks one of Adam's two moments."""
    pair = {"exp_avg", "exp_avg_sq"}
    for p in (p for p in saved.parameters if "betas" in saved.groups[p.group]):
        lacking = pair - {prefix_of(key) for key in p.state}
        others = (pair <= {prefix_of(key) for key in q.state} for q in saved.parameters if q.group == p.group)
        if len(lacking) == 1 and any(others):
            raise ValueError(
                f"{what}: the state of '{p.name or p.id}' has no {lacking.pop()}, which others of its group have; is "
                "it damaged? Give one that was saved whole"
            )


def _by_parameter(states: Mapping[Any, Any]) -> dict[Any, Any]:
    """Without the counter that Apex has among them."""
    return {key: value for key, value in states.items() if key != "step"}


def _dialect(groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Any]) -> str:
    if all("strategy" in group for group in groups):
        return COLLAGE
    keys = {key for state in states.values() for key in state}
    return TE if "master_param" in keys else APEX if "param" in keys else TORCH


def _ours(state: Mapping[str, Any], step: Any) -> dict[str, Any]:
    """A state of Apex or TransformerEngine, whose counter is elsewhere, in our keys."""
    result: dict[str, Any] = {"step": torch.as_tensor(1 if step is None else step)} if state else {}
    for key, value in state.items():
        is_remainder = key in _MASTERS and value.dtype == torch.int16
        result["param_lo" if is_remainder else "param_master" if key in _MASTERS else key] = value
    return result


def _require_bias_correction(saved: Saved, what: str) -> None:
    if not all(group.get("bias_correction", True) for group in saved.groups):
        raise ValueError(f"{what}: was made with bias_correction=False, which no optimizer here has")


def _is_wrapped(saved: Saved) -> bool:
    """Whether a state is none of our rules': saved by `collage.wrap`, or by an optimizer of torch that we have not."""
    states = [parameter.state for parameter in saved.parameters if parameter.state]
    if saved.dialect == COLLAGE:
        return any(STEP in state for state in states)
    return saved.dialect == TORCH and not all(_is_of_a_rule(saved, k) for k in range(len(saved.groups)))


def _is_of_a_rule(saved: Saved, index: int) -> bool:
    states = [parameter.state for parameter in saved.parameters if parameter.group == index and parameter.state]
    ours = [rule for rule in RULES.values() if rule.prefixes[0] == "param" and rule.title]
    return any(not other_rule(rule, saved.groups[index], states) for rule in ours)


def prefix_of(key: str) -> str:
    """The number that a key is of; "" for what has no format."""
    known = (name for name in ("param", *ROLES) if key == name or key.removeprefix(name) in _SUFFIXES)
    return max(known, key=len, default="")


def kept_in(state: Mapping[str, Any], shape: Sequence[int]) -> list[str]:
    """The prefixes of the numbers that a state keeps for each element, the weight first."""
    found = [prefix_of(key) for key, x in state.items() if isinstance(x, Tensor) and (x.dim() or not shape)]
    return list(dict.fromkeys(["param", *filter(None, found)]))


def numbers(prefixes: Iterable[str], strategy: Strategy) -> Iterator[Number]:
    """The formats that a strategy gives to numbers."""
    formats = Formats(strategy, {})
    for prefix in prefixes:
        name = strategy.param if prefix == "param" else str(formats.of(prefix))
        yield Number(prefix, name, tuple(prefix + suffix for suffix in format_of(name).suffixes))


def planes(prefixes: Iterable[str], strategy: Strategy) -> dict[str, Plane]:
    """Key -> plane, of all but the weight itself."""
    found = [pair for n in numbers(prefixes, strategy) for pair in zip(n.keys, format_of(n.format).planes, strict=True)]
    return dict(found[1:])


def strategy_of(saved: Saved, parameter: Parameter, dtype: torch.dtype, shape: torch.Size, what: str) -> Strategy:
    """What a parameter's state is kept under, its weight being of this dtype and shape. Raises ValueError."""
    prefixes = kept_in(parameter.state, shape)
    if saved.dialect != COLLAGE or len(parameter.state) < 2:
        return _plain(parameter.state, prefixes, dtype, what)
    under = Strategy.parse(saved.groups[parameter.group]["strategy"])
    if under.beside is not under:
        whole = float32_of(Path(what))
        wide = f"{whole} has" if whole else "save collage.high_precision_state_dict(model, opt),"
        raise ValueError(
            f"{what}: is of strategy '{under}', whose weights are read by their layers alone; {wide} float32 ones, and "
            "an optimizer of them loads this with opt.load_state_dict(state, convert=True)"
        )
    for strategy in (under.of(shape), STRATEGIES["fp32"]):
        wanted = planes(prefixes, strategy)
        found = {key: x.dtype for key, x in parameter.state.items() if prefix_of(key) in prefixes and prefix_of(key)}
        if found.keys() == wanted.keys() and all(
            dtype in (wanted[key].dtype, torch.int8 if wanted[key].dtype == torch.int16 else None)
            for key, dtype in found.items()
        ):
            return strategy
    raise ValueError(
        f"{what}: the state of '{parameter.name or parameter.id}' has {', '.join(sorted(parameter.state))}, which is "
        f"not what strategy '{under}' keeps"
    )


def _plain(state: Mapping[str, Any], prefixes: Sequence[str], dtype: torch.dtype, what: str) -> Strategy:
    """The strategy of a weight with moments of one component, and perhaps a float32 master or what it lacks of one."""
    rest = "int16" if "param_lo" in state else "fp32" if "param_master" in state and dtype != torch.float32 else ""
    roles = {"momentum": "fp32", "variance": "fp32"}
    for prefix in prefixes[1:]:
        if ROLES[prefix] in roles:
            roles[ROLES[prefix]] = _single(state[prefix].dtype, f"{what}: {prefix}")
    visible = _single(dtype, f"{what}: the weight")
    return Strategy(f"{visible}+{rest}" if rest else visible, **roles)


def _single(dtype: torch.dtype, what: str) -> str:
    if dtype not in _SINGLE:
        raise ValueError(f"{what} is {name_of(dtype)}; what is float32, bfloat16 or float16 can be converted")
    return _SINGLE[dtype]
