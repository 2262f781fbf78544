"""The state_dict of a wrapped optimizer: the optimizer's own, with planes, and those of theta beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from collage.conversion import Conversion, carry
from collage.formats import format_of
from collage.optimizers.converting import require_held
from collage.optimizers.loading import in_order, is_foreign, paired, require_state_dict
from collage.optimizers.parameters import Group, Parameter, State, name_of
from collage.optimizers.planes import zeros
from collage.optimizers.wrapping.foreign import Values
from collage.optimizers.wrapping.probing import Kept
from collage.optimizers.wrapping.slots import Formats, keys_of
from collage.sharding import as_bytes, from_bytes, local, placed
from collage.strategies import STRATEGIES, Strategy

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


def arranged(saved: Mapping[str, Any], groups: Sequence[Group], names: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """The saved state in the order of the groups, and whether it is the optimizer's own, which knows no planes.

    names: the settings of a group that are not the optimizer's. Such a state has none; they stay as they are.
    """
    require_state_dict(saved)
    ordered, is_raw = in_order(groups, dict(saved)), is_foreign(saved)
    if is_raw and len(groups) == len(ordered["param_groups"]):
        ours = [{name: group[name] for name in names} for group in groups]
        theirs = [{**own, **group} for own, group in zip(ours, ordered["param_groups"], strict=True)]
        ordered = {**ordered, "param_groups": theirs}
    return ordered, is_raw


def of_theta(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict without what is the optimizer's own."""
    found = {
        number: {"step" if key == STEP else key: x for key, x in own.items() if key.startswith("param_")}
        for number, own in saved["state"].items()
    }
    return {**saved, "state": {number: own for number, own in found.items() if own}}


def with_theta(saved: dict[str, Any], parameters: Sequence[Parameter], live: Mapping[Tensor, State]) -> dict[str, Any]:
    """The optimizer's own state_dict, with what there is of theta in the place of its states."""
    found = {number: dict(live[p.tensor]) for p, number, _ in paired(parameters, saved) if live.get(p.tensor)}
    return {**saved, "state": found}


def checked_states(
    saved: dict[str, Any],  # as `arranged`
    is_raw: bool,
    parameters: Sequence[Parameter],
    formats_of: Callable[[Parameter], Formats],
    kept: Callable[[Parameter], Kept],
    report: Conversion | None = None,  # of what is converted; None: nothing is
) -> dict[Tensor, Values]:
    """The optimizer's states of each parameter, copied to where it is.

    Raises ValueError, naming the parameter, for planes of another shape or format.
    """
    found: dict[Tensor, Values] = {}
    for parameter, number, _ in paired(parameters, saved):
        theirs = {k: x for k, x in saved["state"].get(number, {}).items() if not k.startswith("param_")}
        if theirs:
            moved = _moved(theirs, parameter.tensor)
            formats = formats_of(parameter)
            if report is not None and not is_raw:
                strategy = Strategy.parse(saved["param_groups"][parameter.group_index]["strategy"])
                moved = _converted(moved, parameter, strategy, formats, report)
            _require_all(moved, parameter, formats, kept(parameter))
            found[parameter.tensor] = moved if is_raw else _in_planes(moved, parameter, formats)
    return found


def _converted(state: Values, parameter: Parameter, saved: Strategy, formats: Formats, report: Conversion) -> Values:
    """A state saved under a strategy, in the formats that it has here. Raises ValueError as `_in_planes` does."""
    low = Formats(saved.of(parameter.tensor.shape), formats.given)
    full = Formats(STRATEGIES["fp32"], formats.given)  # of a parameter that was float32 beside low ones
    found = full if _is_in(state, parameter, full) and not _is_in(state, parameter, low) else low
    result = _in_planes(state, parameter, found)
    for name, source in found.of_state(state, parameter.tensor).items():
        target = formats.of(name)
        if target and target != source:
            planes = [local(result.pop(key)) for key in keys_of(name, source)]
            out = zeros(format_of(target), parameter.tensor)
            lost = carry(source, planes, target, list(map(local, out)))
            require_held(lost, parameter.name, name, target)
            report.add(name, source, target, lost)
            result |= dict(zip(keys_of(name, target), out, strict=True))
    return result


def _is_in(state: Values, parameter: Parameter, formats: Formats) -> bool:
    """Whether a state is in these formats."""
    try:
        _in_planes(state, parameter, formats)
    except ValueError:
        return False
    return True


def _require_all(state: Values, parameter: Parameter, formats: Formats, kept: Kept) -> None:
    """Raise ValueError for a state that is missing, or has not the parameter's shape and should."""
    for name in kept.first - state.keys():
        raise ValueError(
            f"param '{parameter.name}': its state has no '{name}', which the optimizer keeps; is it one of another "
            f"optimizer, or of other settings? It has {', '.join(state)}"
        )
    wanted = tuple(parameter.tensor.shape)
    for name in kept.shaped & state.keys() if local(parameter.tensor).numel() else ():
        shape = tuple(getattr(state[name], "shape", ()))
        if formats.of(name) and shape != wanted:
            raise ValueError(f"param '{parameter.name}': {name} has shape {shape}, not the parameter's {wanted}")


def _moved(value: Any, param: Tensor) -> Any:
    """A copy where its parameter is, of numbers that are not 0-d; of what holds others, too."""
    if isinstance(value, Tensor) and value.dim():
        return placed(value.detach().to(local(param).device, copy=True), param)
    if isinstance(value, dict):
        return {k: _moved(x, param) for k, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(x, param) for x in value)
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
                    "under, or convert it: opt.load_state_dict(state, convert=True)"
                )
    return result
