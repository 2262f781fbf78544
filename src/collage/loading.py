"""Saved optimizer states: checked, and translated where they are torch's, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from collage import state
from collage.rules import Rule
from collage.state import Entry, Group, State
from collage.strategies import Strategy

# What torch's optimizers keep in a group and this one does not: dropped when their state is loaded.
_TORCH_ONLY = ("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


def paired(entries: Iterable[Entry], saved: dict[str, Any]) -> list[tuple[Entry, int]]:
    """Each parameter with its id in a saved state. A wrong number of parameters is left to torch's own error."""
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    return list(zip(entries, ids, strict=False))


def adopt(
    rule: Rule,
    groups: Sequence[Group],
    entries: Sequence[Entry],
    saved: dict[str, Any],
    strategy_of: Callable[[Entry], Strategy],
    live: Mapping[Tensor, State] | None = None,  # the optimizer's states now; never changed
) -> dict[str, Any]:
    """A state_dict for these parameters, out of one of ours or of torch.optim.AdamW.

    Raises:
        ValueError: another strategy or optimizer, other planes or shapes, or other weights than the parameters have
            now.
    """
    _require_state_dict(saved)
    if len(saved["param_groups"]) != len(groups):
        return saved  # torch's own error says it best
    states = dict(saved["state"])
    adopted = []
    for index, (theirs, ours) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        if "strategy" not in theirs:
            _require_adamw(rule, index, theirs, [states[i] for i in theirs["params"] if states.get(i)])
        adopted.append(_adopt_group(index, theirs, ours))
    for entry, saved_id in paired(entries, saved):
        theirs = states.get(saved_id)
        if not theirs:
            continue
        strategy = strategy_of(entry)
        if "strategy" not in saved["param_groups"][entry.group_index]:
            theirs = state.from_torch(
                rule, strategy, entry.param, theirs, (live or {}).get(entry.param, {}), entry.name
            )
        state.check(rule, strategy, entry.param, theirs, entry.name)
        states[saved_id] = theirs = {**theirs, "step": state.count(theirs["step"], entry.name)}
    return {**saved, "state": states, "param_groups": adopted}


def _require_state_dict(saved: Mapping[str, Any]) -> None:
    groups, states = saved.get("param_groups"), saved.get("state")
    is_whole = isinstance(states, Mapping) and all(isinstance(x, Mapping) for x in states.values())
    if not is_whole or not isinstance(groups, list) or not all("params" in group for group in groups):
        raise ValueError(
            "state_dict: needs 'state' (id -> dict) and 'param_groups' (a list of dicts with 'params'), as "
            f"opt.state_dict() has them; got the keys {list(saved)[:10]}"
        )


def _require_adamw(rule: Rule, index: int, group: Group, states: Sequence[State]) -> None:
    """Raise ValueError, with the reason, for a group of any torch optimizer whose rule is not this one."""
    needed = ["step", *(prefix for prefix, _ in rule.slots[1:])]
    found = sorted({key for theirs in states for key in theirs})
    lacking = any(key not in theirs for theirs in states for key in needed)
    # Only Adam and AdamW have "amsgrad"; older releases of torch do not say which of the two it was
    reasons = {
        f"it needs {', '.join(needed)}, and has {', '.join(found)}": lacking,
        "it has amsgrad=True, which is not kept here": group.get("amsgrad") or "max_exp_avg_sq" in found,
        "it has the setting momentum_decay, as NAdam": "momentum_decay" in group,
        "it has no setting amsgrad, as RAdam and others": "amsgrad" not in group,
        f"it is Adam's with weight_decay={group.get('weight_decay')}, which is in its moments; here decay is "
        "decoupled": group.get("decoupled_weight_decay") is False and bool(group.get("weight_decay")),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"param_groups[{index}]: the saved state is not one of torch.optim.AdamW: {reason}")


def _adopt_group(index: int, theirs: Group, ours: Group) -> Group:
    """The saved group, if it is of the same strategy; or torch's, with our settings where torch has none."""
    if "strategy" not in theirs:
        settings = {key: value for key, value in ours.items() if key not in ("params", "param_names")}
        return {**settings, **{key: value for key, value in theirs.items() if key not in _TORCH_ONLY}}
    saved, current = Strategy.parse(theirs["strategy"]), Strategy.parse(ours["strategy"])
    if saved == current:
        return {**theirs, "capturable": ours["capturable"]}  # it says how to run, not what was trained
    names = ("param", "momentum", "variance", "arithmetic")
    pairs = [(name, getattr(saved, name), getattr(current, name)) for name in names]
    difference = "; ".join(f"{name}: saved {a}, here {b}" for name, a, b in pairs if a != b)
    raise ValueError(
        f"param_groups[{index}]: the state was saved under strategy '{saved}', this optimizer has '{current}' "
        f"({difference}); construct it with strategy='{saved}'"
    )
