"""The floors: the largest increment that a number format drops, measured by growing it, not derived.

A format is a set of states (its planes) and a map, `grown` and re-encoded, that takes a state and an increment d to the
next state. Rounding is monotone, so for one d the map keeps the order of states: a number that is fed the same d again
and again climbs to the first state that d leaves unchanged, and is *stuck* there for good; it passes no such state. So
it is enough to look at the states ahead: "is there one that d leaves as it is, before the visible component moves?"

For a single plane that state is the number itself. In an expansion the last component absorbs increments until it is so
large that d falls below half its own ulp: that is why bf16x2 moves by 1e-6 at first and then stops.

Where a format's components have float32's exponents, floors scale with the binade of the weight. Float16's do not reach
down far enough: under a weight of 1/4 the low component is subnormal at least in part, where an ulp is 2**-24 whatever
the weight, so the floor of fp16x2 ends at 2**-25.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from collage import mcf
from collage.formats import Format, format_of, split
from collage.layout import Planes
from collage.strategies import ARITHMETICS, STRATEGIES

# Those that hold weights in some strategy; with a scale of its row a weight's floor is not a function of the weight.
THETA_FORMATS = tuple(dict.fromkeys(s.param for s in STRATEGIES.values() if format_of(s.param).elementwise))
MANTISSAS = 128  # bf16 numbers in a binade: where in a binade a weight lies decides what share of it is half an ulp

_TAIL_BINADES = 3  # of a component, from half an ulp of the one before down; below, an increment is dropped no sooner
_AT_THE_TOP = 4  # numbers of each binade of a component between the first and the last: how far the last may grow
_PIECE = 1 << 15  # states measured at once: tensors so small that torch starts no threads
_CPU = torch.device("cpu")
_CODES = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class Floor(NamedTuple):
    """The largest constant increments away from zero (up) and towards zero (down) that end up dropped altogether."""

    up: float
    down: float


class DecayFloor(NamedTuple):
    """lr * weight_decay up to ``every`` does nothing to any weight; above ``some`` it reaches every weight."""

    every: float
    some: float


def floor(format_name: str, at: float = 1.0, arithmetic: str | None = None) -> Floor:
    """The largest increment that gets stuck when it is fed to `grown` again and again from ``at``.

    Stuck: a step leaves every plane as it is, so that all later ones do: at once where one plane holds the number, and
    before the first component has moved in an expansion. A larger one moves it on, though not undistorted:
    just above the floor each step is rounded to a whole number of the last component's ulps.

    Args:
        format_name: a name in FORMATS.
        at: the weight, in the range of the format. For a negative one, up is still away from zero.
        arithmetic: "float32" or "bfloat16"; by default that of the first strategy which keeps weights in this format.

    Returns:
        The floor in both directions. They differ at a power of two, below which an ulp is half as large. In a
        stochastic format an increment counts as dropped when no random bits let it through. Rounding to the format
        then drops nothing; what remains is the rounding of the sum in the arithmetic's own register.

    >>> floor("bf16", arithmetic="bfloat16")  # half an ulp: 2**-8 above 1.0, 2**-9 below
    Floor(up=0.00390625, down=0.001953125)
    """
    return _floor(format_name, at, arithmetic)


def floors_table() -> dict[str, Floor]:
    """Floors at 1.0, where norm weights begin, of every format that holds weights, in its strategy's arithmetic."""
    return {name: floor(name) for name in THETA_FORMATS}


def decay_floor(format_name: str, arithmetic: str | None = None) -> DecayFloor:
    """The lr * weight_decay below which decoupled decay, theta grown by -(lr * weight_decay) * theta, does nothing.

    As `floor`, over the weights from 1 to 2: half an ulp is a larger share of 1.01 than of 1.99. It is the same in
    every binade if the components have float32's exponents; with float16's, smaller weights need more
    (`decay_floors`).
    """
    floors = decay_floors(format_name, arithmetic)
    return DecayFloor(float(floors.min()), float(floors.max()))


@cache
def decay_floors(format_name: str, arithmetic: str | None = None, exponent: int = 0) -> Tensor:
    """The decay floor of each weight (1 + k / 128) * 2**exponent, k < 128. [MANTISSAS] float64.

    1 is all of it: that weight is 0 in the format, or no decay reaches it.
    """
    fmt, register = format_of(format_name), register_of(format_name, arithmetic)

    def measured(at: Tensor) -> Tensor:
        planes = _ahead(fmt, at, toward=-1)
        theta = fmt.load(planes, register).value
        return _largest(lambda w: unchanged(fmt, register, planes, -(w * theta)), 1.0, register, theta.shape).amax(1)

    weights = (1 + torch.arange(MANTISSAS, device=_CPU).float() / MANTISSAS) * 2.0**exponent
    states = _ahead(fmt, weights[-1:], toward=-1)[0].shape[1]
    return torch.cat([measured(at) for at in torch.split(weights, max(1, _PIECE // states))])


def binades(format_name: str) -> tuple[int, int]:
    """(lowest, highest) exponent of weights whose decay floors are their own; those beyond have the nearest one's."""
    smallest = _smallest(format_of(format_name))
    return (0, 0) if smallest < 2.0**-126 else (round(math.log2(smallest)) - 2, 0)


def movable_below(format_name: str, step: float, arithmetic: str | None = None) -> float:
    """Magnitude below which a step moves every weight, whatever its last component holds: a quick first test.

    A power of two, with a binade to spare; 0 where a step is not above the floor of the smallest weights, which does
    not scale with them.
    """
    largest = floor(format_name, arithmetic=arithmetic).up
    if step <= floor(format_name, 2 * _smallest(format_of(format_name)), arithmetic).up:
        return 0.0
    return 2.0 ** (math.ceil(math.log2(step / largest)) - 1) if largest else math.inf


def _smallest(fmt: Format) -> float:
    """The smallest number above 0 that a weight's visible component holds."""
    dtype = fmt.dtypes[0]
    return 2.0**-149 if dtype == torch.float32 else 2.0 ** (mcf.FLOATS[dtype].emin - mcf.FLOATS[dtype].precision + 1)


def unchanged(fmt: Format, register: torch.dtype, planes: Planes, delta: Tensor) -> Tensor:
    """bool per element: growing by delta leaves every plane as it is, with any random bits if it takes some."""
    number = fmt.load(planes, register).grown(delta)
    same = torch.ones_like(planes[0], dtype=torch.bool)
    for bits in (0, 0xFFFF) if fmt.stochastic else (None,):  # rounding is monotone in the bits: the ends suffice
        random = None if bits is None else torch.full_like(planes[0], bits, dtype=torch.int32)
        for plane, old, new in zip(fmt.planes, planes, fmt.encode(number, random), strict=True):
            same &= old == new if plane.per == 1 else (old == new).view(len(same), 1)  # a row's scale
    return same


def register_of(format_name: str, arithmetic: str | None = None) -> torch.dtype:
    """dtype of the registers a weight of this format is updated in."""
    if arithmetic is None:
        return next((s.register for s in STRATEGIES.values() if s.param == format_name), torch.float32)
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic: unknown {arithmetic!r}; known: {', '.join(ARITHMETICS)}")
    return ARITHMETICS[arithmetic]


@cache
def _floor(format_name: str, at: float, arithmetic: str | None) -> Floor:
    fmt, register = format_of(format_name), register_of(format_name, arithmetic)
    if not (math.isfinite(at) and at):
        raise ValueError(f"floor: 'at' must be a finite weight other than zero, got {at}")

    def measured(toward: int) -> float:
        planes = _ahead(
            fmt, torch.tensor([abs(at)], dtype=torch.float32, device=_CPU), toward
        )  # rounding is symmetric in the sign
        shape = planes[0].shape
        return float(_largest(lambda d: unchanged(fmt, register, planes, toward * d), abs(at), register, shape).max())

    return Floor(measured(1), measured(-1))


def _ahead(fmt: Format, at: Tensor, toward: int) -> Planes:
    """The states that share their visible component with ``at`` [k] and lie at it or beyond. Planes of [k, n].

    Of the last component all that matter, and of one between the first and the last the numbers at the top of a binade:
    they leave it the most room. What is no state (the format would not store these components) is never unchanged.
    """
    start = split(fmt, at[:, None])  # a row each, should rows have scales
    first, *others = fmt.components(start)
    states: tuple[Tensor, ...] = (first,)
    for k, own in enumerate(others, 1):
        tails = toward * _tails(states[-1], _TAIL_BINADES << (_precision(own) - 1) if k == len(others) else _AT_THE_TOP)
        tails = torch.cat([own[..., None].expand(*states[-1].shape, 1), tails], 2)
        states = (*(c.repeat_interleave(tails.shape[2], 1) for c in states), tails.flatten(1))
    if not others:
        return start
    beyond = (_total(states) - _total(start)) * toward > 0
    return tuple(torch.where(beyond, there, here) for there, here in zip(states, start, strict=True))


def _tails(before: Tensor, many: int) -> Tensor:
    """Positive numbers that a component may have beside the one before it, [k, n] -> [k, n, m].

    From half an ulp down: so many in a row, or if that is less than a binade so many of each of _TAIL_BINADES.
    """
    precision = _precision(before)
    exponent = torch.frexp(before.float()).exponent - 1 - precision
    half_ulp = torch.ldexp(torch.ones_like(before, dtype=torch.float32), exponent).to(before.dtype)
    codes = half_ulp.view(torch.int16)[..., None]
    if many < 1 << (precision - 1):
        binade = torch.arange(_TAIL_BINADES, dtype=torch.int16, device=_CPU) << (precision - 1)
        below = (binade[:, None] + torch.arange(many, dtype=torch.int16, device=_CPU)).flatten()
    else:
        below = torch.arange(min(many, int(codes.max()) + 1), dtype=torch.int16, device=_CPU)
    return (codes - below).clamp(min=0).view(before.dtype)


def _precision(x: Tensor) -> int:
    return mcf.FLOATS[x.dtype].precision


def _total(components: Planes) -> Tensor:
    """float64, exact or nearly: enough to tell which of two states lies beyond the other."""
    return sum((c.double() for c in reversed(components)), torch.zeros((), dtype=torch.float64, device=_CPU))


def _largest(dropped: Callable[[Tensor], Tensor], top: float, register: torch.dtype, shape: torch.Size) -> Tensor:
    """For each state the largest number of the register's dtype in [0, top] that is dropped; 0 if none. float64.

    Bisection over the bits, which order as the numbers do; what is dropped is dropped with anything smaller.
    """
    codes = _CODES[register]
    low = torch.zeros(shape, dtype=torch.int32, device=_CPU)
    above = torch.tensor(top, dtype=register, device=_CPU).view(codes).int() + 1
    high = above.expand(shape)
    while bool((high - low > 1).any()):
        middle = low + (high - low) // 2  # low itself once they are neighbours, so nothing moves any more
        is_dropped = dropped(middle.to(codes).view(register))
        low, high = torch.where(is_dropped, middle, low), torch.where(is_dropped, high, middle.clamp(min=low + 1))
    return low.to(codes).view(register).double()
