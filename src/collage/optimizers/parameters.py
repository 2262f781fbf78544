"""The parameters of an optimizer: what each is called, where it stands, and what draws its random bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.rng import key_of

State = dict[str, Any]
Group = dict[str, Any]


class Parameter(NamedTuple):
    """One parameter and where it stands."""

    name: str
    key: int  # of its random stream
    group_index: int
    group: Group
    tensor: Tensor
    position: int = 0  # among all of the optimizer


def named(index: int, first: int, group: Group) -> Iterator[Parameter]:
    """A group's parameters, with their names, or their positions from `first` on where they have none."""
    names = group.get("param_names") or [None] * len(group["params"])
    if len(names) != len(group["params"]):
        raise ValueError(
            f"param_groups[{index}]: {len(group['params'])} parameters and {len(names)} names; add parameters with "
            "add_param_group, and take them out of 'params' and 'param_names' together"
        )
    for position, (param, name) in enumerate(zip(group["params"], names, strict=True), first):
        yield Parameter(name or str(position), key_of(name or position), index, group, param, position)


class Named:
    """A group's parameters by id, good while the group has the same ones, under the same names."""

    def __init__(self, index: int, first: int, group: Group) -> None:
        found = list(named(index, first, group))
        self._at, self._params, self._names = (
            (index, first),
            list(group["params"]),
            list(group.get("param_names") or ()),
        )
        self.by_id = {id(parameter.tensor): parameter for parameter in found}

    def holds(self, index: int, first: int, group: Group) -> bool:
        """Whether they are those of the group as it is now."""
        params = group["params"]
        same = self._at == (index, first) and len(params) == len(self._params) and all(map(is_, params, self._params))
        return same and self._names == list(group.get("param_names") or ())


def require_unique(names: Iterable[str]) -> None:
    """Raise ValueError for a name given twice: they tell parameters apart in reports, and give them random bits."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"params: two parameters are named '{name}'; give each a name of its own, with a prefix")
        seen.add(name)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(tensor: Tensor) -> str:
    return name_of(tensor.dtype)
