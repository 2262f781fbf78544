"""The floors: the largest increment that a number format drops, measured by growing it, not derived.

A format is a set of states (its planes) and a map, `grown` and re-encoded, that takes a state and an increment d to the
next state. Rounding is monotone, so for one d the map keeps the order of states: a number that is fed the same d again
and again climbs to the first state that d leaves unchanged, and is *stuck* there for good; it passes no such state. So
it is enough to look at the states ahead: "is there one that d leaves as it is, before the visible component moves?"

For a single plane that state is the number itself. In an expansion the last component absorbs increments until it is so
large that d falls below half its own ulp: that is why bf16x2 moves by 1e-6 at first and then stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from collage.formats import Format, format_of, split
from collage.layout import Planes
from collage.strategies import ARITHMETICS, STRATEGIES

THETA_FORMATS = tuple(dict.fromkeys(s.param for s in STRATEGIES.values()))  # those that hold weights in some strategy
MANTISSAS = 128  # bf16 numbers in a binade: where in a binade a weight lies decides what share of it is half an ulp

_TAIL_BINADES = 3  # of the last component, from half an ulp of the first down; below, an increment is dropped no sooner
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
        at: the weight, in the normal range of the format. For a negative one, up is still away from zero.
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

    As `floor`, over the weights of one binade: half an ulp is a larger share of 1.01 than of 1.99. It is the same in
    every binade of the normal range.
    """
    floors = decay_floors(format_name, arithmetic)
    return DecayFloor(float(floors.min()), float(floors.max()))


@cache
def decay_floors(format_name: str, arithmetic: str | None = None) -> Tensor:
    """The decay floor of each weight 1 + k / 128, k < 128. [MANTISSAS] float64."""
    fmt, register = format_of(format_name), register_of(format_name, arithmetic)

    def measured(at: Tensor) -> Tensor:
        planes = _ahead(fmt, at, toward=-1)
        theta = fmt.load(planes, register).value
        return _largest(lambda w: unchanged(fmt, register, planes, -(w * theta)), 1.0, register, theta.shape).amax(1)

    weights = 1 + torch.arange(MANTISSAS, device=_CPU).float() / MANTISSAS
    return torch.cat([measured(at) for at in torch.split(weights, 32)])  # tensors so small that torch starts no threads


def movable_below(format_name: str, step: float) -> float:
    """Magnitude below which a step moves every weight, whatever its last component holds: a quick first test.

    A power of two, with a binade to spare. Relies on floors that scale with the binade: float32's exponent range.
    """
    largest = floor(format_name).up
    return 2.0 ** (math.ceil(math.log2(step / largest)) - 1) if largest else math.inf


def unchanged(fmt: Format, register: torch.dtype, planes: Planes, delta: Tensor) -> Tensor:
    """bool per element: growing by delta leaves every plane as it is, with any random bits if it takes some."""
    number = fmt.load(planes, register).grown(delta)
    same = torch.ones_like(planes[0], dtype=torch.bool)
    for bits in (0, 0xFFFF) if fmt.stochastic else (None,):  # rounding is monotone in the bits: the ends suffice
        random = None if bits is None else torch.full_like(planes[0], bits, dtype=torch.int32)
        for old, new in zip(planes, fmt.encode(number, random), strict=True):
            same &= old == new
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
    """The states that share their visible component with ``at`` [k] and lie at it or beyond. Planes of [k, n]."""
    start = tuple(plane[:, None] for plane in split(fmt, at))
    if len(fmt.components(start)) == 1:
        return start
    hi, lo = start
    precision = round(1 - math.log2(torch.finfo(hi.dtype).eps))
    half_ulp = torch.ldexp(
        torch.ones_like(hi, dtype=torch.float32), torch.frexp(hi.float()).exponent - 1 - precision
    ).to(lo.dtype)
    below = torch.arange(_TAIL_BINADES << (precision - 1), dtype=torch.int16, device=_CPU)
    codes = half_ulp.view(torch.int16) - below
    tails = toward * codes.clamp(min=0).view(lo.dtype)
    tails = torch.cat([lo, torch.where((tails - lo) * toward > 0, tails, lo)], 1)
    return hi.expand(tails.shape), tails


def _largest(dropped: Callable[[Tensor], Tensor], top: float, register: torch.dtype, shape: torch.Size) -> Tensor:
    """For each state the largest number of the register's dtype in [0, top] that is dropped; 0 if none. float64.

    Bisection over the bits, which order as the numbers do; what is dropped is dropped with anything smaller.
    """
    codes = _CODES[register]
    low = torch.zeros(shape, dtype=torch.int32, device=_CPU)
    above = torch.tensor(top, dtype=register, device=_CPU).view(codes).int() + 1
    high = above.expand(shape)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2  # low itself once they are neighbours, so nothing moves any more
        is_dropped = dropped(middle.to(codes).view(register))
        low, high = torch.where(is_dropped, middle, low), torch.where(is_dropped, high, middle.clamp(min=low + 1))
    return low.to(codes).view(register).double()
