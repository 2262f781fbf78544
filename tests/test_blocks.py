"""Moments in 8 bits: a code per element and a scale for 128 elements of a row. int8/128 and uint8/128."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from helpers import assert_each, assert_same_bits, drawn, random_bits
from oracle import codes, fractions, from_codes, random_patterns, spread
from torch import Tensor
from words import FP32, TWO, form_of

from collage.accumulators import Register
from collage.formats import FORMATS, Companded, format_of, split

NAMES = [name for name, fmt in FORMATS.items() if isinstance(fmt, Companded)]
STOCHASTIC = [name for name in NAMES if FORMATS[name].stochastic]
WIDTHS = (1, 127, 128, 129, 300)
every_format = pytest.mark.parametrize("name", NAMES)
every_width = pytest.mark.parametrize("columns", WIDTHS)


def of_its_sign(name: str, x: Tensor) -> Tensor:
    """Second moments have none."""
    return x.abs() if name.startswith("uint8") else x


def numbers(name: str, columns: int, rows: int = 50) -> Tensor:
    """[rows, columns]: far below the maximum of a block, between two codes, at a change of scale; patterns; zeros."""
    x = spread(rows, columns, 1)
    patterns = random_patterns(FP32, 4 * columns, 2).view(4, columns)
    return of_its_sign(name, torch.cat([x, between(name, columns), at_a_scale(columns), patterns]))


def between(name: str, columns: int) -> Tensor:
    """The middle between two codes, and a float32 above and below, in rows whose scales are from least to most."""
    form, g = form_of(name), torch.Generator().manual_seed(3)
    middles = torch.tensor([float(form.value(k) + form.value(k + 1)) / 2 for k in range(form.top)])
    k = torch.randint(0, form.top, (12, columns), generator=g)
    near = torch.randint(-1, 2, k.shape, generator=g)
    x = from_codes((codes(middles)[k] + near).clamp(min=0), FP32)
    x[:, ::128] = 1.0  # for a scale of 2**0
    return torch.ldexp(x, torch.linspace(-127 + form.least, 127, 12).round()[:, None])


def at_a_scale(columns: int) -> Tensor:
    """Rows of a maximum where the scale changes and of what is beside it; of zeros, Inf, NaN, and the smallest."""
    tops = [(127 + e << 23) + t + j for e in (-127, -84, 0, 127) for t in (0x700000, 0x780000) for j in (-1, 0, 1)]
    rows = torch.zeros(len(tops) + 6, columns)
    rows[: len(tops)] = from_codes([max(code, 0) for code in tops], FP32)[:, None]
    rows[: len(tops), 1::2] *= -0.3
    rows[-1], rows[-2, ::2], rows[-3], rows[-4, 0] = torch.nan, -torch.inf, 2.0**-149, 2.0**-149
    rows[-5, ::3], rows[-5, 1::3] = torch.nan, -0.0
    return rows


@pytest.mark.parametrize(("columns", "rows"), [(1, 200), (127, 40), (128, 40), (129, 40), (300, 200)])
@every_format
def test_encoding_and_decoding_are_the_definition(name, columns, rows):
    """Also of what the sign of a second moment forbids: it becomes NaN."""
    fmt, form = FORMATS[name], form_of(name)
    x = numbers(name, columns, rows)
    x = torch.cat([x, -x[:20]])
    random = random_bits(x) if fmt.stochastic else None
    planes = split(fmt, x, random)
    assert [plane.shape for plane in planes] == [x.shape, (len(x), -(-columns // 128))]
    assert_each(name, planes, form.encode(x, random))
    assert_same_bits("value", fmt.value(planes), form.decode(planes))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_format_rounds_to_nearest_without_random_bits(name):
    x = numbers(name, 300)
    assert_each(name, split(FORMATS[name], x), split(FORMATS[name.removesuffix(":sr")], x))


@every_format
def test_a_number_is_one_register(name):
    """And nothing can be broken: no one reads the codes alone."""
    fmt = FORMATS[name]
    planes = split(fmt, of_its_sign(name, torch.randn(10, 300, generator=torch.Generator().manual_seed(0))))
    number = fmt.load(planes, FP32)
    assert isinstance(number, Register)
    assert_same_bits("value", number.value, fmt.value(planes))
    (component,) = fmt.components(planes)
    assert_same_bits("component", component, fmt.value(planes))
    assert not fmt.broken(planes).any()
    assert fmt.broken(planes).shape == (10, 300)


@every_format
def test_its_twin_has_16_bits_and_the_same_rounding(name):
    """For small parameters: second moments keep two components, as nearest rounding of one loses what is below half an
    ulp of it.
    """
    twin = FORMATS[name].twin
    assert twin == ("bf16" if name.startswith("int8") else "bf16x2") + (":sr" if name.endswith(":sr") else "")
    assert format_of(twin).elementwise


@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_code_is_a_fixed_point_under_every_random_bits(name):
    """All of them, under all 65,536, beside the largest."""
    fmt, form = FORMATS[name], form_of(name)
    k = torch.arange(-form.top if name.startswith("int8") else 0, form.top + 1)
    k = torch.nn.functional.pad(k, (0, -len(k) % 127)).view(-1, 127)
    k = torch.nn.functional.pad(k, (0, 1), value=form.top).to(fmt.dtypes[0])
    for first in range(0, 1 << 16, 1 << 12):
        random = torch.arange(first, first + (1 << 12), dtype=torch.int32).repeat_interleave(len(k))
        planes = [k.repeat(1 << 12, 1), torch.full((len(random), 1), 127, dtype=torch.uint8)]
        again = split(fmt, fmt.value(planes), random[:, None].expand(-1, 128))
        assert all(torch.equal(a, b) for a, b in zip(again, planes, strict=True))


@every_format
def test_encoding_again_changes_nothing(name):
    """But codes 3, or 5 to 7, of a block whose maximum was rounded down to a power of two: it has half the scale then,
    and they would need a finer quantum. They lie 2**19 or more below it.
    """
    fmt, x = FORMATS[name], numbers(name, 300, 200)
    coarse = (3,) if name.startswith("int8") else (5, 6, 7)
    changed = torch.zeros((), dtype=torch.bool)
    for first in drawn(name, x):
        planes = split(fmt, x, first)
        value = fmt.value(planes)
        halved = (split(fmt, value)[1] != planes[1]).repeat_interleave(128, 1)[:, :300]
        changed = changed | halved.any()
        lost = halved & torch.isin(planes[0].abs(), torch.tensor(coarse, dtype=fmt.dtypes[0]))
        for again in drawn(name, x):
            found = split(fmt, value, again)
            assert ((planes[1].int() - found[1].int()).abs() <= 1).all()
            assert_same_bits("codes", found[0][~halved], planes[0][~halved])
            assert_same_bits("value", fmt.value(found)[~lost], value[~lost])
            assert not (fmt.value(found)[lost] == value[lost]).any()
    assert changed


@every_format
def test_encoding_keeps_the_order_of_numbers(name):
    """Of a block of them, under the same random bits."""
    fmt = FORMATS[name]
    x = of_its_sign(name, spread(400, 128, 7)).sort(1).values
    for random in drawn(name, x[:, :1]):
        k = split(fmt, x, None if random is None else random.expand_as(x))[0]
        assert (k.int().diff() >= 0).all()
        assert (k.int().diff() > 0).any()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_mean_over_all_random_bits_is_the_number(name):
    """To 3/4 of 2**-16 of the step between the codes around it: a code has 16 fraction bits, rounded to nearest, and is
    itself a float32, whose 24 bits leave 17 to the fraction of a code above 63. All together are not biased.
    """
    fmt, form = FORMATS[name], form_of(name)
    random = torch.nn.functional.pad(torch.arange(1 << 16, dtype=torch.int32).view(-1, 64), (0, 1))
    g = torch.Generator().manual_seed(5)
    lowest = form.first - form.n + (0 if name.startswith("uint8") else -4)
    power = torch.linspace(lowest, 0, 240).round()
    off = []
    for x in torch.ldexp(torch.rand(240, generator=g) * 0.7 + 1, power):
        rows = torch.full(random.shape, x)
        rows[:, -1] = 1.0  # for a scale of 2**0
        found, counts = split(fmt, rows, random)[0][:, :-1].unique(return_counts=True)
        mean = sum(form.value(k) * n for k, n in zip(found.tolist(), counts.tolist(), strict=True)) / (1 << 16)
        (number,) = fractions(x[None])
        low = int(form.code(number))
        step = form.value(low + 1) - form.value(low)
        off.append((mean - number) / step)
        assert abs(off[-1]) <= Fraction(3, 4 << 16), float(x)
    # Independent errors within 1.1e-5 have a mean of 240 within 1.1e-5 * 4 / sqrt(3 * 240) but for one in 10,000
    assert abs(sum(off) / len(off)) < 1.7e-6


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("uint8")])
def test_a_positive_second_moment_never_becomes_0(name):
    """Nor does a negative one or one that is not finite become a number: it is NaN, as in a register."""
    fmt, x = FORMATS[name], numbers(name, 300, 200)
    x = torch.cat([x, -x])
    for random in drawn(name, x):
        value = fmt.value(split(fmt, x, random))
        bad = (x < 0) | ~x.isfinite()
        assert torch.equal(value.isnan(), bad)
        assert torch.equal(value[~bad] > 0, x[~bad] > 0)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("int8")])
def test_a_first_moment_keeps_its_sign_and_stays_finite(name):
    fmt, x = FORMATS[name], numbers(name, 300, 200)
    for random in drawn(name, x):
        value = fmt.value(split(fmt, x, random))
        assert torch.equal(value.isnan(), ~x.isfinite())
        assert not value.isinf().any()
        assert (value * x.sign() >= 0)[x.isfinite()].all()
        assert_same_bits("-x", fmt.value(split(fmt, -x, random)) + 0.0, -value + 0.0)


@every_width
@every_format
def test_a_block_of_zeros_stays_zero(name, columns):
    """Of either sign, under any random bits; and so do new planes, whose scales are 0."""
    fmt = FORMATS[name]
    x = torch.zeros(3, columns)
    x[1] = -0.0
    for random in drawn(name, x):
        planes = split(fmt, x, random)
        assert not planes[0].any()
        assert (planes[1] == form_of(name).least).all()
        assert_same_bits("value", fmt.value(planes), torch.zeros(3, columns))
    assert_same_bits("new", fmt.value([torch.zeros_like(plane) for plane in planes]), torch.zeros(3, columns))


@every_format
def test_a_scale_is_the_smallest_under_which_the_block_fits(name):
    """The largest code times it is at least the maximum: it saturates nothing but in the last binade of float32.

    Under the least scale the smallest code is a normal float32: nothing depends on how subnormals are treated.
    """
    fmt, form, x = FORMATS[name], form_of(name), numbers(name, 300, 100)
    top = form.value(form.top)
    for row, scales in zip(x, split(fmt, x)[1].tolist(), strict=True):
        for block, scale in zip(row.split(128), scales, strict=True):
            largest = max((abs(v) for v in fractions(block) if v is not None), default=Fraction(0))
            assert largest <= top * TWO ** (scale - 127) or scale == 254
            assert 2 * largest > top * TWO ** (scale - 127) or scale == form.least
    assert form.value(1) * TWO ** (form.least - 127) == TWO**-126


@every_width
@every_format
def test_a_block_depends_on_nothing_but_itself(name, columns):
    """Not on other blocks or rows, nor on the order of its numbers: shards have the bits of the whole."""
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    x = of_its_sign(name, torch.cat([spread(9, columns, 3), at_a_scale(columns)]))
    for random in drawn(name, x):
        whole = split(fmt, x, random)
        for a, b in pairwise((0, 1, 2, 5, 11, len(x))):
            part = split(fmt, x[a:b], None if random is None else random[a:b])
            assert_each(f"rows {a} to {b}", part, [plane[a:b] for plane in whole])
            assert_same_bits("value", fmt.value(part), fmt.value(whole)[a:b])
        for k, first in enumerate(range(0, columns, 128)):
            own = slice(first, min(first + 128, columns))
            order = first + torch.randperm(own.stop - first, generator=g)
            part = split(fmt, x[:, order], None if random is None else random[:, order])
            assert_each(f"block {k}, in another order", part, (whole[0][:, order], whole[1][:, k : k + 1]))


@every_format
def test_a_number_that_is_not_finite_harms_no_mate(name):
    """It does not count for the scale, and nothing else of its block changes."""
    fmt, x = FORMATS[name], of_its_sign(name, torch.randn(4, 300, generator=torch.Generator().manual_seed(0)))
    x[:, 0] = 1e-3
    hurt = x.clone()
    hurt[:, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])
    want, got = split(fmt, x), split(fmt, hurt)
    assert (got[0][:, 0] == form_of(name).nan).all()
    assert_each(name, (got[0][:, 1:], got[1]), (want[0][:, 1:], want[1]))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
@every_format
def test_no_rows_and_no_columns(name, shape):
    planes = split(FORMATS[name], torch.zeros(shape))
    assert [plane.shape for plane in planes] == [shape, (shape[0], -(-shape[1] // 128))]
    assert FORMATS[name].value(planes).shape == shape
