"""The states of another optimizer in a strategy's formats: by their names, where they have the parameter's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from collage.backends import Backend, Noise
from collage.formats import FORMATS, format_of
from collage.layout import Planes, bytes_per_value
from collage.optimizers.planes import zeros
from collage.sharding import local
from collage.strategies import Strategy

_NAMES = {  # what authors call the numbers that they keep
    "momentum": ("exp_avg", "momentum_buffer", "momentum", "grad_avg", "exp_avg_diff", "exp_avg_slow"),
    "variance": (
        *("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf", "exp_avg_var", "variance"),
        *("max_exp_avg_var", "max_square_avg"),
    ),
    "param": ("z", "ax"),  # weights beside the weights: Schedule-Free's iterate, ASGD's average
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}
MASTER = 4  # bytes per number from which on float32 alone is as good


class Formats:
    """Which format a state has, by its name: that of its role, or what `states` says (given).

    strategy: the parameter's; small: whether it takes formats' twins, as the strategy's own are already.
    """

    def __init__(self, strategy: Strategy, given: Mapping[str, str], small: bool = False) -> None:
        self.strategy, self.given, self._small = strategy, given, small
        self._found: dict[str, str | None] = {}

    def of(self, name: str) -> str | None:
        """None: it is left as the optimizer makes it."""
        if name not in self._found:
            self._found[name] = self._of(name)
        return self._found[name]

    def _of(self, name: str) -> str | None:
        if name in self.given:
            twin = format_of(self.given[name]).twin
            return twin if twin and self._small else self.given[name]
        role = ROLES.get(name)
        if role == "param":
            return "fp32" if bytes_per_value(format_of(self.strategy.param)) > MASTER else self.strategy.param
        return None if role is None else str(getattr(self.strategy, role))

    def of_state(self, state: Mapping[str, Any], param: Tensor) -> dict[str, str]:
        """Name -> format, of every state that has one: of the parameter's shape and floating."""
        return {name: fmt for name, x in state.items() if (fmt := self.of(name)) and is_shaped(x, param)}

    def shown(self, states: Iterable[Mapping[str, Any]]) -> str:
        """What is kept in which formats, and what as the optimizer makes it, in words."""
        names = dict.fromkeys(name for own in states for name, x in own.items() if not _is_number(x))
        kept = {name: self.of(name) for name in names}
        inside = ", ".join(f"{name} {fmt}" for name, fmt in kept.items() if fmt)
        left = ", ".join(name for name, fmt in kept.items() if not fmt)
        return (inside or "no state in a format") + (f"; as the optimizer makes them: {left}" if left else "")


def _is_number(x: object) -> bool:
    return not isinstance(x, Tensor | list | tuple | dict) or (isinstance(x, Tensor) and x.dim() == 0)


def is_shaped(value: object, param: Tensor) -> bool:
    """Whether it has a number for each of the parameter's."""
    return isinstance(value, Tensor) and value.shape == param.shape and value.layout == torch.strided


def checked(states: Mapping[str, str] | None) -> dict[str, str]:
    """`wrap`'s ``states``. Raises TypeError, ValueError for what is no format of a state."""
    if states is not None and not isinstance(states, Mapping):
        raise TypeError(f"states: needs name -> format, such as {{'prev': 'fp32'}}, got {states!r:.50}")
    for name, fmt in (states or {}).items():
        if fmt not in FORMATS:
            raise ValueError(f"states[{name!r}]: unknown format {fmt!r}; known: {', '.join(FORMATS)}")
        if fmt == "bf16+kahan":
            raise ValueError(f"states[{name!r}]: 'bf16+kahan' holds what grows, and this is assigned; use 'bf16x2'")
    return dict(states or {})


def require_known(states: Iterable[str], kept: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError for a name in `wrap`'s ``states`` that no parameter has a state of."""
    known = dict.fromkeys(name for own in kept for name in own)
    for name in states:
        if name not in known:
            raise ValueError(
                f"states[{name!r}]: the optimizer keeps no such state; it keeps {', '.join(known) or 'none'}"
            )


def require_signs(formats: Formats, kept: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError for a state that has negative numbers, and whose format has none."""
    for name, x in (item for own in kept for item in own.items()):
        fmt = formats.of(name)
        if fmt and fmt.startswith("uint8") and isinstance(x, Tensor) and bool((x < 0).any()):
            raise ValueError(
                f"states[{name!r}]: the optimizer makes negative numbers, and '{fmt}' holds none; say "
                f"states={{{name!r}: 'int8/128:sr'}}, or a format of 16 bits"
            )


@cache
def keys_of(name: str, fmt: str) -> tuple[str, ...]:
    """The keys of a state's planes."""
    return tuple(name + suffix for suffix in format_of(fmt).suffixes)


def unpacked(
    states: Sequence[Mapping[str, Any]],
    params: Sequence[Tensor],
    formats: Sequence[Formats],
    out: Callable[[Tensor], Tensor],
    backend: Backend,
) -> list[dict[str, Any]]:
    """The states with float32 numbers for those kept in planes. out: makes a float32 tensor like a parameter."""
    result = [dict(own) for own in states]
    cells: dict[str, tuple[list[Planes], list[Tensor]]] = {}
    for own, param, fmts in zip(result, params, formats, strict=True):
        for name, fmt in fmts.of_state(own, param).items():
            if fmt == "fp32":
                continue  # the optimizer is given the plane itself
            all_planes, outs = cells.setdefault(fmt, ([], []))
            all_planes.append([local(own.pop(key)) for key in keys_of(name, fmt)])
            own[name] = out(param)
            outs.append(local(own[name]))
    for fmt, (many, outs) in cells.items():
        backend.decode(fmt, many, outs)
    return result


def packed(
    states: Sequence[Mapping[str, Any]],  # as the optimizer left them
    params: Sequence[Tensor],
    formats: Sequence[Formats],
    before: Sequence[Mapping[str, Any]],  # as they were kept; their planes are written to
    noise: Callable[[str, list[int]], Noise | None],  # of a state, by its name, of these parameters by position
    backend: Backend,
) -> list[dict[str, Any]]:
    """The states as they are kept: those of a known name in planes, all others as they are."""
    result: list[dict[str, Any]] = []
    cells: dict[tuple[str, str], tuple[list[Tensor], list[Planes], list[int]]] = {}
    for k, (own, param, fmts, old) in enumerate(zip(states, params, formats, before, strict=True)):
        kept = dict(own)
        for name, fmt in fmts.of_state(own, param).items():
            if fmt == "fp32" and own[name].dtype == torch.float32:
                continue
            value = local(kept.pop(name))
            keys = keys_of(name, fmt)
            planes = [old[key] for key in keys] if all(key in old for key in keys) else zeros(format_of(fmt), param)
            kept |= dict(zip(keys, planes, strict=True))
            values, many, columns = cells.setdefault((name, fmt), ([], [], []))
            values.append(value.float())
            many.append([local(plane) for plane in planes])
            columns.append(k)
        result.append(kept)
    for (name, fmt), (values, many, columns) in cells.items():
        backend.encode(fmt, values, many, noise(name, columns) if format_of(fmt).stochastic else None)
    return result
