"""The state_dict of a wrapped optimizer: the optimizer's own, with planes, and those of theta beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from collage.formats import format_of
from collage.optimizers.loading import in_order, paired, require_state_dict
from collage.optimizers.parameters import Group, Parameter, name_of
from collage.optimizers.wrapping.foreign import Values
from collage.optimizers.wrapping.slots import Formats, keys_of
from collage.sharding import as_bytes, from_bytes, local, placed

STEP = "param_step"  # how often theta was written: what its random bits are drawn by


def merged(saved: dict[str, Any], groups: Sequence[Group], states: Mapping[Tensor, Values]) -> dict[str, Any]:
    """saved: the state_dict of theta alone."""
    whole: dict[int, Values] = {}
    for group, packed in zip(groups, saved["param_groups"], strict=True):
        for param, number in zip(group["params"], packed["params"], strict=True):
            own = {_renamed(key): x for key, x in saved["state"].get(number, {}).items()}
            theirs = {k: as_bytes(x) if isinstance(x, Tensor) else x for k, x in states.get(param, {}).items()}
            if own or theirs:
                whole[number] = {**theirs, **own}
    return {**saved, "state": whole}


def _renamed(key: str) -> str:
    return STEP if key == "step" else key


def of_theta(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict without what is the optimizer's own; of one that was not wrapped nothing but its groups is left."""
    require_state_dict(saved)
    return {
        **saved,
        "state": {
            number: {"step" if key == STEP else key: x for key, x in own.items() if key.startswith("param_")}
            for number, own in saved["state"].items()
            if STEP in own
        },
    }


def checked_states(
    saved: Mapping[str, Any],
    groups: Sequence[Group],
    parameters: Sequence[Parameter],
    formats_of: Callable[[Parameter], Formats],
) -> dict[Tensor, tuple[Values, bool]]:
    """The optimizer's states of each parameter, copied to where it is, and whether they are in no planes yet.

    Raises ValueError, naming the parameter, for planes of another shape or format.
    """
    require_state_dict(saved)
    ordered = in_order(groups, dict(saved))
    found: dict[Tensor, tuple[Values, bool]] = {}
    for parameter, number, _ in paired(parameters, ordered):
        theirs = ordered["state"].get(number)
        if theirs:
            own = {k: x for k, x in theirs.items() if not k.startswith("param_")}
            is_raw = STEP not in theirs
            moved = {k: _moved(x, parameter.tensor) for k, x in own.items()}
            found[parameter.tensor] = moved if is_raw else _in_planes(moved, parameter, formats_of(parameter)), is_raw
    return found


def _moved(value: Any, param: Tensor) -> Any:
    """A copy where its parameter is; of what is no number for each element, as it is."""
    if isinstance(value, Tensor) and value.dim():
        return placed(value.detach().to(local(param).device, copy=True), param)
    return deepcopy(value)


def _in_planes(state: Values, parameter: Parameter, formats: Formats) -> Values:
    """The state, if its planes are those of the formats."""
    result = dict(state)
    for name in state:
        fmt = formats.of(name)
        keys = keys_of(name, fmt) if fmt else []
        if not fmt or not isinstance(state[name], Tensor) or state[name].shape != parameter.tensor.shape:
            continue
        for key, plane in zip(keys, format_of(fmt).planes, strict=True):
            value = result.get(key)
            if isinstance(value, Tensor) and plane.dtype == torch.int16 != value.dtype:
                value = result[key] = from_bytes(value)
            wanted = plane.shape(parameter.tensor.shape)
            if not isinstance(value, Tensor) or value.dtype != plane.dtype or tuple(value.shape) != wanted:
                got = f"{name_of(value.dtype)} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(
                    f"param '{parameter.name}': its state '{name}' is in '{fmt}', whose {key} is "
                    f"{name_of(plane.dtype)} {wanted}, got {got:.60}; wrap with the strategy and states= it was saved "
                    "under"
                )
    return result
