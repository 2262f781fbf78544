"""What an optimizer keeps for one parameter: a step counter and, per slot of its rule, the planes of its format.

Plane 0 of "param" is the parameter itself; every other plane is a tensor under a key of the optimizer's state
(``param_lo``, ``exp_avg``, ``exp_avg_sq_lo``, ...), of its shape, strides and placement if it has a word per element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.backends import Backend, choose
from collage.formats import Format, format_of
from collage.fp8.owning import remainder_of, scale_of, taken_remainder
from collage.layout import Plane, Planes, aligned, pieces
from collage.optimizers.parameters import State
from collage.rules import Rule
from collage.sharding import cut_rows, from_bytes, in_rows, local
from collage.strategies import Strategy

CHUNK = 1 << 16  # elements: temporaries of some megabytes, between states that stay, would leave holes in memory


class Kept(NamedTuple):
    """What a rule keeps under a strategy."""

    formats: tuple[str, ...]  # of each slot
    keys: tuple[str, ...]  # of the state, of every plane but the parameter
    planes: tuple[Plane, ...]  # likewise, the parameter first


@cache
def kept(rule: Rule, strategy: Strategy) -> Kept:
    """Formats and planes of every slot of the rule, in order."""
    formats = strategy.formats(rule.roles)
    keyed = [
        (slot.prefix + plane.suffix, plane)
        for slot, name in zip(rule.slots, formats, strict=True)
        for plane in format_of(name).planes
    ]
    return Kept(formats, tuple(key for key, _ in keyed[1:]), tuple(plane for _, plane in keyed))


def nbytes(rule: Rule, strategy: Strategy, shape: Sequence[int]) -> int:
    """Bytes of all planes, the parameter's own among them, of a parameter (or a rank's part of it) of that shape."""
    return sum(plane.dtype.itemsize * math.prod(plane.shape(shape)) for plane in kept(rule, strategy).planes)


def dtypes(rule: Rule, strategy: Strategy) -> dict[str, torch.dtype]:
    """State key -> dtype of every plane but the parameter itself."""
    own = kept(rule, strategy)
    return {key: plane.dtype for key, plane in zip(own.keys, own.planes[1:], strict=True)}


def planes_of(rule: Rule, strategy: Strategy, param: Tensor, state: Mapping[str, Tensor]) -> list[Tensor]:
    """The local planes of all slots in a row, theta's first."""
    return [local(param.detach()), *(local(state[key]) for key in kept(rule, strategy).keys)]


def theta_of(rule: Rule, strategy: Strategy, param: Tensor, state: Mapping[str, Tensor]) -> Planes:
    """The local planes of theta."""
    return planes_of(rule, strategy, param, state)[: len(format_of(strategy.param).planes)]


def initialise(rule: Rule, strategy: Strategy, param: Tensor, state: State, capturable: bool) -> None:
    """Fill an empty state: step 0 (on the parameter's device, if capturable), theta as it is, every other number 0."""
    fresh: State = {"step": torch.zeros((), dtype=torch.int64, device=param.device if capturable else "cpu")}
    own = kept(rule, strategy)
    fresh |= {key: _zeros(plane, param.detach()) for key, plane in zip(own.keys, own.planes[1:], strict=True)}
    _share(param, fresh)
    resync(rule, strategy, param, fresh)
    take_remainder(strategy, param, fresh)
    state |= fresh


def take_remainder(strategy: Strategy, param: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Have theta go on with what e4m3 cut off of the weight that shows. Whether its module has anything to take."""
    if SHARED not in state or remainder_of(param) is None:
        return False
    low, theta = taken_remainder(param), [local(param.detach()), *map(local, theta_among(strategy, state).values())]
    assert low is not None
    _continue(format_of(strategy.param), theta, low)
    return True


def _continue(fmt: Format, theta: Planes, low: Tensor) -> None:
    """Have a number of an e4m3 weight go on below what shows."""
    for *piece, part in aligned([fmt], [theta], [low], CHUNK):
        piece[1].copy_(fmt.continued(piece, part)[1])


SHARED = "param_scale"  # the forward pass multiplies with it too: it lies in the memory of the parameter's module


def unshare(state: State) -> None:
    """Have a state hold scales of its own, for a while."""
    state.update((key, x.clone()) for key, x in state.items() if key == SHARED)


def _share(param: Tensor, state: State) -> None:
    """Have a state hold the scales of the parameter's module instead of some of its own."""
    held = state.get(SHARED)
    if held is None:
        return
    scale = scale_of(param)
    if scale is not None and local(scale).data_ptr() != local(held).data_ptr():
        state[SHARED] = scale


def _zeros(plane: Plane, param: Tensor) -> Any:
    """A plane of zeros for a parameter, placed as it is."""
    if plane.per == 1:
        return torch.zeros_like(param, dtype=plane.dtype, requires_grad=False)
    part = local(param)
    return in_rows(part.new_zeros(plane.shape(part.shape), dtype=plane.dtype), plane.shape(param.shape), param)


def zeros(fmt: Format, param: Tensor) -> list[Any]:
    """The planes of a number of a parameter that is 0, placed as it is."""
    return [_zeros(plane, param.detach()) for plane in fmt.planes]


def cut(rule: Rule, strategy: Strategy, param: Tensor) -> str:
    """Why a parameter's shards cannot be stepped: they cut blocks that share a word; "": they cut none."""
    return cut_of(kept(rule, strategy).planes, strategy, param)


def cut_of(planes: Iterable[Plane], strategy: Strategy, param: Tensor) -> str:
    """The same of any planes."""
    for plane in planes:
        dim = None if plane.per == 1 else cut_rows(param, plane.per)
        if dim is not None:
            blocks = f"{plane.per} neighbours of a row, so shards need multiples of these" if plane.per else "row"
            other = ", or use a strategy whose moments have 16 bits" if plane.per else ""
            return (
                f"it is sharded along dimension {dim}, and strategy '{strategy}' has a scale for every {blocks}; shard "
                f"it along dimension 0, as fully_shard does{other}"
            )
    return ""


OPTIONAL = ("momentum_buffer", "max_exp_avg_sq")  # slots that a setting of a group turns on and off


def complete(rule: Rule, strategy: Strategy, param: Tensor, state: State) -> None:
    """Begin at 0 a slot that the rule has had no need of so far, and drop one that it has no need of any more.

    Bytes of a saved state that someone put there (ZeroRedundancyOptimizer loads so) become the words they stand for.
    """
    own = kept(rule, strategy)
    state.update(in_words(rule, strategy, state))
    _share(param, state)
    if "step" not in state or own.keys == tuple(key for key in state if key != "step"):
        return
    for slot, name in zip(rule.slots, own.formats, strict=True):
        fmt = format_of(name)
        keys = [slot.prefix + plane.suffix for plane in fmt.planes]
        if slot.prefix in OPTIONAL and not state.keys() & set(keys):
            state.update((key, _zeros(plane, param.detach())) for key, plane in zip(keys, fmt.planes, strict=True))
    for key in [key for key in state if key.startswith(OPTIONAL) and not key.startswith(rule.prefixes)]:
        del state[key]


def of_theta(strategy: Strategy) -> dict[str, torch.dtype]:
    """State key -> dtype of what theta has beside the parameter."""
    return {"param" + plane.suffix: plane.dtype for plane in format_of(strategy.param).planes[1:]}


def theta_among(strategy: Strategy, live: Mapping[str, Tensor]) -> State:
    """Of a state, what theta has beside the parameter."""
    wanted = of_theta(strategy)
    return {key: live[key] for key, dtype in wanted.items() if key in live and live[key].dtype == dtype}


def is_unstepped(state: Mapping[str, Any]) -> bool:
    """Whether a saved state is of a parameter that has made no step, and has its weights' planes alone."""
    step = state.get("step")
    alone = all(key.startswith("param") for key in state if key != "step")
    return alone and isinstance(step, Tensor) and step.numel() == 1 and float(step) == 0


def begun(rule: Rule, strategy: Strategy, param: Tensor, state: State) -> State:
    """A saved state with every moment; those of a parameter that has made no step may be left out."""
    if not is_unstepped(state) or dtypes(rule, strategy).keys() == state.keys() - {"step"}:
        return state
    own = kept(rule, strategy)
    fresh = {key: _zeros(plane, param.detach()) for key, plane in zip(own.keys, own.planes[1:], strict=True)}
    return {**{key: x for key, x in fresh.items() if key not in of_theta(strategy)}, **state}


def in_words(rule: Rule, strategy: Strategy, state: Mapping[str, Any]) -> State:
    """A state whose 16-bit integers are such again: a state_dict has them as bytes [..., 2]."""
    words = {key for key, dtype in dtypes(rule, strategy).items() if dtype == torch.int16}
    return {key: from_bytes(x) if key in words and _is_bytes(x) else x for key, x in state.items()}


def _is_bytes(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int8 and value.shape[-1:] == (2,)


def backend_of(planes: Planes) -> Backend:
    """The fastest backend for planes, whatever the optimizer steps with: all have the same bits."""
    return choose("auto", planes[0].device)


def cast(rule: Rule, strategy: Strategy, param: Tensor, state: State, capturable: bool) -> None:
    """Cast a float32 parameter to the strategy's dtype, in place; its other planes keep what that cuts off."""
    low = torch.empty_like(param.detach(), dtype=strategy.dtype)
    fresh: State = {}
    initialise(rule, strategy, low, fresh, capturable)
    theta = theta_of(rule, strategy, low, fresh)
    backend_of(theta).encode(strategy.param, [param.detach()], [theta])
    param.data, param.grad = low, None
    state |= fresh


def resync(rule: Rule, strategy: Strategy, param: Tensor, state: State) -> int:
    """Derive theta's other planes from the parameter as it is now. Returns how many elements that changed."""
    theta, changed = theta_of(rule, strategy, param, state), 0
    if not format_of(strategy.param).elementwise:
        return _drop_lows(format_of(strategy.param), theta)
    for planes in pieces(theta, CHUNK) if len(theta) > 1 else ():
        before = [plane.clone() for plane in planes[1:]]
        visible = torch.empty_like(planes[0])  # written to instead of the parameter, which has it already
        backend_of(planes).encode(strategy.param, [planes[0].float()], [[visible, *planes[1:]]])
        moved = torch.zeros_like(visible, dtype=torch.bool)
        for old, new in zip(before, planes[1:], strict=True):
            moved |= old != new
        changed += int(moved.sum())
    return changed


def _drop_lows(fmt: Format, theta: Planes) -> int:
    """Leave what shows, and the scales that it has. Returns how many elements that changed."""
    changed = 0
    for piece in aligned([fmt], [theta], [], CHUNK):
        low = fmt.shown(piece)[1]
        changed += int((piece[1] != low).sum())
        piece[1].copy_(low)
    return changed


def write(planes: Planes, values: Planes) -> None:
    """Copy values into planes, one by one."""
    for plane, value in zip(planes, values, strict=True):
        plane.copy_(value)
