"""Saved optimizer states: checked, and translated where they are torch's, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from collage.optimizers import checking, planes
from collage.optimizers.converting import Converting, from_torch, kept_under
from collage.optimizers.parameters import Group, Parameter, State
from collage.rules import Rule
from collage.strategies import ROLES, STRATEGIES, Strategy

# What torch's optimizers keep in a group and ours do not, or have as their own: dropped when their state is loaded.
_TORCH_ONLY = ("foreach", "fused", "differentiable", "capturable", "amsgrad", "decoupled_weight_decay")
# Settings that make another rule of the same slots. That there is a dampening tells SGD's, whose momentum is a sum.
_OF_RULES = ("decoupled_weight_decay", "amsgrad", "nesterov", "use_muon")


def paired(parameters: Iterable[Parameter], saved: dict[str, Any]) -> list[tuple[Parameter, int, str]]:
    """Each parameter with its id and name in a saved state."""
    groups = saved["param_groups"]
    ids = [i for group in groups for i in group["params"]]
    names = [name for group in groups for name in _names(group) or map(str, group["params"])]
    return list(zip(parameters, ids, names, strict=False))


def _names(group: Group) -> list[str] | None:
    names = group.get("param_names")
    return list(names) if names and len(names) == len(group["params"]) else None


def in_order(groups: Sequence[Group], saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state with its groups and parameters in the order of ours, where both sides have names.

    Raises ValueError, showing both, where the names are not the same.
    """
    ours, theirs = list(map(_names, groups)), list(map(_names, saved["param_groups"]))
    if None in ours or None in theirs:
        return saved
    here, there = ({name for names in side for name in names or ()} for side in (ours, theirs))
    if here != there:
        raise ValueError(
            "state_dict: it is of other parameters, by name. Only in the state: "
            f"{_listed(there - here)}; only in this optimizer: {_listed(here - there)}. Give both the same parameters, "
            "or make the state one of these: drop or rename parameters of 'param_names' and 'params' together"
        )
    if len(ours) != len(theirs):
        return saved  # torch's own error says it best
    arranged = []
    for index, names in enumerate(ours):
        at = next((k for k, others in enumerate(theirs) if set(others or ()) == set(names or ())), None)
        if at is None:
            raise ValueError(
                f"param_groups[{index}]: it has the parameters {_listed(names or ())}, and no group of the state has "
                f"just these; group {index} there has {_listed(theirs[index] or ())}. Group them as they were saved"
            )
        id_of = dict(zip(theirs[at] or (), saved["param_groups"][at]["params"], strict=True))
        arranged.append({**saved["param_groups"][at], "params": [id_of[name] for name in names or ()]})
        arranged[-1]["param_names"] = names
    return {**saved, "param_groups": arranged}


def _listed(names: Iterable[str]) -> str:
    shown = sorted(names)
    return (", ".join(map(repr, shown[:5])) or "none") + (f" and {len(shown) - 5} more" if shown[5:] else "")


def adopt(
    groups: Sequence[Group],
    parameters: Sequence[Parameter],
    saved: dict[str, Any],
    rule_of: Callable[[Group], Rule],
    strategy_of: Callable[[Parameter], Strategy],
    live: Mapping[Tensor, State] | None = None,  # the optimizer's states now; never changed
    converting: Converting | None = None,  # what takes states of other strategies; None: nothing does
) -> dict[str, Any]:
    """A state_dict for these parameters, out of one of ours or of the torch.optim optimizer of the same rule.

    Raises:
        ValueError: another strategy or optimizer, other names, planes or shapes.
    """
    require_state_dict(saved)
    saved = in_order(groups, saved)
    sizes = ([len(group["params"]) for group in side] for side in (saved["param_groups"], groups))
    if next(sizes) != next(sizes):
        return saved  # torch's own error says it best
    adopted, rules = _adopt_groups(groups, saved, rule_of, converts=converting is not None)
    states = dict(saved["state"])
    for parameter, saved_id, saved_name in paired(parameters, saved):
        theirs, name = states.get(saved_id), parameter.name
        if theirs:
            named = parameter._replace(name=name if saved_name == name else f"{name} (saved as {saved_name})")
            group, own = saved["param_groups"][parameter.group_index], (live or {}).get(parameter.tensor, {})
            under = rules[parameter.group_index], strategy_of(parameter)
            states[saved_id] = _adopt_state(*under, named, theirs, group, own, converting)
    if converting:
        converting.require_fit()
    return {**saved, "state": states, "param_groups": adopted}


def _adopt_groups(
    groups: Sequence[Group], saved: Mapping[str, Any], rule_of: Callable[[Group], Rule], converts: bool
) -> tuple[list[Group], list[Rule]]:
    """The saved groups as ours, and the rules that their settings ask for. Raises ValueError as `adopt` does."""
    adopted, rules = [], []
    for index, (theirs, ours) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        adopted.append(_adopt_group(index, theirs, ours, converts))
        rules.append(rule_of(adopted[-1]))
        if "strategy" not in theirs:
            states = [saved["state"][i] for i in theirs["params"] if saved["state"].get(i)]
            reason = other_rule(rules[-1], theirs, states)
            if reason:
                raise ValueError(f"param_groups[{index}]: the saved state is not one of {rules[-1].title}: {reason}")
    return adopted, rules


def _adopt_state(
    rule: Rule,
    strategy: Strategy,
    parameter: Parameter,
    theirs: State,
    group: Group,  # it was saved in
    own: State,  # that it has now
    converting: Converting | None,
) -> State:
    """The saved state of one parameter as it is kept here. Raises ValueError, naming it, where it cannot be."""
    if isinstance(theirs.get("step"), int | float):  # so in old releases of torch, and by hand
        theirs = {**theirs, "step": torch.tensor(theirs["step"], dtype=torch.float64, device="cpu")}
    if "strategy" not in group:
        theirs = from_torch(rule, strategy, parameter, theirs, own, converting.report if converting else None)
    elif converting:
        theirs = _converted(converting, rule, group, strategy, parameter, theirs, own)
    theirs = planes.begun(rule, strategy, parameter.tensor, theirs)
    checking.check(rule, strategy, parameter.tensor, planes.in_words(rule, strategy, theirs), parameter.name)
    return {**theirs, "step": checking.count(theirs["step"], parameter.name)}


def _converted(
    converting: Converting,
    rule: Rule,
    group: Group,
    strategy: Strategy,
    parameter: Parameter,
    theirs: State,
    own: State,
) -> State:
    """A saved state under the strategy that its parameter has here. What cannot be told is left for the check."""
    there, shape = Strategy.parse(group["strategy"]), parameter.tensor.shape
    candidates = (there.of(shape), there.beside.of(shape), STRATEGIES["fp32"])
    saved = kept_under(rule, candidates, theirs)
    if saved in (None, strategy):
        return theirs
    return converting.state(rule, saved, strategy, parameter, theirs, own)


def is_foreign(saved: Mapping[str, Any]) -> bool:
    """Whether a state is one of torch's, which knows no components."""
    return not all("strategy" in group for group in saved.get("param_groups", ()))


def require_state_dict(saved: Mapping[str, Any]) -> None:
    groups, states = saved.get("param_groups"), saved.get("state")
    is_whole = isinstance(states, Mapping) and all(isinstance(x, Mapping) for x in states.values())
    if not is_whole or not isinstance(groups, list) or not all("params" in group for group in groups):
        raise ValueError(
            "state_dict: needs 'state' (id -> dict) and 'param_groups' (a list of dicts with 'params'), as "
            f"opt.state_dict() has them; got the keys {list(saved)[:10]}"
        )


def other_rule(rule: Rule, group: Group, states: Sequence[State]) -> str:
    """Why a group of one of torch's optimizers, and its states, are not this rule's; "" if they are."""
    needed = [*(["step"] if rule.torch_counts else []), *rule.prefixes[1:]]
    found = sorted({key for theirs in states for key in theirs})
    lacking = any(key not in theirs for theirs in states for key in needed)
    return f"it needs {', '.join(needed)}, and has {', '.join(found)}" if lacking else rule.torch(group, set(found))


def _adopt_group(index: int, theirs: Group, ours: Group, converts: bool) -> Group:
    """The saved group, if it is of the same strategy; or torch's, with our settings where torch has none."""
    settings = {key: value for key, value in ours.items() if key != "params"}
    names = {"param_names": ours["param_names"]} if "param_names" in ours else {}  # they give the random bits
    if "strategy" not in theirs:
        return {**settings, **{key: value for key, value in theirs.items() if key not in _TORCH_ONLY}, **names}
    for key in (*_OF_RULES, *({"dampening"} - ours.keys())):
        if theirs.get(key, ours.get(key)) != ours.get(key):
            here = ours.get(key, "no such setting")
            raise ValueError(
                f"param_groups[{index}]: the state was saved with {key}={theirs[key]}, this optimizer has {here}; "
                "construct it as the one that was saved"
            )
    saved, current = Strategy.parse(theirs["strategy"]), Strategy.parse(ours["strategy"])
    if saved == current or converts:
        # A setting that came later keeps our value. `capturable` says how to run, not what was trained.
        return {**settings, **theirs, **names, "strategy": ours["strategy"], "capturable": ours["capturable"]}
    pairs = [(name, getattr(saved, name), getattr(current, name)) for name in (*ROLES, "arithmetic")]
    difference = "; ".join(f"{name}: saved {a}, here {b}" for name, a, b in pairs if a != b)
    raise ValueError(
        f"param_groups[{index}]: the state was saved under strategy '{saved}', this optimizer has '{current}' "
        f"({difference}); construct it with strategy='{saved}', or convert the state, once the model has its weights: "
        "opt.load_state_dict(state, convert=True)"
    )
