"""What a user expects of a step, in float64: AdamW on the weights as they stand, and how far each format may be off.

A *book* holds what is known of one parameter before a step. Every step is judged alone, from the numbers that the
planes stood for before it, so that each bound is a few roundings of that step and nothing piles up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from oracle import SPECS, codes
from torch import Tensor

from collage.monitor.quality import Quality
from collage.strategies import Strategy
from fuzzing import narrow

Planes = dict[str, Tensor]  # "param" and the optimizer's state keys but "step"
BF16 = torch.bfloat16
UNIT = {dtype: 2.0**-spec.precision for dtype, spec in SPECS.items()}  # relative error of one rounding
TINY = {dtype: 2.0**spec.unit for dtype, spec in SPECS.items()}  # absolute error of one rounding that underflows
HUGE = 1e38  # above it a float32 register may overflow: not judged


@dataclass
class Book:
    """One parameter: its planes now, its weights as the optimizer left them, and how many steps it made."""

    planes: Planes
    left: Tensor
    step: int = 0
    unseen: bool = False  # changed in a way that no version counter shows
    address: int | None = None  # where the optimizer left it: by another one a change is seen all the same


@dataclass
class Hyper:
    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    maximize: bool


@dataclass
class Sums:
    """The monitor's sums of one parameter, each with the most it may be off. ``wild``: some number overflowed."""

    steps: int = 0
    dot: float = 0.0
    dot_off: float = 0.0
    norm2: float = 0.0
    norm2_off: float = 0.0
    visible: float = 0.0
    visible_off: float = 0.0
    nonzero: list[int] = field(default_factory=lambda: [0, 0])  # at least, at most
    lost: list[int] = field(default_factory=lambda: [0, 0])
    wild: bool = False

    def compare(self, name: str, quality: Quality) -> None:
        """Raise AssertionError unless a monitor reports these sums. What overflowed is not judged."""
        if self.wild:
            return
        lost = round((quality.lost or 0.0) * quality.nonzero)
        counts = {
            "steps": (quality.steps, [self.steps] * 2),
            "nonzero": (quality.nonzero, self.nonzero),
            "lost": (lost, self.lost),
        }
        for what, (got, (least, most)) in counts.items():
            assert least <= got <= most, f"monitor '{name}': {what} is {got}, expected {least} to {most}"
        if self.norm2 < 1e-280 or self.norm2_off > 0.1 * self.norm2:
            return
        for what, x, x_off in (("edq_ratio", self.dot, self.dot_off), ("edq_visible", self.visible, self.visible_off)):
            got, want = getattr(quality, what), x / self.norm2
            off = (x_off + abs(want) * self.norm2_off) / (self.norm2 - self.norm2_off)
            assert got is not None, f"monitor '{name}': {what} is None, expected {want}"
            assert abs(got - want) <= off, f"monitor '{name}': {what} is {got}, expected {want} within {off:.3g}"


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance to the next number of dtype above |x|, float64."""
    spec = SPECS[dtype]
    exponent = torch.where(x == 0, spec.emin, torch.frexp(x.abs())[1] - 1)
    return torch.ldexp(torch.ones_like(x), exponent.clamp(min=spec.emin) - spec.precision + 1)


def components(prefix: str, planes: Planes) -> list[Tensor]:
    """The planes whose sum is the number, largest first, float64."""
    if prefix + "_master" in planes:
        return [planes[prefix + "_master"].double()]
    if prefix + "_scale" in planes:
        return [narrow.coded(planes[prefix], planes[prefix + "_scale"])]
    if _has_remainder(prefix, planes):
        return [narrow.word(planes[prefix], planes[prefix + "_lo"])]
    return [planes[prefix + suffix].double() for suffix in ("", "_lo", "_kahan") if prefix + suffix in planes]


def _has_remainder(prefix: str, planes: Planes) -> bool:
    return prefix + "_lo" in planes and not planes[prefix + "_lo"].dtype.is_floating_point


def value(prefix: str, planes: Planes) -> Tensor:
    return sum(components(prefix, planes))  # type: ignore[return-value]


def derived(planes: Planes) -> Planes:
    """Theta's planes where the visible one alone says what the weights are."""
    fresh = {key: plane for key, plane in planes.items() if key in ("param", "param_lo", "param_kahan", "param_master")}
    for key in fresh.keys() - {"param"}:
        fresh[key] = planes["param"].float() if key == "param_master" else torch.zeros_like(planes[key])
    return fresh


def fits(planes: Planes) -> tuple[Tensor, Tensor]:
    """Per element: planes that certainly belong together, and planes that may (one step of slack)."""
    hi = planes["param"].double()
    if "param_master" in planes:
        cast = planes["param_master"].to(planes["param"].dtype).double()
        same = (hi == cast) | (hi.isnan() & cast.isnan())
        return same, same
    if _has_remainder("param", planes):
        fit = ~narrow.word_is_broken(planes["param"], planes["param_lo"])
        return fit, fit
    for key, ulps in (("param_lo", 0.5), ("param_kahan", 1.0)):
        if key in planes:
            lo, most = planes[key].double().abs(), ulps * ulp(hi, planes["param"].dtype)
            slack = most + 2 * ulp(most, planes[key].dtype)
            surely = torch.where(hi.isfinite(), lo <= most, lo == 0) & ((hi != 0) | (lo == 0))
            return surely, torch.where(hi.isfinite(), lo <= slack, lo == 0)
    yes = torch.ones_like(hi, dtype=torch.bool)
    return yes, yes


def choices(book: Book, looked: bool) -> tuple[Tensor, Tensor]:
    """Per element: whether a step may start from the planes as they are, and whether from the visible weights alone.

    looked: whether it has to notice an edit that no counter shows.
    """
    surely, loosely = fits(book.planes)
    edited = codes(book.planes["param"].contiguous()) != codes(book.left.contiguous())
    keep = ~edited | loosely | (book.unseen and not looked)
    return keep, edited & ~surely


def stored(strategy: Strategy, prefix: str, planes: Planes) -> Tensor:
    """The most that encoding a register into these planes may lose: half an ulp of the last one; all of it for :sr."""
    role = {"param": strategy.param, "exp_avg": strategy.momentum, "exp_avg_sq": strategy.variance}[prefix]
    share = 1.0 if role.endswith(":sr") else 0.5
    if prefix + "_scale" in planes:
        return share * narrow.code_step(planes[prefix], planes[prefix + "_scale"])
    if _has_remainder(prefix, planes):
        return share * narrow.word_ulp(planes[prefix], planes[prefix + "_lo"])
    last = [planes[prefix + s] for s in ("", "_lo", "_kahan", "_master") if prefix + s in planes][-1]
    return ulp(last.double(), last.dtype) * share


def require(name: str, what: str, got: Tensor, want: Tensor, off: Tensor, ok: Tensor) -> None:
    """Raise AssertionError, naming the first element where got is further than off from want."""
    wrong = (~((got - want).abs() <= off) & ok).flatten().nonzero().flatten().tolist()
    if wrong:
        i = wrong[0]
        a, b, c = (x.flatten()[i].item() for x in (got, want, off))
        raise AssertionError(
            f"{what} of '{name}': {len(wrong)} of {got.numel()} are wrong, the first at {i}: got {a!r}, want {b!r} "
            f"within {c:.3g}, off by {a - b:.3g}"
        )


def judge(
    name: str, strategy: Strategy, book: Book, after: Planes, grad: Tensor, h: Hyper, looked: bool, sums: Sums | None
) -> None:
    """Raise AssertionError unless ``after`` is what AdamW makes of the book; add to the sums what a monitor should."""
    register, paper = strategy.register, strategy.register == BF16
    u, tiny = UNIT[register], TINY[register]
    t, before = book.step + 1, derived({**after, "param": book.planes["param"]}) | book.planes
    g = grad.double() * (-1.0 if h.maximize else 1.0)
    zero = torch.zeros_like(g)
    m, v = (value(prefix, before) if prefix in before else zero for prefix in ("exp_avg", "exp_avg_sq"))

    # Moments. A float32 gradient in bf16 arithmetic, a constant, each product and the sum round: up to 7 roundings in
    # g * g, fewer elsewhere. An expansion in bf16 arithmetic carries v on within 5 u**2 (mul) and 2 u**2 (grow).
    m1, v1 = h.beta1 * m + (1 - h.beta1) * g, h.beta2 * v + (1 - h.beta2) * g * g
    m_off = 5 * u * (h.beta1 * m.abs() + (1 - h.beta1) * g.abs()) + 4 * tiny
    carried = 12 * u * u if paper and "exp_avg_sq_lo" in after else 5 * u
    v_off = carried * h.beta2 * v + 7 * u * (1 - h.beta2) * g * g + 8 * tiny
    v_off += 2 * u * u * v1 if paper else 0

    # The update. In bf16 arithmetic the rule reads v's high component: one rounding more. sqrt, +, * and / round, and
    # so do a and e.
    s = math.sqrt(1 - h.beta2**t)
    a, e, w = h.lr * s / (1 - h.beta1**t), h.eps * s, h.lr * h.decay
    read_off = v_off + (u * v1 if paper else 0)
    low = ((v1 - read_off).clamp(min=0).sqrt() + e) * (1 - 4 * u)
    high = ((v1 + read_off).sqrt() + e) * (1 + 4 * u)
    q = a * m1 / (v1.sqrt() + e)
    q_off = a * m_off / low + (a * m1).abs() * (1 / low - 1 / high) + 6 * u * q.abs() + tiny * (2 + 1 / low)

    new, hi = value("param", after), before["param"].double()
    lo = after["param_kahan"].double().abs() if "param_kahan" in after else zero
    wild = torch.zeros_like(g, dtype=torch.bool)
    for x in (g * g, m, v, m1, v1, a * m1, q, hi):
        wild |= ~(x.abs() < HUGE)  # NaN too
    require(name, "exp_avg", value("exp_avg", after), m1, m_off + stored(strategy, "exp_avg", after), ~wild)
    require(name, "exp_avg_sq", value("exp_avg_sq", after), v1, v_off + stored(strategy, "exp_avg_sq", after), ~wild)

    # Theta, from each start that is allowed. Growing rounds r, x and the rest (float32); an expansion in bf16
    # arithmetic grows within 2 u**2; Kahan rounds y, theta - s and c.
    allowed = choices(book, looked)
    starts = (value("param", before), value("param", derived(before)))
    found = []
    for start in starts:
        read = hi if paper else start  # in bf16 arithmetic the rule reads theta's high component
        delta = -(q + w * read)
        delta_off = q_off + 5 * u * (w * read).abs() + 2 * u * delta.abs() + tiny
        off = delta_off + stored(strategy, "param", after) + TINY[after["param"].dtype]
        off = off + 2.0**-50 * start.abs()  # float64 rounds too
        if "param_kahan" in after:
            moved = (after["param"].double() - hi).abs()
            off = off + 2 * u * (delta.abs() + (start - hi).abs() + moved + lo)
        elif not paper or "param_lo" in after:
            off = off + 4 * (u * u if paper else u) * (start.abs() + delta.abs())
            off = off + (2 * u * (start - hi).abs() if paper else 0)  # lo + e rounds, and lo may be an old one
        found.append((start + delta, off, delta, delta_off))
    kept, fresh = found
    near = ((new - kept[0]).abs() <= kept[1]) | (new.isnan() & kept[0].isnan())
    take = allowed[0] & (near | ~allowed[1])
    want, off, delta, delta_off = (torch.where(take, *pair) for pair in zip(kept, fresh, strict=True))
    wild |= ~(want.abs() < HUGE)
    require(name, "value", new, want, off, ~wild)
    require(name, "planes that fit", fits(after)[1].double(), zero + 1, zero, ~wild)

    if sums is not None:
        exactly = (q == 0) & (w * torch.where(take, *starts) == 0)
        _add(sums, before, take, after, delta, delta_off.masked_fill(exactly, 0.0), wild)


def _add(
    sums: Sums, before: Planes, take: Tensor, after: Planes, delta: Tensor, delta_off: Tensor, wild: Tensor
) -> None:
    """What arrived, over the components; what was lost: updates that changed no plane."""
    fresh = derived(before)
    begin = {key: torch.where(take, before[key], fresh[key]) for key in fresh}
    arrived = torch.zeros_like(delta)
    for old, new in zip(components("param", begin), components("param", after), strict=True):
        arrived += new - old
    visible = after["param"].double() - begin["param"].double()
    still = torch.ones_like(wild)
    for key in begin:
        still &= begin[key] == after[key]
    sums.steps += 1
    sums.wild |= bool(wild.any())
    for key, x in (("dot", arrived), ("visible", visible)):
        setattr(sums, key, getattr(sums, key) + (delta * x).sum().item())
        off = ((delta_off + 1e-12 * delta.abs()) * x.abs()).sum().item()
        setattr(sums, key + "_off", getattr(sums, key + "_off") + off)
    sums.norm2 += (delta * delta).sum().item()
    sums.norm2_off += (2 * delta.abs() * delta_off + delta_off**2 + 1e-12 * delta**2).sum().item()
    surely, perhaps = delta.abs() > delta_off, (delta.abs() <= delta_off) & (delta_off > 0)
    for pair, where in ((sums.nonzero, torch.ones_like(still)), (sums.lost, still)):
        pair[0] += int((surely & where).sum())
        pair[1] += int(((surely | perhaps) & where).sum())
