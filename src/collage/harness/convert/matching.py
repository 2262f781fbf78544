"""Which tensor of a model a saved state is of: by name, or by position where both sides have an order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from collage.advice.weights import is_buffer
from collage.harness.convert import architectures
from collage.harness.convert.models import Model
from collage.harness.convert.states import COLLAGE, Parameter, Saved
from collage.harness.tasks.weights import files_of, require_numbers
from collage.layout import Plane


def of_model(model: Model) -> Saved:
    """What an optimizer that has made no step would have saved of a model's weights, each tied one once.

    Raises ValueError for e4m3 codes.
    """
    require_numbers(files_of(model.path)[0], {name: about.dtype for name, about in model.about.items()})
    places = {model.place(name): name for name in reversed(model.about) if _is_weight(model, name)}
    names = sorted(places.values(), key=list(model.about).index)
    parameters = [Parameter(k, name, 0, {}) for k, name in enumerate(names)]
    return Saved(COLLAGE, [{"params": list(range(len(names)))}], parameters)


def _is_weight(model: Model, name: str) -> bool:
    about = model.about[name]
    return about.dtype.is_floating_point and about.dtype.itemsize > 1 and not is_buffer(name, len(about.shape))


def names(model: Model, saved: Saved, what: str) -> list[str]:
    """The model's name of each parameter of a state. Raises ValueError, showing both sides, where they do not match."""
    if saved.is_named:
        found = [_known(model, str(parameter.name)) for parameter in saved.parameters]
        lacking = [str(p.name) for p, name in zip(saved.parameters, found, strict=True) if name is None]
        if lacking:
            rest = sorted(model.about.keys() - set(found))
            raise ValueError(
                f"{what}: of another model, by name. Only in the state: {_listed(lacking)}; only in {model.path}: "
                f"{_listed(rest)}"
            )
        return [name for name in found if name is not None]
    return _by_position(model, saved, what)


def _by_position(model: Model, saved: Saved, what: str) -> list[str]:
    """By the order of the model's own parameters. Raises ValueError where no position says which weight is which."""
    fix = "make its optimizer with model.named_parameters(), whose states have names"
    ordered = architectures.in_order(model.path, len(saved.groups))
    own = [str(parameter.name) for parameter in of_model(model).parameters]
    if ordered is None and len(saved.groups) > 1:
        raise ValueError(f"{what}: has no names, and {len(saved.groups)} groups, whose order says nothing; {fix}")
    if ordered is None and not model.is_ordered:
        raise ValueError(
            f"{what}: has no names, and {model.path} is sorted by name, so that no order says which weight is which; "
            f"give the model as torch.save(model.state_dict(), 'model.pt') writes it, or {fix}"
        )
    found = own if ordered is None else [name for name in ordered if name in model.about]
    if len(found) != len(saved.parameters):
        raise ValueError(
            f"{what}: has no names, and {len(saved.parameters)} parameters; {model.path} has {len(found)}; {fix}"
        )
    return found


def _known(model: Model, name: str) -> str | None:
    """The model's name for a parameter; wrappers (DDP, torch.compile) put prefixes before one of the two."""
    stripped = name.replace("module.", "").replace("_orig_mod.", "")
    candidates = (name, stripped, *(f"{prefix}{stripped}" for prefix in ("module.", "_orig_mod.")))
    return next((known for known in candidates if known in model.about), None)


def require_shapes(
    name: str, shape: Sequence[int], wanted: Mapping[str, Plane], state: Mapping[str, Any], what: str
) -> None:
    """Raise ValueError for a state of another shape than its weight."""
    for key, plane in wanted.items():
        asked = plane.shape(shape)
        if key in state and tuple(state[key].shape) not in (asked, (*asked, 2)):  # remainders may be there as bytes
            raise ValueError(
                f"{what}: {key} of '{name}' has shape {tuple(state[key].shape)}, and the weight asks for {asked}; of "
                "another model, or in another order?"
            )


def _listed(found: list[str]) -> str:
    return (", ".join(map(repr, found[:3])) or "none") + (f" and {len(found) - 3} more" if found[3:] else "")
