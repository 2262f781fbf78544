"""Weights that others change between steps: clamping, pruning, a loaded model, an average swapped in.

A step adds 1 to the version of a parameter, and nothing else of a training loop does, so an edit is seen for nothing.
Then the elements whose planes no longer fit (`Format.broken`) take the weight as it is now, and the others stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from collage.backends import choose
from collage.formats import fitted, format_of
from collage.layout import PIECE, Plane, Planes, aligned
from collage.optimizers.planes import kept
from collage.rules import RULES
from collage.saying import several, warn
from collage.sharding import any_dtensor, versions_of
from collage.strategies import Strategy

log = logging.getLogger("collage")

_version = attrgetter("_version")

UNSEEN = -1
VERSION, TOLD, TRACED, AHEAD, ADDRESS = range(5)  # rows of `seen`
NAME = "collage::adopt_"
SCHEMA = "(Tensor(a!)[] planes, Tensor(b!) seen, str[] names, str rule, str strategy, str backend) -> ()"

# id of each parameter that an average stands in for (`EMA.averaged`) -> its local part of that average, float32.
LENT: dict[int, Callable[[], Tensor]] = {}
LENT_AT: set[int] = set()  # where those parameters lie, which is all that a compiled step knows of them


@dataclass(frozen=True)
class Edit:
    """Of one parameter that others changed: how many elements did not fit, of how many that this rank has."""

    name: str
    count: int
    numel: int
    shard: bool  # other ranks have more of it

    def __str__(self) -> str:
        whose = "this rank's " if self.shard else ""
        return f"'{self.name}' ({self.count} of {whose}{self.numel} weights)"


def adopt(
    planes: Sequence[Tensor],  # of every parameter in turn: those of theta, then of the rule's other slots
    seen: Tensor,  # [5, parameters] int64: the version that theta had after its last step; whether an edit was told
    names: Sequence[str],
    format: str,  # theta's
    backend: str,
    every: bool = False,  # look at all parameters: some writes no counter sees
    sharded: Sequence[Tensor] = (),  # the parameters, where any is a DTensor: it counts what is written through it
    compiled: bool = False,  # a compiled step counts versions up before it runs, by as much as `seen` says
) -> dict[int, int]:
    """Derive theta's other planes anew where they do not fit. Before a step; after it comes `advance`.

    Returns:
        Position of each parameter that was changed -> how many of its elements did not fit.
    """
    width = len(planes) // max(len(names), 1)
    visible = planes[::width] if names else ()
    versions = versions_now(visible, sharded)
    expected = (seen[VERSION] + seen[AHEAD] if compiled else seen[VERSION]).tolist()
    if versions == expected and not every:
        if compiled:
            seen[VERSION].add_(seen[AHEAD])
        return {}
    fmt = format_of(format)
    thetas = [planes[k : k + len(fmt.planes)] for k in range(0, len(planes), width)]
    changed = {k for k, (now, then) in enumerate(zip(versions, expected, strict=True)) if now != then}
    looked = range(len(thetas)) if every else sorted(changed)
    counts = {k: count for k, count in _misfits(format, backend, thetas, looked).items() if count or k in changed}
    for k, count in counts.items():
        for piece in aligned([fmt], [thetas[k]], [], PIECE) if count else ():
            for plane, value in zip(piece[1:], fitted(fmt, piece)[0][1:], strict=True):
                plane.copy_(value)
    new = [k for k, count in counts.items() if count and not seen[TOLD, k]]
    tell([Edit(names[k], counts[k], thetas[k][0].numel(), any_dtensor(sharded[k : k + 1])) for k in new])
    seen[TOLD, new] = 1
    if not fmt.shows_edits:
        _tell_of_remainders(format, names, [k for k in changed if expected[k] != UNSEEN and not seen[TOLD, k]], seen)
    seen[VERSION] = _row(versions)
    return counts


def versions_now(visible: Sequence[Tensor], sharded: Sequence[Tensor] = ()) -> list[int]:
    """Of theta's first planes; sharded: the parameters, where any is a DTensor."""
    return versions_of(sharded, visible) if sharded else list(map(_version, visible))


def _tell_of_remainders(format: str, names: Sequence[str], changed: Sequence[int], seen: Tensor) -> None:
    """Say what becomes of weights that were changed, where that cannot be seen in their planes."""
    if changed:
        seen[TOLD, list(changed)] = 1
        log.info(
            "changed outside the optimizer: %s; taken as they are now, but in '%s' each keeps its old remainder, which "
            "is at most half an ulp; opt.resync() drops the remainders", several([names[k] for k in changed]), format,
        )  # fmt: skip


def written(visible: Sequence[Tensor], seen: Tensor, sharded: Sequence[Tensor] = ()) -> None:
    """After writes of ours that are no single step of a kernel's: whatever the versions are, nobody else made them."""
    seen[VERSION] = _row(versions_now(visible, sharded))


def advance(seen: Tensor) -> None:
    """After a step that was made: it has added 1 to each version."""
    seen[VERSION].add_(1)


def _row(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def traced(thetas: Sequence[Tensor], seen: Tensor) -> None:
    """Note the versions while a step is being compiled: its first run follows with no edit in between."""
    seen[TRACED] = _row(list(map(_version, thetas)))
    seen[ADDRESS] = _row(list(map(Tensor.data_ptr, thetas)))


def _adopt_(
    planes: Sequence[Tensor], seen: Tensor, names: Sequence[str], rule: str, strategy: str, backend: str
) -> None:
    """`adopt` in a compiled step. By how much it counts versions up before it runs shows when it runs first."""
    known = Strategy.parse(strategy)
    _require_as_compiled(planes, names, kept(RULES[rule], known).planes)
    thetas = planes[:: len(planes) // len(names)]
    if LENT_AT and not LENT_AT.isdisjoint(map(Tensor.data_ptr, planes)):
        raise RuntimeError(_LENT.format("step()"))
    if bool((seen[TRACED] >= 0).all()):
        seen[AHEAD], seen[TRACED] = _row(list(map(_version, thetas))) - seen[TRACED], UNSEEN
    now = _row(list(map(Tensor.data_ptr, thetas)))
    seen[VERSION] = torch.where(seen[ADDRESS] == now, seen[VERSION], UNSEEN)  # another place: who knows
    seen[ADDRESS] = now
    adopt(planes, seen, names, known.param, backend, compiled=True)


def _require_as_compiled(planes: Sequence[Tensor], names: Sequence[str], layout: Sequence[Plane]) -> None:
    """Raise ValueError where a compiled step is run on other tensors than it was compiled for: torch does not look."""
    dtypes = [plane.dtype for plane in layout]
    found, shapes = list(map(attrgetter("dtype"), planes)), [tuple(plane.shape) for plane in planes]
    width = len(dtypes)
    wanted = [plane.shape(shape) for shape in shapes[::width] for plane in layout]
    if found == dtypes * len(names) and shapes == wanted:
        return
    k = next(k for k in range(len(planes)) if found[k] != dtypes[k % width] or shapes[k] != wanted[k])
    raise ValueError(
        f"param '{names[k // width]}': it or its state is {found[k]} of shape {tuple(shapes[k])}, and the step was "
        f"compiled for {dtypes[k % width]} of shape {tuple(wanted[k])}: it was cast or resized since. Cast it back, or "
        "make a new optimizer and compile its step"
    )


def _misfits(format: str, backend: str, thetas: Sequence[Planes], looked: Iterable[int]) -> dict[int, int]:
    """How many elements of each parameter that is looked at have planes that no step could have left."""
    devices: dict[torch.device, list[int]] = {}
    for k in looked:
        devices.setdefault(thetas[k][0].device, []).append(k)
    counts: dict[int, int] = {}
    for device, positions in devices.items():
        broken = choose(backend, device).broken
        none = broken(format, [thetas[k] for k in positions]) == 0  # in one call, as nearly always
        counts |= {k: 0 if none else broken(format, [thetas[k]]) for k in positions}
    return counts


def decode(format: str, planes: Planes, out: Tensor) -> int:
    """The number that theta's planes stand for, as `adopt` would leave them. Returns how many elements did not fit."""
    backend = choose("auto", out.device)
    misfits = backend.broken(format, [planes])
    if not misfits:
        backend.decode(format, [planes], [out])
    fmt = format_of(format)
    for *piece, part in aligned([fmt], [planes], [out], PIECE) if misfits else ():
        part.copy_(fmt.value(fitted(fmt, piece)[0]))
    return misfits


def tell(found: Sequence[Edit]) -> None:
    """Say which parameters were changed. A warning where most of one did not fit."""
    if not found:
        return
    shown = ", ".join(map(str, found[:3]))
    text = f"changed outside the optimizer: {shown}" + (f" and {len(found) - 3} more parameters" if found[3:] else "")
    if any(2 * edit.count > edit.numel for edit in found):
        warn(
            f"{text}. These weights are taken as they are now, their low components derived anew; was another model "
            "loaded, or a model cast, after the optimizer's state?"
        )
    else:
        log.info("%s; taken as they are now", text)


def require_own(params: Iterable[Tensor], what: str) -> None:
    """Raise RuntimeError while an average stands in for one of the parameters."""
    if LENT and any(id(param) in LENT for param in params):
        raise RuntimeError(_LENT.format(what))


_LENT = "{} inside averaged(): the model has the average now; do it after the with block"


torch.library.define(NAME, SCHEMA)
torch.library.impl(NAME, "CompositeExplicitAutograd", _adopt_)
torch.library.register_fake(NAME, lambda *_: None)
