"""Numbers from one format into another: which keep all their bits, and what is said of those that do not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
import torch
from helpers import assert_each, assert_same_bits, encoded, numbers
from oracle import from_codes
from torch import Tensor

from collage.conversion import Conversion, Rounded, carry, cut_pair, joined, rounded_pair
from collage.formats import FORMATS, format_of
from collage.layout import zeros

FP32 = torch.float32
PAIR = "bf16+int16"


def drawn(name: str, x: Tensor) -> tuple[Tensor, ...]:
    """Planes that hold numbers of the format, second moments without a sign."""
    return encoded(name, x.abs() if name.startswith("uint8") else x)


def carried(source: str, planes: tuple[Tensor, ...], target: str) -> tuple[list[Tensor], Rounded]:
    out = zeros(format_of(target), planes[0])
    return out, carry(source, planes, target, out)


# Bit for bit


def apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 as Apex and TransformerEngine store it: its halves, and a negative low one rounds the other up."""
    bits = x.view(torch.int32)
    hi, lo = (bits >> 16).to(torch.int16), bits.to(torch.int16)
    return (hi + (lo < 0).to(torch.int16)).view(torch.bfloat16), lo


def together(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 that they make of the pair: the rounding is undone, then the halves stand side by side."""
    high = hi.view(torch.int16) - (lo < 0).to(torch.int16)
    return ((high.int() << 16) | (lo.int() & 0xFFFF)).view(FP32)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 cut in two."""
    bits = x.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def sampled_patterns() -> Iterator[Tensor]:
    """float32: every upper half with the lower halves where something changes, and with some others."""
    upper = torch.arange(1 << 16) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        yield from_codes(upper | lower, FP32)
    yield from_codes(upper | torch.randint(0, 1 << 16, (1 << 16,), generator=torch.Generator().manual_seed(1)), FP32)


def every_pattern() -> Iterator[Tensor]:
    for first in range(0, 1 << 32, 1 << 22):
        yield from_codes(torch.arange(first, first + (1 << 22)), FP32)


def assert_same(label: str, got: Tensor, want: Tensor, nan: Tensor) -> None:
    """The same bits, and NaN exactly where it is to be; fast where they are."""
    words = (got.view(torch.int32), want.view(torch.int32))
    if not torch.equal(*(w.masked_fill(nan, 0) for w in words)) or not torch.equal(got.isnan(), nan):
        assert_same_bits(label, got, want)


@pytest.mark.parametrize("patterns", [sampled_patterns, pytest.param(every_pattern, marks=pytest.mark.slow)])
def test_remainders_of_apex_and_float32_are_one_number(patterns):
    """collage-exact <-> Apex's and TransformerEngine's pairs <-> float32 <-> halves: every bit, NaN as NaN."""
    for x in patterns():
        nan, back = x.isnan(), torch.empty_like(x)
        planes, lost = carried("fp32", (x,), PAIR)
        theirs, cut = apart(x), halves(x)
        assert lost == Rounded(x.numel())
        for k in range(2):
            assert torch.equal(*(p[k].view(torch.int16).masked_fill(nan, 0) for p in (planes, theirs))), "their pair"
        assert_same("their reading of ours", together(*planes), x, nan)
        for label, pair in (("ours", planes), ("theirs", theirs), ("halves", rounded_pair(*cut))):
            assert carry(PAIR, pair, "fp32", [back]) == Rounded(x.numel())
            assert_same(label, back, x, nan)
        hi, lo = cut_pair(*planes)
        assert_same("halves of ours", ((hi.view(torch.int16).int() << 16) | (lo.int() & 0xFFFF)).view(FP32), x, nan)


def test_a_wrong_pair_is_found():
    x = torch.tensor([1.0 + 2.0**-8])
    hi, lo = apart(x)
    with pytest.raises(AssertionError, match="1 of 1 differ"):
        assert_same("", together(hi, lo + 1), x, x.isnan())


@pytest.mark.parametrize("name", ["bf16x3", "bf16x2", PAIR, "bf16+fp32", "bf16x3:sr"])
@pytest.mark.parametrize("regime", ["normal", "subnormal", "huge", "infinite", "nan"])
def test_what_fits_comes_back(name, regime):
    """Into a format with as many bits and back. Three bfloat16 numbers hold a float32 but for its lowest binades."""
    x = numbers(regime, 3000, 1).view(30, 100)
    if name.startswith("bf16x") or regime == "subnormal":
        x = x.bfloat16().float() + 0.0  # (-0) + (+0) is +0
    planes, lost = carried("fp32", (x,), name)
    assert lost.changed == lost.beyond == 0
    assert_same_bits(name, carried(name, tuple(planes), "fp32")[0][0], x)


def test_an_expansion_that_no_float32_holds_is_kept_in_others():
    """Component by component; in float32 it is rounded, and that is said."""
    hi, lo = torch.ones(8).bfloat16(), torch.full((8,), 2.0**-40).bfloat16()
    for target in ("bf16x3", "bf16x2:sr", "bf16+kahan"):
        planes, lost = carried("bf16x2", (hi, lo), target)
        assert lost == Rounded(8)
        assert_each(target, planes[:2], (hi, lo))
    assert carried("bf16x2", (hi, lo), "bf16+fp32")[1].changed == 8


def test_what_shows_stays_where_the_dtype_does():
    """hi + half an ulp of it is a tie: rounded anew it could become the neighbour, and the model another."""
    hi, lo = torch.tensor([1.0 + 2.0**-7]).bfloat16(), torch.tensor([2.0**-8]).bfloat16()
    for target in ("bf16", "bf16:sr", "bf16x3"):
        assert_same_bits(target, carried("bf16x2", (hi, lo), target)[0][0], hi)


def test_kahans_compensation_becomes_a_low_component():
    """It may be as large as an ulp, which no expansion leaves: there both are made anew, of the same number."""
    theta, c = torch.tensor([1.0, 1.0]).bfloat16(), torch.tensor([2.0**-7, 2.0**-12]).bfloat16()
    planes, lost = carried("bf16+kahan", (theta, c), "bf16x2")
    assert lost.changed == 0
    assert not format_of("bf16x2").broken(planes).any()
    assert_each(
        "planes", planes, (torch.tensor([1.0 + 2.0**-7, 1.0]).bfloat16(), torch.tensor([0, 2.0**-12]).bfloat16())
    )


# What is said


@pytest.mark.parametrize("source", FORMATS)
def test_what_is_left_fits_and_is_half_an_ulp_off(source):
    """From any format into any other: no step finds the planes broken; nothing is off by more than half an ulp but in
    expansions of float16, whose tail is subnormal, and what it says is what exact arithmetic finds.
    """
    x = numbers("normal", 2 * 130, 3).view(2, 130) * torch.tensor([[2.0**-4], [8.0]])
    for target in FORMATS:
        planes = drawn(source, x.abs() if target.startswith("uint8") else x)
        out, lost = carried(source, planes, target)
        assert (lost.numbers, lost.beyond) == (x.numel(), 0), target
        assert not format_of(target).broken(out).any(), target
        assert lost.largest <= (0.75 if target.startswith("fp16x2") else 0.5), target
        assert_said(lost, sums(source, planes), sums(target, out), format_of(target).spacing(out))


def sums(name: str, planes: Sequence[Tensor]) -> list[Fraction]:
    """The exact numbers."""
    parts = [map(Fraction, c.double().flatten().tolist()) for c in format_of(name).components(planes)]
    return list(map(sum, zip(*parts, strict=True)))


def assert_said(lost: Rounded, before: list[Fraction], after: list[Fraction], ulp: Tensor) -> None:
    """What was counted in float64 is what rational arithmetic finds, to the last digits of a quotient and a root."""
    apart = zip(before, after, ulp.flatten().tolist(), strict=True)
    ulps = [float(abs(a - b) / Fraction(u)) for a, b, u in apart]
    assert sum(u != 0 for u in ulps) == lost.changed
    assert max(ulps) == pytest.approx(lost.largest, rel=1e-12)
    assert math.sqrt(sum(u * u for u in ulps) / len(ulps)) == pytest.approx(lost.rms, rel=1e-12)


def test_the_same_format_keeps_every_bit():
    """Also planes that no encoding would leave: those of a stochastic one."""
    for name in FORMATS:
        planes = drawn(name, numbers("normal", 600, 4).view(4, 150))
        out, lost = carried(name, planes, name)
        assert lost == Rounded(600)
        assert_each(name, out, planes)


def test_what_a_format_cannot_hold_is_counted():
    assert carried("fp32", (torch.tensor([1e5, 1.0]),), "fp16x2")[1].beyond == 1
    assert carried("fp32", (torch.tensor([torch.inf, torch.nan]),), "fp16x2")[1].beyond == 0


def test_strided_and_empty_tensors():
    x = torch.randn(6, 50).t()
    out = [torch.zeros(6, 50).bfloat16().t() for _ in range(2)]
    carry("fp32", [x], "bf16x2", out)
    assert_each("strided", out, encoded("bf16x2", x.contiguous()))
    assert carry("fp32", [torch.zeros(0, 5)], "bf16", [torch.zeros(0, 5).bfloat16()]) == Rounded()


def test_components_are_joined_to_the_weights_they_belong_to():
    x = torch.randn(100)
    hi, lo = encoded("bf16x2", x)
    for visible in (hi, hi.float()):  # a float32 model that the same weights were loaded into
        name, planes, misfits = joined(visible, "bf16x2", [lo])
        assert (name, misfits) == ("bf16x2", 0)
        assert_each("planes", planes, (hi, lo))
    name, (value,), misfits = joined(x, "bf16x2", [lo])  # or its full numbers
    assert (name, misfits) == ("fp32", 0)
    assert_same_bits("full", value, x)
    other = (torch.randn(100) * 2.0**-12).bfloat16()
    name, planes, misfits = joined(other, "bf16x2", [lo])
    assert misfits > 50
    assert_same_bits("other weights", planes[0], other)


def test_a_report_adds_up():
    report = Conversion()
    report.add("exp_avg", "fp32", "bf16", Rounded(2, 1, 0.5, 0.25))
    report.add("exp_avg", "fp32", "bf16", Rounded(2, 0))
    report.add("param", "bf16", "bf16x2", Rounded(4))
    assert str(report) == (
        "exp_avg fp32 -> bf16: 1 of 4 numbers rounded, by 0.50 ulp at most, 0.25 rms; "
        "param bf16 -> bf16x2: all 4 numbers kept"
    )
