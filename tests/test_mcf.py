"""The proofs of `collage.mcf`: every claim of its docstrings against exact arithmetic, and at the edge of its domain.

u = 2**-p. "Patterns" are uniform bit patterns: every exponent, zeros, subnormals, the largest numbers, Inf and NaN.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

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
    nearest_units,
    random_patterns,
    stochastic,
    units,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from collage import mcf

E5M2, E4M3, FP16, BF16, FP32 = torch.float8_e5m2, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32
INF, NAN = float("inf"), float("nan")
FLOAT8, NATIVE, NARROW = (E5M2, E4M3), (FP16, BF16), (E5M2, E4M3, FP16, BF16)


def of(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))


# Pairs: all of them for 8 bits; 50,000 otherwise, and a million in the slow suite.
SIZES = [
    *(pytest.param(d, 50_000, id=str(d).removeprefix("torch.")) for d in SPECS),
    *(
        pytest.param(d, 1_000_000, id=f"{str(d).removeprefix('torch.')}-million", marks=pytest.mark.slow)
        for d in (FP16, BF16, FP32)
    ),
]


def omega(dtype: torch.dtype) -> int:
    """The largest finite number, in units."""
    return decode(SPECS[dtype].max_code, SPECS[dtype])


def ulp(number: int, dtype: torch.dtype) -> int:
    """Of a number in units, in units."""
    return 1 << max(0, abs(number).bit_length() - SPECS[dtype].precision)


def lsb(number: int) -> int:
    """The weight of the last non-zero bit."""
    return abs(number) & -abs(number)


def from_units(number: int, dtype: torch.dtype) -> Tensor:
    """A tensor of one element; the number must be representable."""
    code = nearest_units(number, dtype)
    assert decode(code, SPECS[dtype]) == number
    return from_codes([code], dtype)


def negated(x: Tensor) -> Tensor:
    return from_codes(codes(x) ^ SPECS[x.dtype].sign, x.dtype)


def near(x: Tensor, low: int, high: int, g: torch.Generator) -> Tensor:
    """Numbers whose exponents are x's plus low..high; one in three is at a binade's end, and few are zero."""
    spec, shape = SPECS[x.dtype], x.shape
    m = spec.precision - 1
    exponent = ((codes(x) & (spec.sign - 1)) >> m) + torch.randint(low, high + 1, shape, generator=g)
    significand, kind = torch.randint(0, 1 << m, shape, generator=g), torch.randint(0, 24, shape, generator=g)
    significand = torch.where(kind < 4, 0, torch.where(kind < 8, (1 << m) - 1, significand))
    code = ((exponent.clamp(0, spec.max_code >> m) << m) | significand).clamp(max=spec.max_code)
    sign = torch.randint(0, 2, shape, generator=g) * spec.sign
    return from_codes(torch.where(kind == 8, 0, code) | sign, x.dtype)


def pairs(dtype: torch.dtype, size: int) -> tuple[Tensor, Tensor]:
    """All pairs of an 8-bit format; otherwise patterns, half of the b close enough to a to interact with it."""
    if SPECS[dtype].width == 8:
        v = every(dtype)
        return v.repeat_interleave(256), v.repeat(256)
    g, reach = torch.Generator().manual_seed(0), SPECS[dtype].precision + 2
    a, b = random_patterns(dtype, size, seed=1), random_patterns(dtype, size, seed=2)
    return a, torch.where(torch.rand(size, generator=g) < 0.5, b, near(a, -reach, reach, g))


def rows(a: Tensor, b: Tensor, s: Tensor, e: Tensor) -> Iterator[tuple[int, int, int, int | None]]:
    """Row by row in units, where a, b and s are finite."""
    return (row for row in zip(*map(units, (a, b, s, e)), strict=True) if None not in row[:3])


def none_of(wrong: Iterator[tuple]) -> None:
    found = list(wrong)
    assert not found, f"{len(found)} wrong, in units of the smallest subnormal: {found[:5]}"


# Rounding


def boundaries(dtype: torch.dtype) -> Tensor:
    """float32: every number of the format and of the binade above it, the midpoints, and the floats next to these."""
    spec = SPECS[dtype]
    unbounded = replace(spec, max_code=spec.sign - 1)
    last = min(spec.max_code + (1 << (spec.precision - 1)) + 2, spec.sign - 1)
    numbers = [decode(code, unbounded) for code in range(last)]
    halves = [2 * n for n in numbers] + [a + b for a, b in pairwise(numbers)]
    at = torch.tensor([nearest_units(h, FP32, spec.unit - 1) for h in halves])
    at = torch.cat([at, (at - 1).clamp(min=0), at + 1])
    return from_codes(torch.cat([at, at | 1 << 31]), FP32)


def assert_rn(x: Tensor, dtype: torch.dtype) -> None:
    """Against the oracle; Inf, NaN and the sign of zero are judged here."""
    spec, sign = SPECS[dtype], codes(x) >> 31
    nan, inf = spec.nan_code, spec.max_code + 1  # of e4m3fn both are NaN
    want = [
        (inf if abs(value) == float("inf") else nan) if number is None else nearest_units(number, dtype, -149)
        for number, value in zip(units(x), x.tolist(), strict=True)
    ]
    signed = torch.tensor(want) & (spec.sign - 1) | sign * spec.sign
    assert_same_bits("rn", mcf.rn(x, dtype), from_codes(signed, dtype))


@of(*NARROW)
def test_rn_at_every_boundary(dtype):
    assert_rn(boundaries(dtype), dtype)


@of(*NARROW)
def test_rn_on_patterns(dtype):
    x = random_patterns(FP32, 20_000, seed=0)
    assert_rn(torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])]), dtype)


@of(*NARROW)
def test_rn_keeps_what_the_format_holds_and_makes_nan_quiet(dtype):
    x = every(dtype)
    assert_same_bits("rn of itself", mcf.rn(x.float(), dtype), x)
    nans = from_codes([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], FP32)
    assert codes(mcf.rn(nans, dtype)).tolist() == [SPECS[dtype].nan_code] * 4


def test_rn_to_float32_is_the_identity():
    x = random_patterns(FP32, 1000, seed=0)
    assert mcf.rn(x, FP32) is x


@pytest.mark.slow
@of(*NARROW)
def test_rn_is_torchs_cast_on_all_of_float32(dtype):
    """All 2**32 patterns. What torch makes of the overflow of e4m3fn changes with its version; ours is the contract."""
    step, integer = 1 << 18, mcf.FLOATS[dtype].storage
    for start in range(-(1 << 31), 1 << 31, step):
        x = torch.arange(start, start + step, dtype=torch.int64).to(torch.int32).view(FP32)
        want = x.to(dtype)
        if dtype == E4M3 and (start & 0x7FFFFFFF) + step > 0x43E00000:  # 448
            want = torch.where(x.abs() > 448, torch.copysign(torch.tensor(448.0), x), want.float()).to(dtype)
            want = torch.where(x.isinf(), torch.nan, want.float()).to(dtype)
        got = mcf.rn(x, dtype)
        same = got.view(integer) == want.view(integer)
        if not bool(same.all()):  # NaN is left, or a mistake
            assert_same_bits(f"rn from 0x{start & 0xFFFFFFFF:08x}", got, want)


def test_sr_rounds_up_in_exactly_the_right_number_of_cases():
    """Of the 65,536 random values as many go up in magnitude as the part dropped says; the others go down."""
    g = torch.Generator().manual_seed(0)
    special = [0x1, 0xFFFF, 0x10000, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F80FFFF, 0x3F808000, 0x7F7EFFFF]
    x = from_codes(torch.cat([torch.tensor(special), torch.randint(0, 0x7F7F0000, (200,), generator=g)]), FP32)
    random = torch.arange(1 << 16, dtype=torch.int32)
    for value in torch.cat([x, -x]).tolist():
        v = torch.tensor(value)
        code, low = codes(v).item() >> 16, codes(v).item() & 0xFFFF
        got = codes(mcf.sr(v.expand(1 << 16).contiguous(), random))
        assert ((got == code).sum().item(), (got == code + 1).sum().item()) == ((1 << 16) - low, low), value


def test_sr_leaves_exact_values_zeros_infinities_and_the_maximum():
    x = every(BF16).float()
    for random in (0, 1, 0x8000, 0xFFFF):
        bits = torch.full(x.shape, random, dtype=torch.int32)
        assert_same_bits("exact", mcf.sr(x, bits), mcf.rn(x, BF16))
        beyond = from_codes(torch.arange(0x7F7F0000, 0x7F800000, 97), FP32)
        top = torch.full(beyond.shape, torch.finfo(BF16).max, dtype=BF16)
        bits = torch.full(beyond.shape, random, dtype=torch.int32)
        assert_same_bits("beyond the maximum", mcf.sr(beyond, bits), top)
        assert_same_bits("beyond minus the maximum", mcf.sr(-beyond, bits), -top)
        nans = from_codes([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], FP32)
        assert codes(mcf.sr(nans, bits[:4])).tolist() == [0x7FC0] * 4


SUBNORMAL = 2.0**-14  # of float16, below it
HALVES = [  # float32, of every kind that float16 rounds
    *(1.0, 1.5, 1 + 2.0**-10, 1 + 2.0**-11, 1 + 2.0**-23, 2 - 2.0**-23, 65503.996, 65504.0, 2047.5),  # 13 bits dropped
    *(SUBNORMAL, SUBNORMAL * (1 - 2.0**-24), SUBNORMAL * 0.99, 2.0**-17 * 1.37, 2.0**-18, 2.0**-19 * 1.9999),
    *(2.0**-24, 2.0**-24 * 1.0001, 2.0**-25, 2.0**-25 * 1.3, 2.0**-30 * 1.7, 2.0**-31 * 1.7),  # below the smallest
    *(2.0**-39 * 1.99, 2.0**-40, 2.0**-41 * 1.5, 2.0**-42, 1e-14, 2.0**-60, 1e-30, 2.0**-126, 1e-40, 1e-45),
]


def test_sr_to_float16_is_unbiased():
    """Over all random values: exactly where no more bits than they have are dropped, else within half of one of them.

    So the mean of a number far below the smallest subnormal is off by 2**-17 of that at most, as of any other number.
    """
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(0x33000000, 0x477FE000, (120,), generator=g)  # 2**-25 to 65504
    tiny = torch.randint(0x2A000000, 0x33000000, (40,), generator=g)  # 2**-43 to 2**-25
    x = torch.cat([torch.tensor(HALVES), from_codes(torch.cat([drawn, tiny]), FP32)])
    random = torch.arange(1 << 16, dtype=torch.int32)
    for exact, value in zip(fractions(x), x, strict=True):
        for signed in (value, -value):
            got, counts = torch.unique(mcf.sr(signed.repeat(1 << 16), random, FP16), return_counts=True)
            mean = sum(number * n for number, n in zip(fractions(got), counts.tolist(), strict=True)) / (1 << 16)
            ulp_ = Fraction(2) ** max(math.frexp(value)[1] - 11, -24)
            bound = 0 if value >= 2.0**-17 else ulp_ / 2**17
            assert abs(abs(mean) - exact) <= bound, signed.item()
            below = exact // ulp_ * ulp_
            assert {abs(number) for number in fractions(got)} <= {below, below + ulp_}, signed.item()


def test_sr_to_float16_leaves_exact_values_zeros_infinities_and_the_maximum():
    x, top = every(FP16).float(), 65504.0
    beyond = torch.cat([torch.tensor([65504.004, 65519.996, 65520.0, 65536.0, 3.4e38]), torch.arange(65505.0, 1e5, 7)])
    nans = from_codes([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], FP32)
    for random in (0, 1, 0x8000, 0xFFFF):
        bits = torch.full((1 << 16,), random, dtype=torch.int32)
        assert_same_bits("exact", mcf.sr(x, bits, FP16), mcf.rn(x, FP16))
        for sign in (1, -1):
            got = mcf.sr(sign * beyond, bits[: len(beyond)], FP16)
            assert_same_bits("beyond the maximum", got, torch.full_like(beyond, sign * top).half())
        assert codes(mcf.sr(nans, bits[:4], FP16)).tolist() == [0x7E00] * 4


@of(BF16, FP16)
def test_sr_is_the_oracles(dtype):
    """Random numbers and random bits; zeros keep their sign."""
    g = torch.Generator().manual_seed(1)
    shift = 2.0 ** torch.randint(-45, 15, (20_000,), generator=g)
    x = torch.cat([random_patterns(FP32, 10_000, seed=2), torch.randn(20_000, generator=g) * shift])
    x = x[x.isfinite()]
    random = torch.randint(0, 1 << 16, x.shape, generator=g, dtype=torch.int32)
    want = [stochastic(number, r, dtype) for number, r in zip(fractions(x), random.tolist(), strict=True)]
    got = mcf.sr(x, random, dtype)
    assert fractions(got) == want
    assert torch.equal(got.signbit(), x.signbit())


@of(FP32, BF16)
def test_sign(dtype):
    """Of every kind of number; zeros keep their sign, and NaN stays one."""
    x = torch.cat([random_patterns(FP32, 1000, seed=0), torch.tensor([0.0, -0.0, 1e-45, -1e-45, -INF, INF, NAN])])
    x = mcf.rn(x, dtype)
    want = [value if value != value or value == 0 else 1.0 if value > 0 else -1.0 for value in x.tolist()]
    assert_same_bits("sign", mcf.sign(x), torch.tensor(want, dtype=dtype))


# Canaries: torch computes these in float32 and rounds once, which is the correct rounding (24 >= 2p + 2)

OPERATIONS = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}


@of(*NATIVE)
@pytest.mark.parametrize("name", OPERATIONS)
def test_native_operations_round_once(dtype, name):
    a, b = pairs(dtype, 1 << 19)
    f = OPERATIONS[name]
    assert_same_bits(name, f(a, b), mcf.rn(f(a.float(), b.float()), dtype))


@of(*NATIVE)
def test_native_operations_are_correctly_rounded(dtype):
    """Against exact rationals. The sign of a zero result is left to IEEE's rules."""
    a, b = pairs(dtype, 10_000)
    exact = [(x, y) for x, y in zip(fractions(a), fractions(b), strict=True)]
    for name, f in OPERATIONS.items():
        got = codes(f(a, b)).tolist()
        for (x, y), code in zip(exact, got, strict=True):
            if x is None or y is None or (name == "div" and y == 0):
                continue
            z = x / y if name == "div" else x * y if name == "mul" else x + y if name == "add" else x - y
            want = nearest(z, dtype)
            assert code == want or (z == 0 and code & 0x7FFF == 0), (name, x, y, hex(code), hex(want))


def roots(dtype: torch.dtype) -> Tensor:
    """All positive numbers of a 16-bit format; of float32 all significands in two binades, and patterns."""
    if dtype != FP32:
        return every(dtype)[1 : SPECS[dtype].max_code + 1]
    x = random_patterns(FP32, 100_000, seed=0).abs()
    return torch.cat([from_codes(torch.arange(0x3F800000, 0x40800000), FP32), x[x.isfinite() & (x > 0)]])


@of(BF16, FP16, FP32)
def test_sqrt_is_correctly_rounded(dtype):
    """x lies between the squares of the midpoints around its root; in float64 both are exact, at most 50 bits."""
    x = roots(dtype)
    root = mcf.sqrt(x)
    below, above = ((root.double() + from_codes(codes(root) + k, dtype).double()) / 2 for k in (-1, 1))
    assert bool((below * below < x.double()).all())
    assert bool((x.double() < above * above).all())


@of(BF16, FP16, FP32)
def test_sqrt_of_special_values(dtype):
    x = torch.tensor([0.0, -0.0, float("inf"), -1.0, float("nan")], dtype=dtype)
    want = torch.tensor([0.0, -0.0, float("inf"), float("nan"), float("nan")], dtype=dtype)
    assert_same_bits("sqrt", mcf.sqrt(x), want)


# Error-free transforms


@pytest.mark.parametrize(("dtype", "size"), SIZES)
def test_two_sum_is_exact(dtype, size):
    a, b = pairs(dtype, size)
    s, e = mcf.two_sum(a, b)
    top = omega(dtype)
    none_of(
        (x, y, t, r)
        for x, y, t, r in rows(a, b, s, e)
        if (abs(y) < top or dtype == E4M3)
        and (r is None or t + r != x + y or t != decode(nearest_units(x + y, dtype), SPECS[dtype]))
    )


@pytest.mark.parametrize(("dtype", "size"), SIZES)
def test_fast_two_sum_is_exact(dtype, size):
    """Where |a| >= |b|, where a is 0, and where a is a multiple of ulp(b)."""
    a, b = pairs(dtype, size)
    s, e = mcf.fast_two_sum(a, b)
    none_of(
        (x, y, t, r)
        for x, y, t, r in rows(a, b, s, e)
        if (abs(x) >= abs(y) or x % ulp(y, dtype) == 0) and (r is None or t + r != x + y)
    )


@pytest.mark.parametrize(("dtype", "size"), SIZES)
def test_two_prod_is_exact_if_and_only_if_its_error_can_be_represented(dtype, size):
    """lsb(a) lsb(b) >= the smallest subnormal. Below, e is RN of the error."""
    a, b = pairs(dtype, size)
    p, e = mcf.two_prod(a, b)
    spec, scale, top = SPECS[dtype], -SPECS[dtype].unit, omega(dtype)

    def right(x: int, y: int, t: int, r: int | None) -> bool:
        saturated = dtype == E4M3 and abs(t) == top and t << scale != x * y
        if saturated:  # or rounded down to Omega, where e is the error as well; both are outside the claim
            return True
        if r is None or t != decode(nearest_units(x * y, dtype, 2 * spec.unit), spec):
            return False
        if x * y == 0 or lsb(x) * lsb(y) >= 1 << scale:
            return (t + r) << scale == x * y
        error = x * y - (t << scale)
        return error != 0 and r == decode(nearest_units(error, dtype, 2 * spec.unit), spec)

    none_of(row for row in rows(a, b, p, e) if not right(*row))


@of(E5M2, FP16, BF16, FP32)
def test_two_sum_at_the_edge_of_its_domain(dtype):
    """b = Omega, a = -1.5 ulp(Omega): s is finite and right, s - a overflows. In the other order all is well."""
    top = omega(dtype)
    a, b = from_units(-3 * ulp(top, dtype) // 2, dtype), from_units(top, dtype)
    ((x, y, s, e),) = rows(a, b, *mcf.two_sum(a, b))
    assert s == decode(nearest_units(x + y, dtype), SPECS[dtype])
    assert e is None
    ((x, y, s, e),) = rows(b, a, *mcf.two_sum(b, a))
    assert s + e == x + y


def test_two_sum_fails_for_two_pairs_of_e5m2_alone():
    a, b = pairs(E5M2, 0)
    s, e = mcf.two_sum(a, b)
    wrong = [(x, y) for x, y, t, r in rows(a, b, s, e) if r is None or t + r != x + y]
    assert [(x / 2**16, y / 2**16) for x, y in wrong] == [(12288, -57344), (-12288, 57344)]


@of(*SPECS)
def test_fast_two_sum_just_outside_its_domain(dtype):
    """|a| < |b|, and a's last bit is half an ulp of b."""
    one = 1 << (SPECS[dtype].precision + 1)
    b = from_units((2 * one - 1) // ulp(one, dtype) * ulp(one, dtype), dtype)  # an odd multiple of its ulp
    wrong = 0
    for k in range(1, one):
        if k % ulp(one, dtype) and decode(nearest_units(k, dtype), SPECS[dtype]) == k:
            a = from_units(k, dtype)
            ((x, y, s, e),) = rows(a, b, *mcf.fast_two_sum(a, b))
            wrong += s + e != x + y
        if wrong or k > 1000:
            break
    assert wrong


@of(*SPECS)
def test_two_prod_at_the_edge_of_its_domain(dtype):
    """Two odd significands whose product needs more than p bits, the product of their last bits at the edge."""
    spec = SPECS[dtype]
    odd, low = (1 << spec.precision) - 1, -(spec.unit // 2)  # 2**low units is about sqrt(the smallest subnormal)
    high = -spec.unit - low
    a, b, below = (from_units(odd << k, dtype) for k in (low, high, high - 1))
    ((x, y, p, e),) = rows(a, b, *mcf.two_prod(a, b))
    assert lsb(x) * lsb(y) == 1 << -spec.unit
    assert (p + e) << -spec.unit == x * y
    ((x, y, p, e),) = rows(a, below, *mcf.two_prod(a, below))
    assert (p + e) << -spec.unit != x * y


def test_a_saturated_sum_of_e4m3_stays_exact_and_a_product_does_not():
    big = torch.tensor([448.0]).to(E4M3)
    assert [t.item() for t in mcf.two_sum(big, big)] == [448.0, 448.0]
    assert [t.item() for t in mcf.two_prod(big, big)] == [448.0, 448.0]


def test_two_dtypes_are_refused():
    one = torch.ones(1)
    with pytest.raises(TypeError, match=r"two_sum: got torch.float32 and torch.bfloat16; both must have one dtype"):
        mcf.two_sum(one, one.bfloat16())
    with pytest.raises(TypeError, match=r"float64"):
        mcf.fast_two_sum(one.double(), one.double())


# Expansions


def expansion(x0: Tensor, n: int, g: torch.Generator) -> mcf.Expansion:
    """n components that start near x0."""
    p = SPECS[x0.dtype].precision
    terms = [x0]
    for _ in range(n - 1):
        terms.append(near(terms[-1], -p - 2, 1 - p, g))
    return mcf.renormalize(tuple(terms))


def overlaps(x: tuple[int, ...], dtype: torch.dtype) -> bool:
    return any(2 * abs(low) > ulp(high, dtype) for high, low in pairwise(x))


def operands(dtype: torch.dtype, n: int, size: int) -> Iterator[tuple[mcf.Expansion, mcf.Expansion]]:
    """Pairs of expansions: moderate and any magnitude; close, apart, and cancelling in one or in all components."""
    spec, g = SPECS[dtype], torch.Generator().manual_seed(n)
    p = spec.precision
    middle = torch.randint(-3, 4, (size,), generator=g) + (spec.max_code >> (p - 1)) // 2
    moderate = from_codes(middle << (p - 1) | torch.randint(0, 1 << (p - 1), (size,), generator=g), dtype)
    for x0 in (moderate, random_patterns(dtype, size, seed=3)):
        x = expansion(x0, n, g)
        for low, high in ((-1, 1), (-p - 2, p + 2), (-3 * p, 3 * p)):
            yield x, expansion(near(x[0], low, high, g), n, g)
        yield x, expansion(near(moderate, -4, 4, g), n, g)
        minus = tuple(negated(c) for c in x)
        yield x, mcf.renormalize((*minus[:-1], near(minus[-1], -2, 2, g)))
        step = torch.randint(-2, 3, (size,), generator=g)
        neighbour = from_codes((codes(minus[0]) + step) % (1 << spec.width), dtype)
        yield x, mcf.renormalize((neighbour, *(near(c, -1, 1, g) for c in minus[1:])))


# name: (function of x and y, the exact value, relative error in u**n, absolute error in smallest subnormals)
Bound = tuple[Callable, Callable, Callable[[int], int], Callable[[int], float]]
BOUNDS: dict[str, Bound] = {
    "grow": (lambda x, y: mcf.grow(x, y[0]), lambda x, y: sum(x) + y[0], lambda n: 2, lambda n: 0),
    "add": (mcf.add, lambda x, y: sum(x) + sum(y), lambda n: 2, lambda n: 0),
    "scale": (lambda x, y: mcf.scale(x, y[0]), lambda x, y: sum(x) * y[0], lambda n: 3, lambda n: n / 2),
    "mul": (mcf.mul, lambda x, y: sum(x) * sum(y), lambda n: {2: 5, 3: 8}[n], lambda n: n * (n + 1) / 4),
}


def worst_violation(name: str, x: mcf.Expansion, y: mcf.Expansion) -> None:
    """Raise where the result overlaps or its error exceeds the bound, all in exact integers."""
    function, exact, relative, absolute = BOUNDS[name]
    dtype, n = x[0].dtype, len(x)
    spec, top = SPECS[dtype], omega(dtype)
    scale = -spec.unit if name in ("scale", "mul") else 0  # products are counted in squared units
    numbers = [zip(*map(units, t), strict=True) for t in (x, y, function(x, y))]
    checked = 0
    for a, b, c in zip(*numbers, strict=True):
        if None in a or None in b or max(map(abs, a)) > top // 4 or max(map(abs, b)) > top // 4:
            continue
        want = exact(a, b)
        if abs(want) >> scale > top // 2:
            continue
        assert not overlaps(a, dtype), (a, dtype)
        assert not overlaps(b, dtype), (b, dtype)
        assert None not in c, (name, a, b, c)
        assert not overlaps(c, dtype), (name, a, b, c)
        # |error| <= relative u**n |want| + absolute units, everything times 4 * 2**(n p)
        error = abs((sum(c) << scale) - want) << (n * spec.precision + 2)
        bound = 4 * relative(n) * abs(want) + (int(4 * absolute(n)) << (scale + n * spec.precision))
        assert error <= bound, (name, a, b, c)
        checked += 1
    assert checked > len(x[0]) / 4


EXPANSIONS = [
    pytest.param(1_000, id="sample"),
    pytest.param(20_000, id="many", marks=pytest.mark.slow),
]


@of(*SPECS)
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("size", EXPANSIONS)
def test_expansion_arithmetic_keeps_its_error_bounds(dtype, n, size):
    for x, y in operands(dtype, n, size):
        for name in BOUNDS:
            worst_violation(name, x, y)


def test_bounds_are_not_vacuous():
    """A sum that ignores the low component breaks the bound of `grow`: the check itself works."""
    x = (torch.tensor([1.0]).bfloat16(), torch.tensor([2.0**-9]).bfloat16())
    honest = BOUNDS["grow"]
    BOUNDS["careless"] = (lambda x, y: (x[0] + y[0], torch.zeros_like(x[1])), *honest[1:])
    try:
        with pytest.raises(AssertionError, match="careless"):
            worst_violation("careless", x, (x[1], torch.zeros_like(x[1])))
    finally:
        del BOUNDS["careless"]


@of(*SPECS)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_renormalize_is_exact_and_leaves_no_overlap(dtype, k):
    """On terms of decreasing magnitude that overlap and have gaps, down to the subnormals."""
    g, p = torch.Generator().manual_seed(k), SPECS[dtype].precision
    terms = [random_patterns(dtype, 8_000, seed=k)]
    for _ in range(k - 1):
        terms.append(near(terms[-1], -p - 1, -1, g))
    result = mcf.renormalize(tuple(terms))
    for before, after in zip(zip(*map(units, terms), strict=True), zip(*map(units, result), strict=True), strict=True):
        if None in before or max(map(abs, before)) > omega(dtype) // 4:
            continue
        assert sum(before) == sum(after)
        assert not overlaps(after, dtype), (before, after)


def test_renormalize_cuts_less_than_half_an_ulp_of_the_last_kept():
    x = tuple(torch.tensor([v]).bfloat16() for v in (1.0, 2.0**-9, 2.0**-18, 2.0**-27))
    assert [t.item() for t in mcf.renormalize(x, 2)] == [1.0, 2.0**-9 + 0.0]
    assert len(mcf.renormalize(x)) == 4


@pytest.mark.slow
@of(*FLOAT8)
def test_renormalize_on_all_triples(dtype, monkeypatch):
    """256**3 triples in any order of magnitude, two_sum read from a table of all pairs."""
    v = every(dtype)
    table_s, table_e = map(codes, mcf.two_sum(v.repeat_interleave(256), v.repeat(256)))
    number = torch.tensor([0 if u is None else u for u in units(v)])
    usable = torch.tensor([u is not None and abs(u) <= omega(dtype) // 4 for u in units(v)])
    spacing = torch.tensor([ulp(u, dtype) for u in number.tolist()])
    monkeypatch.setattr(mcf, "two_sum", lambda a, b: (table_s[256 * a + b], table_e[256 * a + b]))
    b, c = usable.nonzero().repeat_interleave(int(usable.sum())), usable.nonzero().flatten().repeat(int(usable.sum()))
    for a in usable.nonzero().flatten().tolist():
        x, y, z = mcf.renormalize((torch.full_like(b, a), b, c))
        assert torch.equal(number[x] + number[y] + number[z], number[a] + number[b] + number[c])
        assert bool((2 * number[y].abs() <= spacing[x]).all())
        assert bool((2 * number[z].abs() <= spacing[y]).all())


class Count(TorchDispatchMode):
    """Counts floating-point + - *."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("add", "sub", "mul") and result.is_floating_point():
            self.operations[name] += 1
        return result


@pytest.mark.parametrize(
    ("want", "name", "components"),
    [
        (3, "fast_two_sum", 0), (6, "two_sum", 0), (3, "two_prod", 0), (13, "grow", 2), (49, "grow", 3),
        (56, "add", 2), (111, "add", 3), (11, "scale", 2), (13, "mul", 2), (6, "renormalize", 2),
        (36, "renormalize", 3),
    ],
)  # fmt: skip
def test_operation_counts(want, name, components):
    """As the docstrings give them."""
    c = tuple(torch.tensor([2.0 ** (-9 * i)]).bfloat16() for i in range(components or 1))
    arguments = {"add": (c, c), "mul": (c, c), "renormalize": (c,), "grow": (c, c[0]), "scale": (c, c[0])}
    with Count() as count:
        getattr(mcf, name)(*arguments.get(name, (c[0], c[0])))
    assert count.operations.total() == want


# Compilers

compiling = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's compiler still uses it


@pytest.mark.slow
@compiling
@of(BF16, FP16, FP32)
def test_compiled_transforms_give_eager_bits(dtype):
    """Inductor keeps bfloat16 intermediates in float32 unless every one is rounded with integer operations."""

    def everything(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        x, y = mcf.two_sum(a, c), mcf.two_sum(b, c)
        return (*x, *mcf.fast_two_sum(a, c), *mcf.two_prod(a, b), *mcf.grow(x, b), *mcf.mul(x, y))

    a, b = pairs(dtype, 4096)
    c = near(a, -9, -1, torch.Generator().manual_seed(0))
    compiled = torch.compile(everything, fullgraph=True)
    for i, (got, want) in enumerate(zip(compiled(a, b, c), everything(a, b, c), strict=True)):
        assert_same_bits(f"output {i}", got, want)


@pytest.mark.slow
@compiling
def test_compiled_rounding_gives_eager_bits():
    x = random_patterns(FP32, 1 << 16, seed=0)
    random = torch.randint(0, 1 << 16, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)

    def everything(x: Tensor, random: Tensor) -> tuple[Tensor, ...]:
        return (*(mcf.rn(x, dtype) for dtype in NATIVE), mcf.sr(x, random))

    compiled = torch.compile(everything, fullgraph=True)
    for i, (got, want) in enumerate(zip(compiled(x, random), everything(x, random), strict=True)):
        assert_same_bits(f"output {i}", got, want)


# The oracle


@of(*NARROW)
def test_the_oracle_decodes_as_torch_does(dtype):
    x = every(dtype)
    want = [v if abs(v) < float("inf") else None for v in x.double().tolist()]
    got = [None if n is None else n * 2.0 ** SPECS[dtype].unit for n in units(x)]
    assert got == want


@of(*SPECS)
def test_the_oracle_rounds_a_number_of_the_format_to_itself(dtype):
    x = random_patterns(dtype, 5_000, seed=0)
    for code, number in zip(codes(x).tolist(), units(x), strict=True):
        if number:
            assert nearest_units(number, dtype) == code == nearest(fractions(from_codes([code], dtype))[0], dtype)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ([1.0, 2.0, 3.0], None),
        ([1.0, 2.015625, 3.0], r"1 of 3 differ, the first at 1: got 0x4001 \(2.015625\), want 0x4000 \(2.0\), \+1 ulp"),
        ([1.0, -2.0, 3.03125], r"x: 2 of 3 differ, the first at 1: got 0xc000"),
        ([1.0, 2.0], r"x: got torch.bfloat16 \(2,\), want torch.bfloat16 \(3,\)"),
    ],
)  # fmt: skip
def test_assert_same_bits_raises_and_shows_bits(got, message):
    got, want = torch.tensor(got, dtype=BF16), torch.tensor([1.0, 2.0, 3.0], dtype=BF16)
    with nullcontext() if message is None else pytest.raises(AssertionError, match=message):
        assert_same_bits("x", got, want)


def test_assert_same_bits_tells_zeros_dtypes_and_nans_apart():
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert_same_bits("nan", nan, -nan)
    assert_same_bits("int", torch.tensor([3], dtype=torch.int8), torch.tensor([3], dtype=torch.int8))
    for got, want in ((zero, -zero), (nan, zero), (zero, nan), (zero, zero.double()), (zero.double(), -zero.double())):
        with pytest.raises(AssertionError):
            assert_same_bits("x", got, want)
