"""Optimizers by name: `adamw`, `sgd`, ... are ours; `wrap:torch.optim.NAdam` is any other, imported and wrapped."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from collage import fp8
from collage.optimizers.adam import Adam
from collage.optimizers.adamw import AdamW
from collage.optimizers.base import PrecisionOptimizer
from collage.optimizers.lion import Lion
from collage.optimizers.muon import Muon
from collage.optimizers.sgd import SGD
from collage.optimizers.wrap import wrap
from collage.strategies import Strategy

WRAP = "wrap:"
OURS: dict[str, type[PrecisionOptimizer]] = {"adamw": AdamW, "adam": Adam, "sgd": SGD, "lion": Lion, "muon": Muon}
KNOWN = f"{', '.join(OURS)}, or '{WRAP}' and the full name of any other, as {WRAP}torch.optim.NAdam"

_FORMS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def probe(strategy: Strategy) -> nn.Module:
    """A module with one small weight for a strategy, to try an optimizer's settings on."""
    layer = nn.Linear(2, 2, bias=False, device="cpu", dtype=torch.float32)
    return layer.to(strategy.dtype) if strategy.beside is strategy else fp8.convert(layer)


@dataclass(frozen=True)
class Named:
    """An optimizer that has a name. `kind`: its class, ours or the one that is wrapped."""

    name: str
    kind: type[torch.optim.Optimizer]

    @property
    def title(self) -> str:
        """What people call it."""
        return self.kind.__name__

    @property
    def wrapped(self) -> bool:
        """Whether it is not ours."""
        return not issubclass(self.kind, PrecisionOptimizer)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Every setting, and the value it has where none is given; `inspect.Parameter.empty` for one that must be."""
        return {**_settings(self.kind), **(_keywords(wrap) if self.wrapped else {})}

    @cached_property
    def takes_others(self) -> bool:
        """Whether it has settings that its signature does not name."""
        kinds = [p.kind for p in inspect.signature(self.kind).parameters.values()]
        return self.wrapped and inspect.Parameter.VAR_KEYWORD in kinds

    def takes(self, setting: str, like: Any) -> bool:
        """Whether it has a setting of this name that is of the kind of a value: a number, or so many numbers."""
        return setting in self.defaults and _numbers(self.defaults[setting]) == _numbers(like) > 0

    def require_settings(self, names: Iterable[str]) -> None:
        """Raise ValueError for a setting that it does not have."""
        for name in names:
            if name not in self.defaults and not self.takes_others:
                known = ", ".join(self.defaults)
                raise ValueError(f"{name}: {self.title} has {known} instead{_meant(name, self.defaults)}")

    def make(self, params: Iterable[Any], strategy: str | Strategy, **settings: Any) -> PrecisionOptimizer:
        """The optimizer, of parameters, their names with them, or groups.

        Raises ValueError for a setting that it does not have, and what its constructor raises.
        """
        self.require_settings(settings.keys() - set(getattr(self.kind, "foreign", ())))
        maker: Any = partial(wrap, self.kind) if self.wrapped else self.kind
        made: PrecisionOptimizer = maker(params, strategy=strategy, **settings)
        return made


def find(name: str) -> Named:
    """The optimizer of this name.

    Args:
        name: a key of `OURS`, or ``wrap:package.module.Class``.

    Raises:
        ValueError: no such optimizer, package, module or class, or a class that is no optimizer: which, and the fix.
    """
    if name in OURS:
        return Named(name, OURS[name])
    if name.startswith(WRAP):
        return Named(name, _imported(name))
    if "." in name:
        raise ValueError(f"optimizer: unknown '{name}'; known: {KNOWN}; did you mean '{WRAP}{name}'?")
    raise ValueError(f"optimizer: unknown '{name}'; known: {KNOWN}{_meant(name.lower(), OURS)}")


def make_optimizer(
    name: str, params: Iterable[Any], strategy: str | Strategy = "collage-plus", **settings: Any
) -> PrecisionOptimizer:
    """An optimizer by its name, as a configuration file has it.

    Args:
        name: ``"adamw"``, ``"adam"``, ``"sgd"``, ``"lion"``, ``"muon"``, or ``"wrap:"`` with the full name of any
            other, ``"wrap:torch.optim.NAdam"``, which is imported and wrapped.
        params: ``model.named_parameters()``, ``model.parameters()``, or groups.
        strategy: a name in ``collage.STRATEGIES``, or a ``collage.Strategy``.
        settings: of that optimizer.

    Raises:
        ValueError: an unknown name, or a setting that the optimizer does not have. ValueError, TypeError: what the
            optimizer itself refuses.

    >>> w = torch.nn.Parameter(torch.ones(4).bfloat16())
    >>> type(make_optimizer("lion", [("w", w)], lr=1e-4)).__name__
    'Lion'
    """
    return find(name).make(params, strategy, **settings)


def _imported(name: str) -> type[torch.optim.Optimizer]:
    """The class of a name that begins with WRAP."""
    module_name, _, class_name = name.removeprefix(WRAP).rpartition(".")
    if not module_name:
        raise ValueError(
            f"optimizer: '{name}' needs the class's full name, package.module.Class, as {WRAP}torch.optim.NAdam"
        )
    module = _module(name, module_name)
    found: Any = getattr(module, class_name, None)
    if found is None:
        known = [key for key, value in vars(module).items() if _is_optimizer(value)]
        raise ValueError(f"optimizer: '{name}': {module_name} has no '{class_name}'{_meant(class_name, known)}")
    if not _is_optimizer(found):
        raise ValueError(
            f"optimizer: '{name}': needs a subclass of torch.optim.Optimizer, "
            f"{class_name} is {'another class' if isinstance(found, type) else f'a {type(found).__name__}'}"
        )
    ours = next((short for short, kind in OURS.items() if kind is found), None)
    if issubclass(found, PrecisionOptimizer):
        raise ValueError(
            f"optimizer: '{name}' is of this package already; {f'use {ours!r}' if ours else 'wrap another'}"
        )
    kind: type[torch.optim.Optimizer] = found
    return kind


def _module(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        package = module_name.partition(".")[0]
        if error.name == package:
            raise ValueError(
                f"optimizer: '{name}' needs the package '{package}', which is not installed here; install it"
            ) from None
        if f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"optimizer: '{name}': there is no module '{error.name}'") from None
        raise ValueError(
            f"optimizer: '{name}': {module_name} needs '{error.name}', which is not installed here; install it"
        ) from None
    except ImportError as error:
        raise ValueError(f"optimizer: '{name}': {module_name} cannot be imported: {error}") from error


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer


def _settings(kind: type) -> dict[str, Any]:
    """Name and default of an optimizer's arguments, but for its parameters, which come first."""
    _, *named = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in named if p.kind in _FORMS and p.name != "strategy"}


def _keywords(of: Callable[..., Any]) -> dict[str, Any]:
    """Name and default of what a function takes by name alone."""
    named = inspect.signature(of).parameters.values()
    return {p.name: p.default for p in named if p.kind == inspect.Parameter.KEYWORD_ONLY and p.name != "strategy"}


def _meant(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _numbers(value: Any) -> int:
    """How many numbers a setting is; 0: none, it is something else."""
    if isinstance(value, tuple | list):
        return len(value) if all(map(_numbers, value)) else 0
    return int(isinstance(value, int | float) and not isinstance(value, bool))


ADAMW = find("adamw").defaults
