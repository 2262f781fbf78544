"""A row's scale moves with its largest number: what that does to the others, and that every backend does the same."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers import Case, assert_same_bits, batch_of, case_of, encoded
from oracle import fractions, half_ulp
from test_backends import INSTRUCTIONS, assert_same
from test_rows import E4M3, found
from torch import Tensor
from words import form_of

from collage.backends import Row
from collage.formats import FORMATS, Word
from collage.rng import key_of
from collage.rules import RULES
from collage.strategies import Strategy

KERNELS = [*INSTRUCTIONS, pytest.param("triton", marks=pytest.mark.slow)]
LR = 1e-3  # of `batch_of`
BORDER = 448 * 2.0**-12  # a row's maximum in the middle of weights, where a scale ends
CASES = [case_of("collage-fp8"), case_of("collage-fp8-lean"), case_of("collage-fp8-lean", "lion")]
CASES += [case_of(Strategy("e4m3+int16:sr", "fp32", "bf16x2")), case_of(Strategy("e4m3+int8", "bf16", "fp32"), "sgd")]


@pytest.fixture(params=["reference", *KERNELS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from found(request.param, monkeypatch)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from found(request.param, monkeypatch)


def weights(columns: int) -> Tensor:
    """Rows of everything that a scale has to be decided for, all below 1 but what says otherwise."""
    g = torch.Generator().manual_seed(columns)
    x = torch.rand(13, columns, generator=g).sub(0.5) * torch.exp2(-torch.randint(0, 24, (13, columns), generator=g))
    x[0] = 0.0
    x[1, 0] = 3e38
    x[2, -1] = torch.nan
    x[3, columns // 2] = torch.inf
    x[4, 0], x[5, -1] = BORDER * (1 - 2.0**-10), -BORDER * (1 + 2.0**-10)  # grows over it; shrinks below it
    x[6] *= 2.0**-140
    x[7] *= 2.0**120
    x[8, : columns // 2] = torch.nan
    x[9, 1:] = 0.0
    x[10, 0] = 2.0**12  # all others are subnormal
    return x


def row_of(case: Case, columns: int) -> Row:
    """These weights in the middle of a run; the last rows are new, with scales of 0, and not of this format."""
    x = weights(columns)
    grad = -x.sign().nan_to_num() * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    grad[5] = -grad[5]
    slots = [encoded(name, (x * 0.1).nan_to_num(0.0, 0.0).abs()) for name in case.formats[1:]]
    hi, lo, scale = encoded(case.formats[0], x)
    hi[11], lo[11], scale[11] = torch.zeros((), dtype=hi.dtype), 0, 0
    lo[12, hi[12] == 0] = -1
    sums = torch.zeros(5, dtype=torch.float64)
    return Row(((hi, lo, scale), *slots), grad.to(case.gradient), 3, key_of("w"), sums=sums)


@pytest.mark.parametrize("columns", [1, 31, 1000, 16_384, 16_500])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_that_a_scale_has_to_be_decided_for(case, columns, kernels):
    assert_same(kernels, case, [row_of(case, columns)])


def grown(backend: Any, name: str, row: tuple[Tensor, ...], delta: Tensor, step: int) -> Tensor:
    """theta + delta, in place; what of it was to be."""
    case = Case(RULES["apply"], (name,), torch.float32, torch.float32)
    given = delta / -LR
    backend.step(batch_of(case, [Row((row,), given, step, key_of("w"))], hyper=(0.0,)))
    return -(torch.tensor(LR) * given)


def moved(name: str, rows: int, columns: int, small: int) -> tuple[Tensor, ...]:
    """Planes of weights down to that many octaves below the row's largest, its first."""
    g = torch.Generator().manual_seed(rows)
    x = (torch.rand(rows, columns, generator=g) - 0.5) * 2.0**-6
    x *= torch.exp2(-torch.randint(0, small, (rows, columns), generator=g))
    x[:, 0] = BORDER * (1 - 2.0**-10)
    return encoded(name, x)


def is_cut(name: str, x: Fraction, scale: int) -> bool:
    """Whether x has bits below the last that a remainder holds under that scale. Exact."""
    y = x / Fraction(2) ** (scale - 127)
    return (y / (2 * half_ulp(y, form_of(name).word))).denominator != 1


@pytest.mark.parametrize("octaves", [-3, -1, 1, 2, 9])
@pytest.mark.parametrize("name", [name for name in E4M3 if isinstance(FORMATS[name], Word)])
def test_untouched_weights_change_only_where_bits_below_the_last_are_cut(name, octaves, backend):
    """Those change, to nearest, and no others; by less than an ulp of the new scale. A scale that falls cuts none."""
    planes, fmt = moved(name, 3, 200, 20), FORMATS[name]
    before, scale = fmt.value(planes), planes[2].clone()
    delta = torch.zeros(3, 200)
    delta[:, 0] = before[:, 0] * (2.0**octaves - 1)
    grown(backend, name, planes, delta, 1)
    after, word = fmt.value(planes)[:, 1:], form_of(name).word
    assert_same_bits("scale", planes[2], (scale.int() + octaves).to(torch.uint8))
    changed = cut = 0
    for k, (old, new) in enumerate(zip(before[:, 1:], after, strict=True)):
        for x, y in zip(fractions(old), fractions(new), strict=True):
            loses = is_cut(name, x, int(planes[2][k]))
            cut, changed = cut + loses, changed + (x != y)
            assert loses or x == y
            power = Fraction(2) ** (int(planes[2][k]) - 127)
            bound = half_ulp(x / power, word) * power
            assert abs(x - y) < 2 * bound if fmt.stochastic else abs(x - y) <= bound
    assert changed == cut
    assert (cut > 0) == (octaves > 0)


@pytest.mark.parametrize("steps", [40, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", E4M3)
def test_scales_that_come_and_go_cut_once(name, steps, backend):
    """However often a scale moves up and down, untouched weights are what they are after the first time."""
    planes, fmt = moved(name, 3, 200, 20), FORMATS[name]
    delta, seen = torch.zeros(3, 200), []
    delta[:, 0] = BORDER
    for step in range(steps):
        grown(backend, name, planes, delta, step)
        delta = -delta
        seen.append((fmt.value(planes)[:, 1:], planes[2].clone()))
        assert torch.equal(seen[-1][0], seen[0][0])
    assert (seen[-1][1] == seen[-2][1] - 1).all()


@pytest.mark.parametrize("steps", [100, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["e4m3+int16", "e4m3+int16:sr", "e4m3+int8:sr"])
def test_small_updates_under_moving_scales_do_not_drift(name, steps, backend):
    """Neither up or down, nor to or from zero: the mean error is within 5 of its standard errors of 0.

    An error grows no faster than a random walk of half an ulp of the largest weight a step.
    """
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    x = torch.rand(16, 256, generator=g).add(1) * 2.0**-8 * (torch.randint(0, 2, (16, 256), generator=g) * 2 - 1)
    x[:, 0] = BORDER * (1 - 2.0**-10)
    planes = encoded(name, x)
    exact = fmt.value(planes).double()
    start, sign = exact[:, 1:].clone(), 1
    for step in range(steps):
        delta = torch.randn(x.shape, generator=g) * 1e-5
        delta[:, 0] = sign * BORDER
        exact += grown(backend, name, planes, delta, step).double()
        sign = -sign
    error = (fmt.value(planes).double() - exact)[:, 1:]
    for signed in (error, error * start.sign()):
        assert signed.mean().abs() <= 5 * signed.std() / signed.numel() ** 0.5
    ulp = fmt.spacing(encoded(name, torch.full((1, 2), BORDER * 1.5)))[0, 0] / 16  # of 2**-7, under the larger scale
    assert error.std() <= ulp / 2 * steps**0.5
