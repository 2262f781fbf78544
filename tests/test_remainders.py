"""Weights that are a word and how it shows: bf16+int16, bf16+int8, fp16+int8, and e4m3 words with a scale per row."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from helpers import ONES, assert_each, assert_same_bits, drawn, random_bits
from oracle import SPECS, codes, ended, every, fractions, from_codes, half_ulp, random_patterns, spread
from torch import Tensor
from words import FP32, TWO, form_of

import collage
from collage.accumulators import Register
from collage.formats import FORMATS, Cut, Word, fitted, split

NAMES = [name for name, fmt in FORMATS.items() if isinstance(fmt, Cut | Word)]
NEAREST = [name for name in NAMES if not FORMATS[name].stochastic]
SCALED = [name for name in NAMES if not FORMATS[name].elementwise]
every_format = pytest.mark.parametrize("name", NAMES)

BORDERS = [
    *(0x00000000, 0x00000080, 0x00008000, 0x007FFFFF, 0x00800000),  # subnormals
    *(codes(torch.tensor([2.0**k])).item() for k in (-33, -32, -25, -24, -14, -9, -6, 0, 15, 16)),
    *(codes(torch.tensor([x])).item() for x in (65504.0, 65519.875, 65520.0, 448.0, 464.0)),
    *(0x7F600000, 0x7F7F0000, 0x7F7F8000, 0x7F7FFF80, 0x7F7FFFFF),  # the largest
]
NOT_FINITE = [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FC12345, 0x7FFFFFFF]


def borders() -> Tensor:
    """float32 around where something changes, of both signs; Inf; NaNs of every kind."""
    near = [max(code + k, 0) for code in BORDERS for k in range(-3, 4)] + NOT_FINITE
    return from_codes([code | sign for code in near for sign in (0, 1 << 31)], FP32)


def numbers(name: str) -> Tensor:
    """More than 2**16: patterns, exact halves, weights, borders. Where rows have scales, in rows of 300."""
    g = torch.Generator().manual_seed(0)
    patterns, weights = random_patterns(FP32, 1 << 14, 0), torch.randn(1 << 14, generator=g)
    x = torch.cat([patterns, ended(random_patterns(FP32, 1 << 14, 1), 2), weights, ended(weights, 3), borders()])
    if FORMATS[name].elementwise:
        return x
    rows = torch.cat([x, x.new_zeros(-x.numel() % 300)]).view(-1, 300)
    return torch.cat([rows, spread(100, 300, 4), torch.cat([at_a_scale(), torch.zeros(7, 280)], 1)])


def at_a_scale() -> Tensor:
    """Rows whose maximum is at, above and below a change of scale; of zeros and NaN, alone and beside numbers."""
    g = torch.Generator().manual_seed(1)
    top = from_codes([0x7F600000 - 0x00800000 * k + j for k in (0, 1, 119, 246) for j in (-1, 0, 1)], FP32)
    rows = torch.rand(7, 20, generator=g)
    rows[0, :12], rows[1], rows[2], rows[3, ::3] = top, 0.0, torch.nan, torch.inf
    for k in range(3):
        rows[4 + k, :3] = top[6 + k] * torch.tensor([1.0, -0.5, 2.0**-30])
        rows[4 + k, 3:] = 0.0
    return rows


@every_format
def test_encoding_and_decoding_are_the_definition(name):
    fmt, form, x = FORMATS[name], form_of(name), numbers(name)
    assert x.numel() > 1 << 16
    random = random_bits(x) if fmt.stochastic else None
    planes = split(fmt, x, random)
    assert_each(name, planes, form.encode(x, random))
    assert_same_bits("value", fmt.value(planes), form.decode(planes))


@pytest.mark.parametrize("name", [name for name in NAMES if FORMATS[name].stochastic])
def test_a_stochastic_format_rounds_to_nearest_without_random_bits(name):
    """Planes of a loaded model, and of an edited weight."""
    x = numbers(name)
    assert_each(name, split(FORMATS[name], x), split(FORMATS[name.removesuffix(":sr")], x))


@every_format
def test_a_number_is_one_register(name):
    """It grows in one float32 sum; the monitor differences the number alone."""
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    planes = split(fmt, torch.randn(10, 300, generator=g))
    number, delta = fmt.load(planes, FP32), torch.randn(10, 300, generator=g) * 1e-3
    assert isinstance(number, Register)
    assert_same_bits("value", number.value, fmt.value(planes))
    assert_same_bits("grown", number.grown(delta).value, fmt.value(planes) + delta)
    (component,) = fmt.components(planes)
    assert_same_bits("component", component, fmt.value(planes))


def sampled_patterns() -> Iterator[Tensor]:
    """float32: every upper half with the lower halves where something changes, and with some others."""
    upper = torch.arange(1 << 16) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, ONES):
        yield from_codes(upper | lower, FP32)
    yield from_codes(upper | torch.randint(0, 1 << 16, (1 << 16,), generator=torch.Generator().manual_seed(1)), FP32)


def every_pattern() -> Iterator[Tensor]:
    for first in range(0, 1 << 32, 1 << 18):
        yield from_codes(torch.arange(first, first + (1 << 18)), FP32)


PATTERNS = [sampled_patterns, pytest.param(every_pattern, marks=pytest.mark.slow)]


@pytest.mark.parametrize("patterns", PATTERNS, ids=lambda f: f.__name__)
def test_bf16_and_16_bits_are_a_float32(patterns):
    """All of its bits come back, NaN as NaN; what shows is within half an ulp."""
    fmt = FORMATS["bf16+int16"]
    for x in patterns():
        planes = split(fmt, x)
        back, nan = fmt.value(planes), x.isnan()
        if not torch.equal(back.view(torch.int32).masked_fill(nan, 0), x.view(torch.int32).masked_fill(nan, 0)):
            assert_same_bits("float32", back, x)
        assert torch.equal(planes[0].isnan() & back.isnan(), nan)


@every_format
def test_encoding_again_changes_no_number(name):
    """Nor a plane, but in a row whose maximum was rounded to 448 times a power of two, which is a scale of its own."""
    fmt, x = FORMATS[name], numbers(name)
    for first in drawn(name, x):
        planes = split(fmt, x, first)
        value = fmt.value(planes)
        same = slice(None)
        if name in SCALED:
            top = value.nan_to_num(0.0, 0.0).abs().amax(1)
            same = top != 224 * (planes[2].int() << 23).view(FP32)
            assert first is not None or not same.all()
            assert_same_bits("scale", split(fmt, value)[2], planes[2] - (~same).byte())
        for again in drawn(name, x):
            found = split(fmt, value, again)
            assert_same_bits("value", fmt.value(found), value)
            assert_each(name, [plane[same] for plane in found], [plane[same] for plane in planes])


@every_format
def test_every_word_is_a_fixed_point_under_every_random_bits(name):
    """Words from the smallest to the largest, each with all 65,536; all of them with the least and most."""
    fmt, form = FORMATS[name], form_of(name)
    words = torch.arange(0, form.word.max_code + 1, max(1, form.word.max_code >> 16))
    shown = (words + (1 << (form.bits - 1))) >> form.bits
    planes = [from_codes(shown, form.shown), (words - (shown << form.bits)).to(fmt.dtypes[1])]
    planes = [plane[None, : len(words) // 32 * 32].reshape(-1, 32) for plane in planes]  # rows: the last is the largest
    if form.scaled:
        planes = with_scales(planes)
    x = fmt.value(planes)
    assert x.isfinite().all()
    for random in drawn(name, x):
        assert_each(name, split(fmt, x, random), planes)
    if fmt.stochastic:
        some = [plane[:: len(plane) // 5] for plane in planes]
        for first in range(0, 1 << 16, 1 << 12):
            random = torch.arange(first, first + (1 << 12), dtype=torch.int32).repeat_interleave(len(some[0]))
            many = [plane.repeat(1 << 12, *[1] * (plane.dim() - 1)) for plane in some]
            assert_each(name, split(fmt, fmt.value(many), random[:, None].expand(-1, 32)), many)


def with_scales(planes: list[Tensor]) -> list[Tensor]:
    """The same with the largest word in every row, and scales from the least to the largest."""
    shown, rest = (plane.clone() for plane in planes)
    shown[:, -1] = 448.0
    rest[codes(shown) == 0x7E] = 0
    return [shown, rest, (26 + torch.arange(len(planes[0])) % 221).to(torch.uint8)]


@every_format
def test_encoding_keeps_the_order_of_numbers(name):
    """Of a row of them, under the same random bits."""
    fmt = FORMATS[name]
    x = spread(200, 300, 7).sort(1).values
    x = x if not fmt.elementwise or fmt.dtypes[0] != torch.float16 else x.clamp(-65519, 65519)
    for random in drawn(name, x[:, :1]):
        value = fmt.value(split(fmt, x, None if random is None else random.expand_as(x)))
        assert (value.diff() >= 0).all()


@pytest.mark.parametrize("name", [name for name in NAMES if FORMATS[name].stochastic])
def test_the_mean_over_all_random_bits_is_the_number(name):
    """Exactly where at most 16 bits are dropped. Where more are, 65,536 values tell no more than 2**-16 ulps of the
    word, rounded half up: at most half of that is missing or too much.
    """
    fmt, form = FORMATS[name], form_of(name)
    random = torch.arange(1 << 16, dtype=torch.int32)
    fine = 0
    for x in unrounded(name):
        rows = torch.full((1, (1 << 16) + 1), x)
        if form.scaled:
            rows[0, -1] = 300.0  # for a scale of 2**0
        planes = split(fmt, rows, torch.cat([random, random[:1]])[None])
        values, counts = fmt.value(planes)[0, : 1 << 16].unique(return_counts=True)
        assert len(values) <= 2
        mean = sum(v * int(n) for v, n in zip(fractions(values), counts, strict=True)) / (1 << 16)
        (number,) = fractions(torch.tensor([x]))
        ulp = 2 * half_ulp(number, form.word)
        exact = (number / ulp * (1 << 16)).denominator == 1
        assert abs(mean - number) <= (0 if exact else ulp / (1 << 17)), (x, float(mean))
        fine += exact
    assert fine >= 20


def unrounded(name: str) -> list[float]:
    """Numbers of every size that the format has, down to what is less than its smallest."""
    g = torch.Generator().manual_seed(2)
    lowest, highest = {"bf16": (-149, 127), "fp16": (-50, 15), "e4m3": (-50, 8)}[name[:4]]
    power = torch.linspace(lowest, highest, 60).round()
    x = torch.ldexp(torch.rand(60, generator=g) * 0.7 + 1, power)
    return torch.where(torch.arange(60) % 2 == 0, x, -ended(x, 1)).tolist()


@every_format
def test_no_finite_number_becomes_infinite_or_nan(name):
    """But beyond 65,520 in float16, and what rounds to nearest beyond 24 bits of a float32."""
    fmt, x = FORMATS[name], numbers(name)
    for random in drawn(name, x):
        planes = split(fmt, x, random)
        kept = x.isfinite()
        if fmt.dtypes[0] == torch.float16:
            kept &= x.abs() < 65520
        if fmt == Cut(8) or (name == "bf16+int8:sr" and random is None):
            kept &= x.abs() < from_codes([0x7F7FFF80], FP32)
        assert torch.equal(fmt.value(planes).isfinite(), kept)
        assert torch.equal(fmt.value(planes).isnan(), x.isnan() | (~x.isfinite() if name in SCALED else x.isnan()))


@every_format
def test_zeros_and_signs_stay(name):
    """Of what rounds to zero too."""
    fmt = FORMATS[name]
    x = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0]])
    shown = split(fmt, x)[0].float()
    assert torch.equal(shown.signbit(), x.signbit())
    assert torch.equal(fmt.value(split(fmt, x)).signbit(), x.signbit())


@every_format
def test_what_shows_is_the_number_rounded_to_nearest(name):
    """But at ties, where it is the one farther from zero; so is what overflows."""
    fmt, x = FORMATS[name], numbers(name)
    for random in drawn(name, x):
        hi, _, *scale = planes = split(fmt, x, random)
        value = fmt.value(planes)
        value = value * (254 - scale[0].int() << 23).view(FP32)[:, None] if scale else value
        cast = value.to(hi.dtype)
        other = (codes(hi) != codes(cast)) & ~value.isnan()
        assert bool(other.any()) == (random is None or name != "bf16+int16")
        wrong = zip(fractions(value[other]), fractions(cast[other].float()), fractions(hi[other].float()), strict=True)
        for number, even, away in set(wrong):
            if away is not None and even is not None:
                assert abs(away) - abs(number) == abs(number) - abs(even) > 0


@pytest.mark.parametrize("name", NEAREST)
def test_broken_planes_are_those_that_are_no_word(name):
    """All pairs, or with 16 bits of remainder every 97th: below zero, or beside a NaN or an Inf that have none.

    A word of bfloat16's may show Inf and be finite: then the remainder is below 0.
    """
    fmt, form = FORMATS[name], form_of(name)
    shown, half = every(form.shown), 1 << (form.bits - 1)
    magnitude = codes(shown) & (SPECS[form.shown].sign - 1)
    rests = range(-half, half) if form.bits == 8 else (*range(-half, half, 97), -1, 0, 1, half - 1)
    for rest in rests:
        lo = torch.full(shown.shape, rest, dtype=fmt.dtypes[1])
        word = (magnitude << form.bits) + rest
        is_word = (word >= 0) & (word <= form.word.max_code)
        alone = (magnitude > SPECS[form.shown].max_code) & (rest == 0)
        planes = (shown, lo) if not form.scaled else (shown[:, None], lo[:, None], torch.full((256,), 127).byte())
        assert torch.equal(fmt.broken(planes).view(-1), ~(is_word | alone)), rest


@every_format
def test_nothing_that_encoding_leaves_is_broken(name):
    fmt, x = FORMATS[name], numbers(name)
    for random in drawn(name, x):
        assert not fmt.broken(split(fmt, x, random)).any()


@every_format
def test_another_weight_with_an_old_remainder_is_off_by_half_an_ulp_at_most(name):
    """So the old weight does not come back, as it would with a master. Where it is broken, the remainder goes."""
    fmt, form, g = FORMATS[name], form_of(name), torch.Generator().manual_seed(3)
    x = torch.randn(300, 300, generator=g)
    hi, lo, *scale = split(fmt, x, random_bits(x) if fmt.stochastic else None)
    edited = random_patterns(hi.dtype, 90_000, 4).view(300, 300)
    edited = torch.where(torch.arange(300) % 30 == 0, 0.0, edited.float()).to(hi.dtype)
    broken = fmt.broken((edited, lo, *scale))
    assert broken.any()
    planes = (edited, lo.masked_fill(broken, 0), *scale)
    if fmt.elementwise:
        assert_each("fitted", fitted(fmt, (edited, lo))[0], planes)
    value = fmt.value(planes)
    value = value * (254 - scale[0].int() << 23).view(FP32)[:, None] if scale else value
    spec = SPECS[hi.dtype]
    exponent = torch.frexp(edited.double())[1].clamp(min=spec.emin + 1) - 1
    off = (value.double() - edited.double()).abs() / torch.exp2(exponent.double() - spec.precision + 1)
    finite = edited.float().isfinite()
    assert (off[finite] <= 0.5).all()
    assert off[finite].max() == 0.5
    assert torch.equal(value[~finite].isnan(), edited[~finite].float().isnan() | form.scaled)


# Rows: one power of two each


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("columns", [1, 3, 300, 1023, 1025, 5000])
def test_a_row_depends_on_nothing_but_itself(name, columns):
    """Not on its neighbours, nor on the order of its numbers; so shards by rows have the bits of the whole."""
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    x = torch.cat([spread(9, columns, 3), torch.zeros(1, columns), torch.full((1, columns), torch.nan)])
    random = random_bits(x) if fmt.stochastic else None
    whole = split(fmt, x, random)
    assert [plane.shape for plane in whole] == [x.shape, x.shape, (11,)]
    for a, b in pairwise((0, 1, 2, 5, 11)):
        part = split(fmt, x[a:b], None if random is None else random[a:b])
        assert_each(f"rows {a} to {b}", part, [plane[a:b] for plane in whole])
        assert_same_bits("value", fmt.value(part), fmt.value(whole)[a:b])
    order = torch.randperm(columns, generator=g)
    hi, lo, scale = split(fmt, x[:, order], None if random is None else random[:, order])
    assert_each("in another order", (hi, lo, scale), (whole[0][:, order], whole[1][:, order], whole[2]))


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_is_the_smallest_under_which_the_row_fits(name):
    """448 times it is at least the maximum, and half of that is less; at the ends of the range it stays."""
    x = numbers(name)
    for row, scale in zip(x, split(FORMATS[name], x)[2].tolist(), strict=True):
        largest = max((abs(v) for v in fractions(row) if v is not None), default=Fraction(0))
        assert largest <= 448 * TWO ** (scale - 127) or scale == 246
        assert largest > 224 * TWO ** (scale - 127) or scale == 26
        assert 26 <= scale <= 246


@pytest.mark.parametrize("name", SCALED)
def test_hardware_without_fp8_reads_the_same_weight(name):
    """What shows, times its scale, is a bfloat16 number, and no subnormal one."""
    hi, _, scale = split(FORMATS[name], numbers(name))
    visible = hi.float() * (scale.int() << 23).view(FP32)[:, None]
    assert_same_bits("visible", visible.bfloat16().float(), visible)
    assert ((visible == 0) | (visible.abs() >= 2.0**-126) | visible.isnan()).all()


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_no_rows_and_no_columns(name, shape):
    planes = split(FORMATS[name], torch.zeros(shape))
    assert [plane.shape for plane in planes] == [shape, shape, shape[:1]]
    assert FORMATS[name].value(planes).shape == shape


@pytest.mark.parametrize("name", SCALED)
def test_new_planes_are_zero(name):
    """A scale of 0 is that of planes that nothing has been encoded in."""
    planes = [torch.zeros((2, 3), dtype=dtype) for dtype in FORMATS[name].dtypes[:2]]
    assert_same_bits("", FORMATS[name].value([*planes, torch.zeros(2, dtype=torch.uint8)]), torch.zeros(2, 3))


@pytest.mark.parametrize(("backend", "steps"), [("cpu", 1000), ("reference", 20)])
def test_collage_exact_is_a_float32_master_bit_for_bit(backend, steps):
    """Many steps with given gradients: the same number as under bf16+fp32 with the same moments, hi its cast."""
    master = collage.Strategy("bf16+fp32", "bf16", "bf16x2")
    runs = []
    for strategy in (collage.STRATEGIES["collage-exact"], master):
        g = torch.Generator().manual_seed(0)
        w = torch.nn.Parameter(torch.randn(40, 130, generator=g).bfloat16())
        opt = collage.AdamW([("w", w)], lr=1e-3, weight_decay=0.1, strategy=strategy, backend=backend)
        for _ in range(steps):
            w.grad = (torch.randn(w.shape, generator=g) * torch.rand((), generator=g)).bfloat16()
            opt.step()
        runs.append((w, opt.theta(next(opt.parameters()))))
    (w, exact), (other, masters) = runs
    value = FORMATS["bf16+int16"].value(exact)
    assert_same_bits("value", value, masters[1])
    tie = (codes(value) & 0xFFFF) == 0x8000  # where hi is rounded up in magnitude, and a cast to even
    assert_same_bits("hi", w.detach()[~tie], other.detach()[~tie])


def test_a_master_shows_what_a_word_of_16_more_bits_does():
    """e4m3+fp32: the same codes and scales by the definition of e4m3+int16, and every bit of the master."""
    fmt, form = FORMATS["e4m3+fp32"], form_of("e4m3+int16")
    x = torch.cat([numbers("e4m3+int16")[::7], spread(20, 300, 4)])
    shown, _, scales = form.encode(x, None)
    planes = fmt.encode(Register(x))
    assert_each("e4m3+fp32", planes, (shown, x, scales))
    assert_same_bits("its number", fmt.value(planes), x)
    assert not fmt.broken(planes).any()


def test_a_master_beside_other_codes_is_broken():
    """Each of the 256 beside each of some masters: broken where it is another number than what the master shows."""
    fmt, form = FORMATS["e4m3+fp32"], form_of("e4m3+int16")
    rows, lows = torch.tensor([448.0, 3.0, -(2.0**-9), 2.0**-10, 0.0, torch.nan])[:, None], torch.zeros(6, 1).short()
    scales, edited = torch.full((6,), 127).byte(), every(torch.float8_e4m3fn).expand(6, 256)
    own = from_codes([form.planes_of(int(code), 0, None)[0] for code in codes(rows)], torch.float8_e4m3fn)[:, None]
    seen, shows = edited.float(), form.decode((own, lows, scales))
    wanted = ~((seen == shows) | (seen.isnan() & shows.isnan()))
    assert torch.equal(fmt.broken((edited, rows.expand(6, 256), scales)), wanted)
    assert (wanted.sum(1) >= 254).all()
    fresh, broken = fitted(fmt, (edited, rows.expand(6, 256).contiguous(), scales))
    assert torch.equal(broken, wanted)
    assert_same_bits("master", fresh[1][wanted & ~seen.isnan()], seen[wanted & ~seen.isnan()])
