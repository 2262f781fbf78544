"""Saved optimizer states: checked, and translated where they are torch's, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from collage import state
from collage.formats import require_whole
from collage.rules import Rule
from collage.state import Entry, Group
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
) -> dict[str, Any]:
    """A state_dict for these parameters, out of one of ours or of torch.optim.

    Raises:
        ValueError: another strategy, other planes or shapes, or other weights than the parameters have now.
    """
    if len(saved["param_groups"]) != len(groups):
        return saved  # torch's own error says it best
    adopted = [_adopt_group(index, theirs, groups[index]) for index, theirs in enumerate(saved["param_groups"])]
    states = dict(saved["state"])
    for entry, saved_id in paired(entries, saved):
        theirs = states.get(saved_id)
        if not theirs:
            continue
        strategy = strategy_of(entry)
        if "strategy" not in saved["param_groups"][entry.group_index]:
            states[saved_id] = theirs = state.from_torch(rule, strategy, entry.param, theirs)
        state.check(rule, strategy, entry.param, theirs, entry.name)
        on_device = {key: value.to(entry.param.device) for key, value in theirs.items()}
        planes = state.slots(rule, strategy, entry.param, on_device)[0]
        require_whole(strategy.formats[0], planes, entry.name)
    return {**saved, "state": states, "param_groups": adopted}


def _adopt_group(index: int, theirs: Group, ours: Group) -> Group:
    """The saved group, if it is of the same strategy; or torch's, with our settings where torch has none."""
    if "strategy" not in theirs:
        if theirs.get("amsgrad"):
            raise ValueError(f"param_groups[{index}]: the saved state has amsgrad=True, which is not kept here")
        settings = {key: value for key, value in ours.items() if key not in ("params", "param_names")}
        return {**settings, **{key: value for key, value in theirs.items() if key not in _TORCH_ONLY}}
    saved, current = Strategy.parse(theirs["strategy"]), Strategy.parse(ours["strategy"])
    if saved == current:
        return theirs
    names = ("param", "momentum", "variance", "arithmetic")
    pairs = [(name, getattr(saved, name), getattr(current, name)) for name in names]
    difference = "; ".join(f"{name}: saved {a}, here {b}" for name, a, b in pairs if a != b)
    raise ValueError(
        f"param_groups[{index}]: the state was saved under strategy '{saved}', this optimizer has '{current}' "
        f"({difference}); construct it with strategy='{saved}'"
    )
