"""Every row of the table of formats: round trips, splitting, growing as the contract says, floors, broken planes."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from helpers import assert_same_bits
from oracle import (
    SPECS,
    codes,
    decode,
    every,
    fractions,
    from_codes,
    nearest,
    random_patterns,
)
from torch import Tensor

from collage import mcf
from collage.accumulators import Expanded, Kahan, PaperExpanded, Register
from collage.formats import FORMATS, Compensated, Expansion, Format, fitted, format_of, split
from collage.layout import bytes_per_value
from collage.rng import Stream

BF16, FP32 = torch.bfloat16, torch.float32
every_format = pytest.mark.parametrize("name", FORMATS)
two_components = pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.dtypes == (BF16, BF16)])

INF, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor(
    [0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 3.3895e38, 3.4e38, -3.4028e38, 1e-45, 1e-40, 65504.0, 65520.0]
)


def numbers(seed: int = 0, size: int = 10_000) -> Tensor:
    """float32: patterns (huge, tiny, subnormal), ordinary weights, and special values."""
    g = torch.Generator().manual_seed(seed)
    return torch.cat([random_patterns(FP32, size, seed), torch.randn(size, generator=g), SPECIAL])


def random_bits(fmt: Format, size: int, g: torch.Generator) -> Tensor | None:
    return torch.randint(0, 1 << 16, (size,), generator=g, dtype=torch.int32) if fmt.stochastic else None


def arithmetic_of(name: str) -> torch.dtype:
    return BF16 if isinstance(FORMATS[name], Compensated) else FP32


def round_to(x: Fraction, dtype: torch.dtype) -> Fraction:
    """One operation of the oracle's arithmetic. The tests stay where nothing overflows."""
    number = decode(nearest(x, dtype), SPECS[dtype])
    assert number is not None
    return number * Fraction(2) ** SPECS[dtype].unit


def half_ulp(x: Fraction, dtype: torch.dtype) -> Fraction:
    spec = SPECS[dtype]
    n, d = abs(x.numerator), x.denominator  # d is a power of two
    exponent = n.bit_length() - d.bit_length() if n else spec.emin
    return Fraction(2) ** (max(exponent, spec.emin) - spec.precision)


@every_format
def test_a_format_describes_its_planes(name):
    fmt = format_of(name)
    planes = split(fmt, torch.ones(3, 5))
    assert tuple(p.dtype for p in planes) == fmt.dtypes
    assert all(p.shape == (3, 5) for p in planes)
    assert len(fmt.suffixes) == len(fmt.dtypes)
    assert fmt.suffixes[0] == ""
    assert bytes_per_value(fmt) == sum(p.element_size() for p in planes)
    assert fmt.stochastic == name.endswith(":sr")


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown format 'bf15'; known formats: fp32, bf16, .*bf16x2:sr"):
        format_of("bf15")


@every_format
def test_loading_and_encoding_changes_nothing(name):
    """On planes that `split` left, and with any random bits: what is exact is not rounded."""
    fmt = FORMATS[name]
    planes = split(fmt, numbers())
    number = fmt.load(planes, arithmetic_of(name))
    for k in (None, 0, 0xFFFF):
        random = None if k is None or not fmt.stochastic else torch.full(planes[0].shape, k, dtype=torch.int32)
        for i, (got, want) in enumerate(zip(fmt.encode(number, random), planes, strict=True)):
            assert_same_bits(f"{name} plane {i}", got, want)


@pytest.mark.parametrize("name", ["bf16x2", "bf16x2:sr"])
def test_loading_and_encoding_in_bfloat16_changes_nothing(name):
    planes = split(FORMATS[name], numbers())
    for got, want in zip(FORMATS[name].encode(FORMATS[name].load(planes, BF16)), planes, strict=True):
        assert_same_bits(name, got, want)


@every_format
def test_split_is_the_nearest_and_the_rest(name):
    """hi = RN(x), lo = RN(x - hi), |lo| <= half an ulp of hi; the other formats are one rounding, or x itself."""
    fmt, x = FORMATS[name], numbers()
    planes = split(fmt, x)
    assert_same_bits(f"{name} hi", planes[0], mcf.rn(x, fmt.dtypes[0]))
    if name == "bf16+fp32":
        assert_same_bits("master", planes[1], x)
    if fmt.dtypes != (BF16, BF16):
        return
    for number, hi, lo in zip(fractions(x), fractions(planes[0]), fractions(planes[1]), strict=True):
        if hi is None:
            assert lo == 0
        else:
            assert lo == round_to(number - hi, BF16)
            assert abs(lo) <= half_ulp(hi, BF16)


@every_format
def test_value_is_the_number(name):
    """As close to x as the format can be, in its range; Inf and NaN where x is beyond it."""
    fmt, x = FORMATS[name], numbers()
    value = fmt.value(split(fmt, x))
    assert value.dtype == FP32
    if FP32 in fmt.dtypes:
        return assert_same_bits(name, value, x)
    spec = SPECS[fmt.dtypes[0]]
    for number, got in zip(fractions(x), fractions(value), strict=True):
        if number is not None and abs(number) <= decode(spec.max_code, spec) * Fraction(2) ** spec.unit:
            precision = 2 * spec.precision + 1 if len(fmt.dtypes) == 2 else spec.precision
            assert abs(got - number) <= max(abs(number) / 2**precision, Fraction(2) ** (spec.unit - 1))
        elif number is None:
            assert got is None
    return None


@two_components
def test_lo_is_plus_zero_where_hi_is_not_finite(name):
    fmt = FORMATS[name]
    x = torch.tensor([INF, -INF, NAN, 3.4e38, -3.4e38])
    assert codes(split(fmt, x)[1]).tolist() == [0] * 5
    hi, lo = (torch.tensor([v] * 3, dtype=BF16) for v in (1.0, 2.0**-9))
    number = fmt.load((hi, lo), arithmetic_of(name))
    planes = fmt.encode(number.grown(torch.tensor([INF, -INF, NAN], dtype=arithmetic_of(name))))
    assert codes(planes[1]).tolist() == [0] * 3
    assert [v if v == v else "nan" for v in planes[0].tolist()] == [INF, -INF, "nan"]


@every_format
def test_components_are_what_edq_differences(name):
    """Their sum is the number. With a master that is the master alone."""
    fmt = FORMATS[name]
    planes = split(fmt, torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    total = sum(c.double() for c in fmt.components(planes))
    assert torch.equal(total.float(), fmt.value(planes))


# Growing, step by step in exact arithmetic


def states(seed: int, size: int = 3000) -> tuple[Tensor, Tensor, Tensor]:
    """hi, lo and an increment in float32: ordinary, tiny, cancelling, dominating; zeros and subnormals; no overflow."""
    g = torch.Generator().manual_seed(seed)
    x = torch.cat([random_patterns(FP32, size, seed), torch.randn(size, generator=g)])
    x = torch.where(x.abs() < 2.0**120, x, torch.zeros_like(x))
    hi, lo = split(FORMATS["bf16x2"], x)
    ratio = torch.exp2(torch.randint(-26, 4, x.shape, generator=g).float()) * torch.randn(x.shape, generator=g)
    delta = x * ratio
    kind = torch.randint(0, 16, x.shape, generator=g)
    delta = torch.where(kind == 0, -x, torch.where(kind == 1, 0.0, torch.where(kind == 2, 1e-40, delta)))
    return hi, lo, torch.where(kind == 3, -hi.float() * (1 + 2.0**-8), delta)


def emulate(step: Callable, *tensors: Tensor) -> list[tuple[Fraction, ...]]:
    return [step(*row) for row in zip(*map(fractions, tensors), strict=True)]


def assert_numbers(got: tuple[Tensor, ...], want: list[tuple[Fraction, ...]]) -> None:
    for k, row in enumerate(zip(*map(fractions, got), strict=True)):
        assert row == want[k], (k, row, want[k])


def test_bf16x2_grows_lo_first():
    """r = lo + d; x = hi + r; h = RN(x); lo' = RN((hi - h) + r), each operation rounded to float32, in this order."""

    def step(hi: Fraction, lo: Fraction, delta: Fraction) -> tuple[Fraction, Fraction]:
        r = round_to(lo + delta, FP32)
        h = round_to(round_to(hi + r, FP32), BF16)
        return h, round_to(round_to(round_to(hi - h, FP32) + r, FP32), BF16)

    hi, lo, delta = states(0)
    fmt = FORMATS["bf16x2"]
    number = fmt.load((hi, lo), FP32)
    assert isinstance(number, Expanded)
    assert_numbers(fmt.encode(number.grown(delta)), emulate(step, hi, lo, delta))


def test_bf16x2_scales_into_a_register_and_grows_there():
    def step(hi: Fraction, lo: Fraction, delta: Fraction) -> tuple[Fraction, Fraction]:
        register = round_to(round_to(lo + hi, FP32) * Fraction(beta.item()), FP32)
        register = round_to(register + delta, FP32)
        h = round_to(register, BF16)
        return h, round_to(register - h, BF16)

    hi, lo, delta = states(1)
    fmt, beta = FORMATS["bf16x2"], torch.tensor(0.999)
    number = fmt.load((hi, lo), FP32).scaled((beta,))
    assert isinstance(number, Register)
    assert_numbers(fmt.encode(number.grown(delta)), emulate(step, hi, lo, delta))


def test_bf16x2_in_bfloat16_arithmetic_grows_by_two_sum():
    """s, e = TwoSum(hi, d); v = RN(lo + e); hi', lo' = TwoSum(s, v). Rules read hi alone."""

    def step(hi: Fraction, lo: Fraction, delta: Fraction) -> tuple[Fraction, Fraction]:
        s = round_to(hi + delta, BF16)
        v = round_to(lo + (hi + delta - s), BF16)
        h = round_to(s + v, BF16)
        return h, s + v - h

    hi, lo, delta = states(2)
    delta = mcf.rn(delta, BF16)
    fmt = FORMATS["bf16x2"]
    number = fmt.load((hi, lo), BF16)
    assert isinstance(number, PaperExpanded)
    assert number.value is hi
    assert_numbers(fmt.encode(number.grown(delta)), emulate(step, hi, lo, delta))


def test_bf16_kahan_grows_by_kahans_recurrence():
    """y = d + c; s = theta + y; c' = (theta - s) + y, each rounded to bfloat16. `scaled` and rules read theta alone."""

    def step(theta: Fraction, c: Fraction, delta: Fraction) -> tuple[Fraction, Fraction]:
        y = round_to(delta + c, BF16)
        s = round_to(theta + y, BF16)
        return s, round_to(round_to(theta - s, BF16) + y, BF16)

    theta, c, delta = states(3)
    delta = mcf.rn(delta, BF16)
    fmt = FORMATS["bf16+kahan"]
    number = fmt.load((theta, c), BF16)
    assert isinstance(number, Kahan)
    assert number.value is theta
    assert_numbers(fmt.encode(number.grown(delta)), emulate(step, theta, c, delta))
    scaled = number.scaled((torch.tensor(0.5).bfloat16(),))
    assert torch.equal(scaled.value, theta * 0.5)
    assert scaled.compensation is c


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "bf16+fp32"])
def test_other_formats_grow_in_one_register(name):
    fmt = FORMATS[name]
    x, g = torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    delta = torch.randn(1000, generator=g) / 1000
    planes = split(fmt, x)
    grown = planes[-1].float() + delta
    want = (mcf.rn(grown, fmt.dtypes[0]), grown)[: len(planes)]
    for got, expected in zip(fmt.encode(fmt.load(planes, FP32).grown(delta)), want, strict=True):
        assert_same_bits(name, got, expected)


def test_a_verb_changes_nothing_in_place():
    delta = torch.full((4,), 0.5)
    for name, fmt in FORMATS.items():
        planes = split(fmt, torch.ones(4))
        before = [p.clone() for p in planes]
        number = fmt.load(planes, arithmetic_of(name))
        number.scaled((torch.tensor(0.5, dtype=arithmetic_of(name)),)).grown(delta.to(arithmetic_of(name)))
        fmt.encode(number.grown(delta.to(arithmetic_of(name))))
        assert all(torch.equal(a, b) for a, b in zip(planes, before, strict=True))


def test_stochastic_formats_round_only_their_last_plane():
    """And up as often as the part dropped says, here 3/8 of the 65,536 values."""
    x = 1 + 2.0**-9 + 2.0**-16 + 3 * 2.0**-19
    random = torch.arange(1 << 16, dtype=torch.int32)
    hi, lo = FORMATS["bf16x2:sr"].encode(Register(torch.full((1 << 16,), x)), random)
    assert set(hi.tolist()) == {1.0}
    assert sorted(set(lo.tolist())) == [2.0**-9 + 2.0**-16, 2.0**-9 + 2.0**-15]
    assert int((lo == 2.0**-9 + 2.0**-15).sum()) == 3 << 13
    (single,) = FORMATS["bf16:sr"].encode(Register(torch.full((1 << 16,), 1 + 3 * 2.0**-10)), random)
    assert int((single == 1 + 2.0**-7).sum()) == 3 << 13


# Floors: the fraction of 2,000 constant increments at theta = 1 that arrives

INCREMENTS = (1e-5, -1e-5, 1e-6, -1e-6)
KEPT = [
    ("fp32", FP32, (1.0014, 1.0014, 0.9537, 1.0133), 5e-5),
    ("bf16+fp32", FP32, (1.0014, 1.0014, 0.9537, 1.0133), 5e-5),
    ("bf16", FP32, (0, 0, 0, 0), 0),
    ("fp16", FP32, (0, 0, 0, 0), 0),
    ("bf16x2", FP32, (1.1227, 0.8831, 0.2441, 0.2441), 5e-5),
    ("bf16", BF16, (0, 0, 0, 0), 0),
    ("bf16x2", BF16, (0.1953, 0.8842, 0.2441, 0.2441), 5e-5),
    ("bf16+kahan", BF16, (0.1953, 0.8842, 0.2441, 0.2441), 5e-5),
    ("bf16x2:sr", FP32, (1, 1, 1, 1), 0.01),
    ("bf16:sr", FP32, (1, 1, 1, 1), 0.2),  # the mean of 2,048 elements, each +-0.6 at 1e-5 and +-1.6 at 1e-6
]


@pytest.mark.parametrize(
    ("name", "arithmetic", "kept", "tolerance"), KEPT, ids=lambda v: str(v) if isinstance(v, str) else ""
)
def test_constant_increments(name, arithmetic, kept, tolerance):
    """A stochastic format is judged by a mean. Grown in one float32 sum bf16x2:sr would keep 0.954 of 1e-6."""
    fmt = FORMATS[name]
    delta = torch.tensor(INCREMENTS)[:, None].expand(4, 2048 if fmt.stochastic else 1)
    rounded = mcf.rn(delta.contiguous(), arithmetic)
    planes, index = split(fmt, torch.ones(delta.shape)), torch.arange(delta.numel()).view(delta.shape)
    for step in range(2000):
        random = Stream(seed=0, step=step, key=0).bits(index, "param") if fmt.stochastic else None
        planes = fmt.encode(fmt.load(planes, arithmetic).grown(rounded), random)
    got = (sum(c.double() for c in fmt.components(planes)) - 1).mean(1) / (2000 * delta[:, 0].double())
    assert got.tolist() == pytest.approx(kept, abs=tolerance)


# Planes that no encode could have left


def increments(regime: str, hi: Tensor, g: torch.Generator) -> Tensor:
    """float32. No |increment| above 2**126: from 3.38e38 on hi - h itself may overflow."""
    size, x = hi.shape, hi.float()

    def uniform() -> Tensor:
        return torch.rand(size, generator=g) * 2 - 1

    if regime == "any ratio":
        delta = x * torch.exp2(torch.randint(-20, 20, size, generator=g).float()) * uniform()
        kind = torch.randint(0, 12, size, generator=g)
        delta = torch.where(kind == 0, -x, torch.where(kind == 1, 0.0, torch.where(kind == 2, uniform(), delta)))
    elif regime == "sixteenths of an ulp":
        delta = x * torch.randint(-32, 33, size, generator=g) * 2.0**-11
    elif regime == "reversal":
        delta = (
            -x
            * (1 + torch.randint(-4, 5, size, generator=g) * 2.0**-7)
            * 2.0 ** torch.randint(-1, 3, size, generator=g)
        )
    else:
        delta = random_patterns(FP32, hi.numel(), int(torch.randint(0, 1 << 30, (), generator=g)))
    return torch.where(delta.abs() <= 2.0**126, delta, 0.0)


REGIMES = ("any ratio", "sixteenths of an ulp", "reversal", "patterns")
HOW_MANY = [pytest.param((10_000, 15), id="150k"), pytest.param((200_000, 50), id="10M", marks=pytest.mark.slow)]


def walk(name: str, arithmetic: torch.dtype, regime: str, size: int, steps: int):
    """Planes after each of many random steps, every third of them scaled first. What is not finite starts again."""
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    x = random_patterns(BF16, size, seed=1).float()
    start = split(fmt, torch.where(x.abs() < 2.0**126, x, 0.0))
    planes = start
    beta = tuple(torch.tensor(b, dtype=arithmetic) for b in ((0.999,) if arithmetic == FP32 else (1.0, -0.001)))
    for step in range(steps):
        number = fmt.load(planes, arithmetic)
        number = number.scaled(beta) if step % 3 == 1 else number
        planes = fmt.encode(
            number.grown(mcf.rn(increments(regime, planes[0], g), arithmetic)), random_bits(fmt, size, g)
        )
        yield planes
        kept = planes[0].abs().float() < 2.0**126
        planes = tuple(torch.where(kept, new, old) for new, old in zip(planes, start, strict=True))


WALKS = [
    pytest.param(name, arithmetic, regime, id=f"{name} in {str(arithmetic).removeprefix('torch.')}, {regime}")
    for name, arithmetic in [*((n, arithmetic_of(n)) for n in FORMATS), ("bf16x2", BF16)]
    for regime in REGIMES
]


@pytest.mark.parametrize(("name", "arithmetic", "regime"), WALKS)
@pytest.mark.parametrize("many", HOW_MANY)
def test_broken_never_fires_on_what_encode_leaves(name, arithmetic, regime, many):
    for step, planes in enumerate(walk(name, arithmetic, regime, *many)):
        broken = FORMATS[name].broken(planes)
        wrong = [p[broken][:3].tolist() for p in planes]
        assert not bool(broken.any()), (step, int(broken.sum()), wrong)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    ("name", "arithmetic", "ulps"),
    [("bf16x2", FP32, 0.5), ("bf16x2", BF16, 0.5), ("bf16x2:sr", FP32, 0.5 + 2.0**-8), ("bf16+kahan", BF16, 1.0)],
    ids=["bf16x2", "bf16x2 in bfloat16", "bf16x2:sr", "bf16+kahan"],
)
def test_how_large_the_second_component_gets(name, arithmetic, ulps, regime):
    """In ulps of hi. Where |d| > |theta|, Kahan's theta - s rounds too, and his compensation reaches a whole ulp."""
    for hi, lo in walk(name, arithmetic, regime, 10_000, 15):
        exponent = torch.frexp(hi.double())[1].clamp(min=-125) - 1
        ulp = torch.exp2(exponent.double() - 7)
        finite = hi.isfinite()
        bound = ulps * ulp + (2.0**-133 if name.endswith(":sr") else 0)  # one step, where lo is subnormal
        assert bool((lo.double().abs() <= bound)[finite].all())


def test_kahans_compensation_does_reach_an_ulp():
    """0.5 + 129: the sum rounds to 130, theta - s to -130, and c is -1 instead of -0.5."""
    theta, delta = torch.tensor([0.5]).bfloat16(), torch.tensor([129.0]).bfloat16()
    s, c = FORMATS["bf16+kahan"].encode(Kahan(theta, torch.zeros_like(theta)).grown(delta))
    assert (s.item(), c.item()) == (130.0, -1.0)
    assert not FORMATS["bf16+kahan"].broken((s, c)).any()


@pytest.mark.parametrize("name", ["bf16x2", "bf16x2:sr", "bf16+fp32", "bf16+kahan"])
def test_broken_notices_other_weights(name):
    """One element may look right by chance; a tensor can't."""
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    planes = split(fmt, torch.randn(10_000, generator=g))
    other = torch.randn(10_000, generator=g).bfloat16()
    share = fmt.broken((other, *planes[1:])).float().mean().item()
    assert share > (0.99 if name == "bf16+fp32" else 0.1)
    for changed in (planes[0] * 0.1, torch.zeros_like(planes[0]), planes[0].clamp(-0.01, 0.01), planes[0] * INF):
        assert fmt.broken((changed, *planes[1:])).any()
    assert not fmt.broken(planes).any()


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "bf16:sr"])
def test_one_plane_cannot_be_broken(name):
    planes = (random_patterns(FORMATS[name].dtypes[0], 1000, seed=0),)
    assert not FORMATS[name].broken(planes).any()


def test_the_bound_of_lo_is_tight():
    """Half an ulp and one step more pass; the next number does not. At every binade, subnormals included."""
    fmt = Expansion(BF16)
    hi = every(BF16)
    hi = hi[hi.isfinite()]
    half = torch.tensor([float(half_ulp(x, BF16)) for x in fractions(hi)])
    allowed = from_codes(codes(mcf.rn(half, BF16)) + 1, BF16)  # of a subnormal hi half an ulp is no number: one step
    beyond = from_codes(codes(allowed) + 1, BF16)
    assert torch.equal(fmt.broken((hi, allowed)), hi == 0)  # to nearest, lo rounds to 0 where hi does
    assert not fmt.broken((hi[hi == 0], torch.zeros(2).bfloat16())).any()
    assert not Expansion(BF16, stochastic=True).broken((hi, allowed)).any()
    for broken in (fmt.broken, Expansion(BF16, stochastic=True).broken):
        assert broken((hi, beyond)).all()
        assert broken((hi, -beyond)).all()


@pytest.mark.parametrize("scale", [1.0, 2.0**-120, 2.0**-122])
def test_a_tail_just_above_half_an_ulp_may_be_rounded_up(scale):
    """x = hi + r rounds to a tie, which goes back to hi and leaves the tail r, a little more than half an ulp."""
    fmt = FORMATS["bf16x2:sr"]
    hi = torch.tensor([scale]).bfloat16()
    delta = torch.tensor([scale * (2.0**-8 + 2.0**-26)])
    number = fmt.load((hi, torch.zeros_like(hi)), FP32).grown(delta)
    planes = fmt.encode(number, torch.tensor([0xFFFF], dtype=torch.int32))
    assert torch.equal(planes[0], hi)
    assert planes[1].item() > scale * 2.0**-8
    assert not fmt.broken(planes).any()


@pytest.mark.parametrize("name", ["bf16", "bf16x2", "bf16x2:sr", "bf16+fp32", "bf16+kahan"])
def test_fitted_takes_what_does_not_fit_as_it_is_and_leaves_the_rest(name):
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    hi, *others = split(fmt, torch.randn(1000, generator=g))
    edited = torch.where(torch.arange(1000) % 3 == 0, hi * 2.0**-20, hi)
    planes, broken = fitted(fmt, (edited, *others))
    assert torch.equal(planes[0], edited)
    assert not fmt.broken(planes).any()
    assert bool(broken.any()) == (name != "bf16")
    assert not broken[edited == hi].any()
    for new, old, fresh in zip(planes[1:], others, split(fmt, edited.float())[1:], strict=True):
        assert torch.equal(new, torch.where(broken, fresh, old))
