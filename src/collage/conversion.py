"""A number from one format into another, and what that rounds, in ulps of the other.

What an expansion holds may be wider than float32: 1 + 2**-30 is two bfloat16 numbers. So between expansions of one
dtype components go over as they are, and only what no component is left for is rounded. Every other way leads through
float32, by the backend's kernels. A remainder of 16 bits, a master weight and float32 hold the same numbers: all of
their bits come back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from collage.accumulators import Expanded
from collage.backends import choose
from collage.formats import Compensated, Expansion, Format, Single, fitted, format_of
from collage.layout import Planes, aligned

F32 = torch.float32
PIECE = 1 << 16  # elements: no temporary is as large as a parameter


@dataclass(frozen=True, slots=True)
class Rounded:
    """What some numbers lost in a format. Those of several tensors are added up."""

    numbers: int = 0
    changed: int = 0
    largest: float = 0.0  # ulps
    squares: float = 0.0  # the sum of squared ulps
    beyond: int = 0  # finite numbers that the format has only infinities for

    @property
    def rms(self) -> float:
        """Root of the mean square over all numbers, in ulps."""
        return math.sqrt(self.squares / self.numbers) if self.numbers else 0.0

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(
            self.numbers + other.numbers, self.changed + other.changed, max(self.largest, other.largest),
            self.squares + other.squares, self.beyond + other.beyond,
        )  # fmt: skip


class Conversion:
    """What was rounded, by slot: (prefix of its state keys, format it had, format it has) -> Rounded.

    >>> report = Conversion()
    >>> report.add("exp_avg", "fp32", "bf16", Rounded(4, 3, 0.5, 0.36))
    >>> print(report)
    exp_avg fp32 -> bf16: 3 of 4 numbers rounded, by 0.50 ulp at most, 0.30 rms
    """

    def __init__(self) -> None:
        self.slots: dict[tuple[str, str, str], Rounded] = {}

    def add(self, slot: str, source: str, target: str, lost: Rounded) -> None:
        """One tensor more."""
        key = slot, source, target
        self.slots[key] = self.slots.get(key, Rounded()) + lost

    def __add__(self, other: Conversion) -> Conversion:
        total = Conversion()
        for report in (self, other):
            for key, lost in report.slots.items():
                total.add(*key, lost)
        return total

    def __str__(self) -> str:
        return "; ".join(f"{slot} {a} -> {b}: {_said(lost)}" for (slot, a, b), lost in self.slots.items()) or "nothing"


def _said(lost: Rounded) -> str:
    if not lost.changed:
        return f"all {lost.numbers:,} numbers kept"
    return (
        f"{lost.changed:,} of {lost.numbers:,} numbers rounded, by {lost.largest:.2f} ulp at most, {lost.rms:.2f} rms"
    )


def carry(source: str, planes: Planes, target: str, out: Planes) -> Rounded:
    """out <- what planes in one format stand for, in another, rounded to nearest (":sr", too). Says what was rounded.

    planes, out: local, of one parameter, on one device.

    >>> x, hi, lo, low = torch.tensor([1.0, 1.0 + 2.0**-9]), *torch.zeros(3, 2).bfloat16()
    >>> carry("fp32", [x], "bf16x2", [hi, lo]).changed, carry("bf16x2", [hi, lo], "bf16", [low]).largest
    (0, 0.25)
    """
    a, b = format_of(source), format_of(target)
    total = Rounded()
    if not planes[0].numel():
        return total
    for piece in aligned([a, b], [planes, out], [], PIECE):
        old, new = piece[: len(a.planes)], piece[len(a.planes) :]
        if _same_words(a, b):
            _write(new, old)
            total += Rounded(old[0].numel())
        elif _is_by_components(a, b):
            before = exact(a, old)
            _write(new, _by_components(a, b, old))
            total += measured(before, b, new)
        else:
            total += _through_float32(source, old, target, new)
    return total


def joined(visible: Tensor, source: str, lows: Planes) -> tuple[str, Planes, int]:
    """(format, planes, how many did not fit) of weights: what shows, and the components that were saved beside it.

    What shows is the first component, wherever it is one of that format's; elsewhere it is the full number already (a
    model loaded in float32). Components that do not fit are those of other weights, and are left out.
    """
    fmt = format_of(source)
    whole, misfits = [visible.to(fmt.dtypes[0]), *(plane.clone() for plane in lows)], 0
    for piece in aligned([fmt], [whole], [], PIECE):
        fresh, broken = fitted(fmt, piece)
        misfits += int(broken.sum())
        _write(piece[1:], fresh[1:])
    full = visible.float() != whole[0].float()
    if not bool(full.any()):
        return source, whole, misfits
    return "fp32", [torch.where(full, visible.float(), fmt.value(whole))], misfits


def rounded_pair(hi: Tensor, lo: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 cut in two 16-bit halves as "bf16+int16" has it: what shows is rounded half up, as in Apex.

    The halves of any float32 but a NaN; of a NaN what shows may be another.
    """
    return (hi.view(torch.int16) + (lo < 0)).view(torch.bfloat16), lo


def cut_pair(hi: Tensor, lo: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of the float32 that planes of "bf16+int16" hold; what shows is cut off, not rounded."""
    return (hi.view(torch.int16) - (lo < 0).to(torch.int16)).view(torch.bfloat16), lo


def exact(fmt: Format, planes: Planes) -> Tensor:
    """float64: the sum of a number's components, of which none is lost unless they are 2**53 apart."""
    return sum((c.double() for c in reversed(fmt.components(planes)[:-1])), fmt.components(planes)[-1].double())


def measured(before: Tensor, fmt: Format, planes: Planes) -> Rounded:
    """What numbers (`exact`) have lost in these planes."""
    after = exact(fmt, planes)
    beyond = before.isfinite() & ~after.isfinite()
    changed = ~beyond & before.isfinite() & (before != after)
    count, ruined = int(changed.sum()), int(beyond.sum())
    if not count:
        return Rounded(before.numel(), beyond=ruined)
    ulps = ((after - before).abs() / fmt.spacing(planes))[changed]
    return Rounded(before.numel(), count, float(ulps.max()), float(ulps.square().sum()), ruined)


def _same_words(a: Format, b: Format) -> bool:
    """Whether the planes of one are the planes of the other; of expansions a stochastic one may leave more."""
    return a == b or (type(a) is type(b) and a.planes == b.planes and not isinstance(a, Expansion))


def _is_by_components(a: Format, b: Format) -> bool:
    kinds = (Expansion, Compensated)
    return isinstance(a, kinds) and isinstance(b, kinds) and a.dtypes[0] == b.dtypes[0]


def _by_components(a: Format, b: Format, planes: Planes) -> Planes:
    """Each component as it is, but where the other format has none such: made of their sum."""
    number, more = Expanded(tuple(plane.float() for plane in planes), a.dtypes[0]), len(b.planes) - len(planes)
    new = b.encode(number) if more < 0 else (*planes, *(torch.zeros_like(planes[0]) for _ in range(more)))
    broken = b.broken(new)
    if not bool(broken.any()):
        return new
    again = b.encode(number.grown(torch.zeros_like(number.components[0])))
    return [torch.where(broken, x, y) for x, y in zip(again, new, strict=True)]


def _through_float32(source: str, planes: Planes, target: str, out: Planes) -> Rounded:
    """By the kernels; where what shows keeps its dtype and is all there is, it stays what it is, ties too."""
    a, b = format_of(source), format_of(target)
    backend, before = (
        choose("auto", planes[0].device),
        exact(a, planes) if isinstance(a, (Expansion, Compensated)) else None,
    )
    x, y = (torch.empty(planes[0].shape, dtype=F32, device=planes[0].device) for _ in range(2))
    backend.decode(source, [planes], [x])
    if isinstance(b, Single) and planes[0].dtype == out[0].dtype and not isinstance(a, Compensated):
        out[0].copy_(planes[0])
    else:
        backend.encode(target, [x], [out])
    if before is None:
        backend.decode(target, [out], [y])
        if torch.equal(x, y):  # the same numbers, and no NaN among them
            return Rounded(x.numel())
    return measured(x.double() if before is None else before, b, out)


def _write(out: Planes, values: Planes) -> None:
    for plane, value in zip(out, values, strict=True):
        plane.copy_(value)
