"""Every row of the table of formats: round trips, splitting, growing as the contract says, floors, broken planes."""

from collections.abc import Callable, Iterator
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
    half_ulp,
    nearest,
    random_patterns,
    stochastic,
)
from torch import Tensor

from collage import mcf
from collage.accumulators import Expanded, Kahan, PaperExpanded, Register
from collage.formats import FORMATS, Compensated, Expansion, Format, fitted, format_of, split
from collage.layout import bytes_per_value
from collage.rng import Stream

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EXPANSIONS = [name for name, fmt in FORMATS.items() if isinstance(fmt, Expansion)]
every_format = pytest.mark.parametrize("name", FORMATS)
every_elementwise = pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.elementwise])
of_floats = pytest.mark.parametrize(
    "name", [n for n, f in FORMATS.items() if all(d.is_floating_point for d in f.dtypes)]
)
every_expansion = pytest.mark.parametrize("name", EXPANSIONS)

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


@every_format
def test_a_format_describes_its_planes(name):
    fmt = format_of(name)
    planes = split(fmt, torch.ones(3, 5))
    assert tuple(p.dtype for p in planes) == fmt.dtypes
    assert [p.shape for p in planes] == [plane.shape((3, 5)) for plane in fmt.planes]
    assert len(fmt.suffixes) == len(fmt.dtypes)
    assert fmt.suffixes[0] == ""
    assert not fmt.elementwise or bytes_per_value(fmt) == sum(p.element_size() for p in planes)
    assert fmt.stochastic == name.endswith(":sr")


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown format 'bf15'; known formats: fp32, bf16, .*bf16x2:sr"):
        format_of("bf15")


def reencoded(name: str, planes: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Planes loaded and encoded as they are: to nearest, and with the smallest and largest random bits."""
    fmt = FORMATS[name]
    number = fmt.load(planes, arithmetic_of(name))
    for k in (None, 0, 0xFFFF) if fmt.stochastic else (None,):
        yield fmt.encode(number, None if k is None else torch.full(planes[0].shape, k, dtype=torch.int32))


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.elementwise and len(fmt.planes) < 3])
def test_loading_and_encoding_changes_nothing(name):
    """On planes that `split` left, and with any random bits: what is exact is not rounded."""
    planes = split(FORMATS[name], numbers())
    for again in reencoded(name, planes):
        for i, (got, want) in enumerate(zip(again, planes, strict=True)):
            assert_same_bits(f"{name} plane {i}", got, want)


@pytest.mark.parametrize("name", [name for name in EXPANSIONS if len(FORMATS[name].planes) == 3])
def test_loading_and_encoding_three_components_keeps_the_number(name):
    """And the components, but where the third is half an ulp of an odd second: there the second becomes even, once.

    The third was rounded to that. Where it need not be, as in what `split` makes of |x| >= 2**-110, nothing changes.
    A -0 of theirs, which only an underflow leaves, becomes +0.
    """
    fmt, x = FORMATS[name], numbers()
    g = torch.Generator().manual_seed(1)
    grown = split(fmt, torch.randn(20_000, generator=g))
    grown = fmt.encode(fmt.load(grown, FP32).grown(torch.randn(20_000, generator=g) * 1e-3), None)
    for kind, planes in (("split", split(fmt, x)), ("grown", grown)):
        tie = [
            None not in (second, third) and abs(third) == half_ulp(second, BF16) and code % 2
            for second, third, code in zip(*map(fractions, planes[1:]), codes(planes[1]).tolist(), strict=True)
        ]
        tie = torch.tensor(tie, dtype=torch.bool)
        assert tie.any()
        assert kind == "grown" or not tie[x.abs() >= 2.0**-110].any()
        for again in reencoded(name, planes):
            assert_same_bits("value", fmt.value(again) + 0.0, fmt.value(planes) + 0.0)
            assert_same_bits("c0", again[0], planes[0])
            for got, want in zip(again[1:], planes[1:], strict=True):
                assert_same_bits("not tied", got[~tie] + 0.0, want[~tie] + 0.0)
            assert (codes(again[1][tie]) % 2 == 0).all()
            for more in reencoded(name, again):
                for got, want in zip(more, again, strict=True):
                    assert_same_bits("once more", got + 0.0, want + 0.0)


@pytest.mark.parametrize("name", ["bf16x2", "bf16x2:sr"])
def test_loading_and_encoding_in_bfloat16_changes_nothing(name):
    planes = split(FORMATS[name], numbers())
    for got, want in zip(FORMATS[name].encode(FORMATS[name].load(planes, BF16)), planes, strict=True):
        assert_same_bits(name, got, want)


@of_floats
def test_split_is_the_nearest_and_the_rest(name):
    """hi = RN(x), and each further component RN of what is left, at most half an ulp of the one before; or x itself."""
    fmt, x = FORMATS[name], numbers()
    dtype, *others = fmt.dtypes
    planes = split(fmt, x)
    assert_same_bits(f"{name} hi", planes[0], mcf.rn(x, dtype))
    if FP32 in others:
        assert_same_bits("master", planes[1], x)
        return
    for number, *components in zip(fractions(x), *map(fractions, planes), strict=True):
        left = number
        for k, component in enumerate(components):
            if components[0] is None:
                assert k == 0 or component == 0
            else:
                assert component == round_to(left, dtype)
                assert k == 0 or abs(component) <= half_ulp(components[k - 1], dtype)
                left -= component


@pytest.mark.parametrize("name", [name for name in EXPANSIONS if name.endswith(":sr")])
def test_split_rounds_the_last_component_stochastically(name):
    fmt, x = FORMATS[name], numbers()
    dtype = fmt.dtypes[0]
    random = torch.randint(0, 1 << 16, x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    *first, last = split(fmt, x, random)
    for got, want in zip(first, split(fmt, x), strict=False):
        assert_same_bits(name, got, want)
    rows = zip(fractions(x), *map(fractions, first), fractions(last), random.tolist(), strict=True)
    for number, hi, *others, got, r in rows:
        assert got == (0 if hi is None else stochastic(number - hi - sum(others), r, dtype))


@of_floats
def test_value_is_the_number(name):
    """As close to x as the format can be, in its range; Inf and NaN where x is beyond it."""
    fmt, x = FORMATS[name], numbers()
    value = fmt.value(split(fmt, x))
    assert value.dtype == FP32
    if FP32 in fmt.dtypes:
        return assert_same_bits(name, value, x)
    spec, n = SPECS[fmt.dtypes[0]], len(fmt.dtypes)
    for number, got in zip(fractions(x), fractions(value), strict=True):
        if number is not None and abs(number) <= decode(spec.max_code, spec) * Fraction(2) ** spec.unit:
            precision = n * spec.precision + n - 1
            assert abs(got - number) <= max(abs(number) / 2**precision, Fraction(2) ** (spec.unit - 1))
        elif number is None:
            assert got is None
    return None


@pytest.mark.parametrize("name", [*EXPANSIONS, "bf16+kahan"])
def test_the_others_are_plus_zero_where_hi_is_not_finite(name):
    fmt = FORMATS[name]
    beyond = [INF, -INF, NAN, 3.4e38, -3.4e38, *([65520.0, -1e5] if fmt.dtypes[0] == FP16 else [])]
    assert not any(codes(plane).any() for plane in split(fmt, torch.tensor(beyond))[1:])
    planes = [torch.tensor([v] * 3, dtype=dtype) for v, dtype in zip((1.0, 2.0**-12, 0.0), fmt.dtypes, strict=False)]
    number = fmt.load(planes, arithmetic_of(name))
    planes = fmt.encode(number.grown(torch.tensor([INF, -INF, NAN], dtype=arithmetic_of(name))))
    assert not any(codes(plane).any() for plane in planes[1:])
    assert [v if v == v else "nan" for v in planes[0].tolist()] == [INF, -INF, "nan"]


def test_a_float16_weight_that_grows_beyond_its_largest_number_is_infinite():
    fmt = FORMATS["fp16x2"]
    planes = split(fmt, torch.tensor([65500.0] * 4))
    for delta, want in ((4.0, 65504.0), (19.99, 65504.0), (20.0, INF), (1e30, INF)):
        hi, lo = fmt.encode(fmt.load(planes, FP32).grown(torch.tensor(delta)))
        assert hi.tolist() == [want] * 4
        assert lo.tolist() == [0.0 if want == INF else torch.tensor(65500 + delta - want).half().item()] * 4


@every_format
def test_components_are_what_edq_differences(name):
    """Their sum is the number. With a master that is the master alone."""
    fmt = FORMATS[name]
    planes = split(fmt, torch.randn(10, 100, generator=torch.Generator().manual_seed(0)).abs())
    total = sum(c.double() for c in fmt.components(planes))
    assert_same_bits("sum", total.float(), fmt.value(planes))


# Growing, step by step in exact arithmetic


def states(seed: int, name: str = "bf16x2", size: int = 3000) -> tuple[Tensor, ...]:
    """Planes and an increment in float32: ordinary, tiny, cancelling, dominating; zeros, subnormals; no overflow."""
    g, fmt = torch.Generator().manual_seed(seed), FORMATS[name]
    if fmt.dtypes[0] == FP16:
        exponents = torch.exp2(torch.randint(-30, 15, (size,), generator=g).float())
        x = torch.cat([random_patterns(FP16, size, seed).float(), torch.randn(size, generator=g) * exponents])
    else:
        x = random_patterns(FP32, size, seed)
    x = torch.cat([x, torch.randn(size, generator=g)])
    x = torch.where(x.abs() < (2.0**12 if fmt.dtypes[0] == FP16 else 2.0**120), x, torch.zeros_like(x))
    planes = split(fmt, x)
    ratio = torch.exp2(torch.randint(-26, 4, x.shape, generator=g).float()) * torch.randn(x.shape, generator=g)
    delta = x * ratio
    kind = torch.randint(0, 16, x.shape, generator=g)
    delta = torch.where(kind == 0, -x, torch.where(kind == 1, 0.0, torch.where(kind == 2, 1e-40, delta)))
    return (*planes, torch.where(kind == 3, -planes[0].float() * (1 + 2.0**-8), delta))


def emulate(step: Callable, *tensors: Tensor) -> list[tuple[Fraction, ...]]:
    return [step(*row) for row in zip(*map(fractions, tensors), strict=True)]


def assert_numbers(got: tuple[Tensor, ...], want: list[tuple[Fraction, ...]]) -> None:
    for k, row in enumerate(zip(*map(fractions, got), strict=True)):
        assert row == want[k], (k, row, want[k])


def peeled(hi: Fraction, rest: Fraction, fmt: Format, random: int | None) -> tuple[Fraction, ...]:
    """What `encode` stores of a hi in the format and the rest, a float32."""
    dtype, parts = fmt.dtypes[0], [hi]
    for _ in fmt.dtypes[2:]:
        parts.append(round_to(rest, dtype))
        rest = round_to(rest - parts[-1], FP32)
    return (*parts, round_to(rest, dtype) if random is None else stochastic(rest, random, dtype))


def with_random(fmt: Format, size: int) -> tuple[Tensor | None, list[int | None]]:
    random = random_bits(fmt, size, torch.Generator().manual_seed(9))
    return random, [None] * size if random is None else random.tolist()


@every_expansion
def test_an_expansion_grows_its_last_component_first(name):
    """r = c2 + d; r = c1 + r; x = c0 + r; h = RN(x); the rest is (c0 - h) + r: each operation rounded to float32."""
    fmt, (*planes, delta) = FORMATS[name], states(0, name)

    def step(*numbers: Fraction, random: int | None) -> tuple[Fraction, ...]:
        hi, *others, r = numbers
        for c in reversed(others):
            r = round_to(c + r, FP32)
        h = round_to(round_to(hi + r, FP32), fmt.dtypes[0])
        return peeled(h, round_to(round_to(hi - h, FP32) + r, FP32), fmt, random)

    number = fmt.load(planes, FP32)
    assert isinstance(number, Expanded)
    random, each = with_random(fmt, len(delta))
    rows = zip(*map(fractions, (*planes, delta)), each, strict=True)
    assert_numbers(fmt.encode(number.grown(delta), random), [step(*row, random=r) for *row, r in rows])


@every_expansion
def test_an_expansion_scales_into_a_register_and_grows_there(name):
    fmt, (*planes, delta) = FORMATS[name], states(1, name)
    beta = torch.tensor(0.999)

    def step(*numbers: Fraction, random: int | None) -> tuple[Fraction, ...]:
        *components, delta = numbers
        register = components[-1]
        for c in reversed(components[:-1]):
            register = round_to(register + c, FP32)
        register = round_to(round_to(register * Fraction(beta.item()), FP32) + delta, FP32)
        h = round_to(register, fmt.dtypes[0])
        return peeled(h, register - h, fmt, random)

    number = fmt.load(planes, FP32).scaled((beta,))
    assert isinstance(number, Register)
    random, each = with_random(fmt, len(delta))
    rows = zip(*map(fractions, (*planes, delta)), each, strict=True)
    assert_numbers(fmt.encode(number.grown(delta), random), [step(*row, random=r) for *row, r in rows])


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
    assert_same_bits("scaled", scaled.value, theta * 0.5)
    assert scaled.compensation is c


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "bf16+fp32", "fp16+fp32"])
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
        planes = split(fmt, torch.ones(3, 4))
        before = [p.clone() for p in planes]
        number = fmt.load(planes, arithmetic_of(name))
        number.scaled((torch.tensor(0.5, dtype=arithmetic_of(name)),)).grown(delta.to(arithmetic_of(name)))
        fmt.encode(number.grown(delta.to(arithmetic_of(name))))
        for a, b in zip(planes, before, strict=True):
            assert_same_bits(name, a, b)


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
    ("fp16x2", FP32, (1.0014, 1.0014, 0.9676, 0.9829), 5e-5),
    ("fp16+fp32", FP32, (1.0014, 1.0014, 0.9537, 1.0133), 5e-5),
    ("bf16x3", FP32, (1, 1, 1, 1), 1e-3),
    ("bf16+int16", FP32, (1.0014, 1.0014, 0.9537, 1.0133), 5e-5),  # a float32
    ("bf16+int8", FP32, (0, 1.5259, 0, 0), 5e-5),  # an ulp of 2**-16 below 1, of twice that above
    ("fp16+int8", FP32, (1.1444, 0.9537, 0, 1.9073), 5e-5),  # 2**-19; float32 rounds 1e-6 up to 17 / 32 of that
    ("e4m3+int16", FP32, (0.9537, 0.9537, 0, 0.9537), 5e-5),  # 2**-20; float32 rounds 1 + 1e-6 to a tie
    ("e4m3+int8", FP32, (0, 0, 0, 0), 0),
    ("bf16", BF16, (0, 0, 0, 0), 0),
    ("bf16x2", BF16, (0.1953, 0.8842, 0.2441, 0.2441), 5e-5),
    ("bf16+kahan", BF16, (0.1953, 0.8842, 0.2441, 0.2441), 5e-5),
    ("bf16x2:sr", FP32, (1, 1, 1, 1), 0.01),
    ("bf16x3:sr", FP32, (1, 1, 1, 1), 1e-3),
    ("fp16x2:sr", FP32, (1, 1, 1, 1), 1e-3),
    ("fp16:sr", FP32, (1, 1, 1, 1), 0.1),
    ("bf16:sr", FP32, (1, 1, 1, 1), 0.2),  # the mean of 2,048 elements, each +-0.6 at 1e-5 and +-1.6 at 1e-6
    # A float32's shares. Each is +-.12, .04, .02 and .5 off at 1e-6, the mean of 2,048 a 45th of that; 4 of these
    ("bf16+int8:sr", FP32, (1.0014, 1.0014, 0.9537, 1.0133), 0.011),
    ("fp16+int8:sr", FP32, (1.0014, 1.0014, 0.9537, 1.0133), 0.0035),
    ("e4m3+int16:sr", FP32, (1.0014, 1.0014, 0.9537, 1.0133), 0.002),
    ("e4m3+int8:sr", FP32, (1.0014, 1.0014, 0.9537, 1.0133), 0.045),
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
    """float32. No |increment| above 2**126: from 3.38e38 on hi - h itself may overflow. In float16: above 2**14."""
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
    return torch.where(delta.abs() <= most(hi.dtype), delta, 0.0)


def most(dtype: torch.dtype) -> float:
    return 2.0**14 if dtype == FP16 else 2.0**126


REGIMES = ("any ratio", "sixteenths of an ulp", "reversal", "patterns")
HOW_MANY = [pytest.param((10_000, 15), id="150k"), pytest.param((200_000, 50), id="10M", marks=pytest.mark.slow)]


def walk(name: str, arithmetic: torch.dtype, regime: str, size: int, steps: int):
    """Planes after each of many random steps, every third of them scaled first. What is not finite starts again."""
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    x = random_patterns(FP16 if fmt.dtypes[0] == FP16 else BF16, size, seed=1).float()
    start = split(fmt, torch.where(x.abs() < most(fmt.dtypes[0]), x, 0.0))
    planes = start
    beta = tuple(torch.tensor(b, dtype=arithmetic) for b in ((0.999,) if arithmetic == FP32 else (1.0, -0.001)))
    for step in range(steps):
        number = fmt.load(planes, arithmetic)
        number = number.scaled(beta) if step % 3 == 1 else number
        planes = fmt.encode(
            number.grown(mcf.rn(increments(regime, planes[0], g), arithmetic)), random_bits(fmt, size, g)
        )
        yield planes
        kept = planes[0].abs().float() < most(fmt.dtypes[0])
        planes = tuple(torch.where(kept, new, old) for new, old in zip(planes, start, strict=True))


WALKS = [
    pytest.param(name, arithmetic, regime, id=f"{name} in {str(arithmetic).removeprefix('torch.')}, {regime}")
    for name, arithmetic in [*((n, arithmetic_of(n)) for n, f in FORMATS.items() if f.elementwise), ("bf16x2", BF16)]
    for regime in REGIMES
]


@pytest.mark.parametrize(("name", "arithmetic", "regime"), WALKS)
@pytest.mark.parametrize("many", HOW_MANY)
def test_broken_never_fires_on_what_encode_leaves(name, arithmetic, regime, many):
    for step, planes in enumerate(walk(name, arithmetic, regime, *many)):
        broken = FORMATS[name].broken(planes)
        wrong = [p[broken][:3].tolist() for p in planes]
        assert not bool(broken.any()), (step, int(broken.sum()), wrong)


LARGEST = {
    "bf16x2": [0.5],
    "bf16x3": [0.5, 0.5],
    "fp16x2": [0.5],
    "bf16x2:sr": [0.5 + 2.0**-8],
    "bf16x3:sr": [0.5, 0.5 + 2.0**-8],
    "fp16x2:sr": [0.5 + 2.0**-11],
    "bf16+kahan": [1.0],
}
ARITHMETIC = [*((name, arithmetic_of(name)) for name in LARGEST), ("bf16x2", BF16)]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    ("name", "arithmetic"), ARITHMETIC, ids=lambda x: x if isinstance(x, str) else str(x).removeprefix("torch.")
)
def test_how_large_the_other_components_get(name, arithmetic, regime):
    """In ulps of the one before. Where |d| > |theta|, Kahan's theta - s rounds too: his compensation reaches an ulp."""
    spec = SPECS[FORMATS[name].dtypes[0]]
    for planes in walk(name, arithmetic, regime, 10_000, 15):
        for ulps, before, own in zip(LARGEST[name], planes[:-1], planes[1:], strict=True):
            exponent = torch.frexp(before.double())[1].clamp(min=spec.emin + 1) - 1
            ulp = torch.exp2(exponent.double() - spec.precision + 1)
            slack = 2.0**spec.unit if ulps not in (0.5, 1.0) else 0.0  # stochastic: one step, where it is subnormal
            assert bool((own.double().abs() <= ulps * ulp + slack)[planes[0].isfinite()].all())


def test_kahans_compensation_does_reach_an_ulp():
    """0.5 + 129: the sum rounds to 130, theta - s to -130, and c is -1 instead of -0.5."""
    theta, delta = torch.tensor([0.5]).bfloat16(), torch.tensor([129.0]).bfloat16()
    s, c = FORMATS["bf16+kahan"].encode(Kahan(theta, torch.zeros_like(theta)).grown(delta))
    assert (s.item(), c.item()) == (130.0, -1.0)
    assert not FORMATS["bf16+kahan"].broken((s, c)).any()


@pytest.mark.parametrize(
    "name", [n for n, f in FORMATS.items() if len(f.planes) > 1 and f.dtypes[0].is_floating_point and f.shows_edits]
)
def test_broken_notices_other_weights(name):
    """One element may look right by chance; a tensor can't."""
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    planes = split(fmt, torch.randn(100, 100, generator=g))
    other = split(fmt, torch.randn(100, 100, generator=g))[0]
    share = fmt.broken((other, *planes[1:])).float().mean().item()
    assert share > (0.98 if FP32 in fmt.dtypes else 0.1)
    hi = planes[0].float()
    for changed in (hi * 0.1, torch.zeros_like(hi), hi.clamp(-0.01, 0.01), hi * INF):
        assert fmt.broken((changed.to(fmt.dtypes[0]), *planes[1:])).any()
    assert not fmt.broken(planes).any()


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if len(fmt.planes) == 1])
def test_one_plane_cannot_be_broken(name):
    planes = (random_patterns(FORMATS[name].dtypes[0], 1000, seed=0),)
    assert not FORMATS[name].broken(planes).any()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_bound_of_a_component_is_tight(dtype, k):
    """Half an ulp and one step more pass; the next number does not. At every binade, subnormals included.

    k: which component, of as many and one. A third is looked at beside a second that suits the first.
    """
    nearest_, stochastic_ = Expansion(dtype, k + 1), Expansion(dtype, k + 1, stochastic=True)
    before = every(dtype)
    before = before[
        before.isfinite() & (before.abs().float() < 2.0 ** (5 if dtype == FP16 else 100) if k == 2 else True)
    ]
    half = torch.tensor([float(half_ulp(x, dtype)) for x in fractions(before)])
    allowed = from_codes(codes(mcf.rn(half, dtype)) + 1, dtype)  # of a subnormal half an ulp is no number: one step
    beyond = from_codes(codes(allowed) + 1, dtype)
    first = [mcf.rn(before.float() * 2.0**10 + 2.0**6 * (before == 0), dtype)] if k == 2 else []  # one that it suits
    if k == 2:
        suits = ~Expansion(dtype).broken((first[0], before)) & (first[0] != 0)
        first, before, allowed, beyond = [first[0][suits]], before[suits], allowed[suits], beyond[suits]
    planes = [*first, before]
    assert_same_bits("", nearest_.broken([*planes, allowed]), before == 0)  # to nearest, it rounds to 0 where that does
    assert not nearest_.broken([*planes, torch.where(before == 0, 0.0, allowed.float()).to(dtype)]).any()
    assert not stochastic_.broken([*planes, allowed]).any()
    for fmt in (nearest_, stochastic_):
        assert fmt.broken([*planes, beyond]).all()
        assert fmt.broken([*planes, -beyond]).all()


@pytest.mark.parametrize("scale", [1.0, 2.0**-120, 2.0**-122])
def test_a_tail_just_above_half_an_ulp_may_be_rounded_up(scale):
    """x = hi + r rounds to a tie, which goes back to hi and leaves the tail r, a little more than half an ulp."""
    fmt = FORMATS["bf16x2:sr"]
    hi = torch.tensor([scale]).bfloat16()
    delta = torch.tensor([scale * (2.0**-8 + 2.0**-26)])
    number = fmt.load((hi, torch.zeros_like(hi)), FP32).grown(delta)
    planes = fmt.encode(number, torch.tensor([0xFFFF], dtype=torch.int32))
    assert_same_bits("hi", planes[0], hi)
    assert planes[1].item() > scale * 2.0**-8
    assert not fmt.broken(planes).any()


@every_elementwise
def test_fitted_takes_what_does_not_fit_as_it_is_and_leaves_the_rest(name):
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    hi, *others = split(fmt, torch.randn(1000, generator=g))
    edited = torch.where(torch.arange(1000) % 3 == 0, hi * 2.0**-20, hi)
    planes, broken = fitted(fmt, (edited, *others))
    assert_same_bits("hi", planes[0], edited)
    assert not fmt.broken(planes).any()
    assert bool(broken.any()) == (len(fmt.planes) > 1) or not fmt.shows_edits
    assert not broken[edited == hi].any()
    for new, old, fresh in zip(planes[1:], others, split(fmt, edited.float())[1:], strict=True):
        assert_same_bits(name, new, torch.where(broken, fresh, old))
