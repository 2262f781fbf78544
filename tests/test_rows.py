"""Formats with a scale for a block or a row, on every backend: rows of any length, shards, strides, and neighbours.

The grid of rules and formats is test_backends.py's, whose rows are single ones; here are many, and what lies beside.
"""

import itertools
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import REGIMES, Case, assert_each, assert_same_bits, assert_same_rows, batch_of, case_of, copy_of, encoded
from helpers import numbers as of_regime
from oracle import random_patterns, spread
from test_backends import INSTRUCTIONS, assert_same, device_of, under_test
from torch import Tensor

from collage.backends import Noise, Region, Row, reference
from collage.formats import FORMATS, format_of
from collage.layout import as_rows, zeros
from collage.rng import key_of
from collage.rules import RULES
from collage.strategies import Strategy

BLOCKS = [case_of("collage-8bit"), case_of("collage-8bit-plus"), case_of(Strategy("bf16x2", "int8/128", "uint8/128"))]
BLOCKS += [case_of("collage-8bit", rule) for rule in ("adamw_amsgrad", "adam", "sgd_momentum", "lion")]
BLOCKS += [case_of("collage-8bit", gradient=torch.float32), case_of(Strategy("fp32", "int8/128:sr", "fp32"))]
BLOCKS += [case_of("collage-fp8"), case_of("collage-fp8-lean"), case_of("fp8-master")]
BLOCKS += [case_of(Strategy("e4m3+int16:sr", "bf16", "bf16x2"), "sgd_momentum", torch.float32)]
BLOCKS += [Case(RULES["momentum"], ("int8/128:sr", "bf16"), torch.float32, torch.bfloat16)]
SHAPES = [(7, 1), (5, 127), (4, 128), (3, 129), (5, 300), (3, 5, 7), (2, 3, 5, 10), (0, 5), (3, 0), (6,), (), (2, 1000)]
SHARED = [name for name, fmt in FORMATS.items() if not fmt.elementwise]
E4M3 = [name for name in SHARED if FORMATS[name].dtypes[0] == torch.float8_e4m3fn]
WIDTHS = (1, 3, 127, 128, 129, 300, 1023, 1025, 5000)
of_cases = pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in BLOCKS])


KERNELS = [*INSTRUCTIONS, pytest.param("triton", marks=pytest.mark.slow)]


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend under test, on one of its instruction sets."""
    yield from found(request.param, monkeypatch)


@pytest.fixture(params=["reference", *KERNELS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The reference too, where something else is claimed of it than being itself."""
    yield from found(request.param, monkeypatch)


def found(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if name == "reference":
        yield reference
    else:
        yield from under_test(name, monkeypatch)


def numbers(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Of a regime, or "spread": each row far below a maximum anywhere in the range."""
    if kind == "spread":
        return spread(*as_rows(shape), seed).view(shape) if math.prod(shape) else torch.zeros(shape)
    return of_regime(kind, math.prod(shape), seed).view(shape)


def row_of(case: Case, kind: str, shape: tuple[int, ...], step: int = 3) -> Row:
    """A parameter of that shape in the middle of a run."""
    slots = []
    for k, (slot, name) in enumerate(zip(case.rule.slots, case.formats, strict=True)):
        x = numbers(kind, shape, k + 1)
        slots.append(encoded(name, x.abs() if slot.role == "variance" else x))
    grad = numbers(kind, shape, 4).to(case.gradient)
    return Row(tuple(slots), grad, step, key_of("w"), sums=torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["spread", "normal", "nan", "bits"])
@of_cases
def test_rows_of_any_length(case, kind, kernels):
    """All in one call, the empty ones too, each at a step of its own."""
    assert_same(kernels, case, [row_of(case, kind, shape, step=1 + k % 3) for k, shape in enumerate(SHAPES)])
    assert_same(kernels, case, [row_of(case, kind, (3, 200))], maximize=True, scale=1024.0)


@pytest.mark.parametrize("shape", [(2000, 3), (3, 40_001), (1, 70_000), (130, 520)], ids=str)
def test_more_than_a_piece_of_a_walk(shape, kernels):
    for case in (BLOCKS[0], BLOCKS[2]):
        assert_same(kernels, case, [row_of(case, "spread", shape)])


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_change_no_bit(threads, kernels, monkeypatch):
    """Their borders fall between rows and inside of them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    shapes = ((3, 30_000), (5, 1), (700, 129), (1, 1000))
    assert_same(kernels, BLOCKS[0], [row_of(BLOCKS[0], "normal", shape) for shape in shapes])


def cut(row: Row, first: int, last: int) -> Row:
    """Some rows of a parameter, in memory of their own, and where they lie in it."""
    sizes = (last - first, *row.shape[1:])
    strides = tuple(math.prod(sizes[k + 1 :]) for k in range(len(sizes)))
    region = Region(sizes, (first, *[0] * (len(sizes) - 1)), strides)
    slots = tuple(tuple(plane[first:last].clone() for plane in planes) for planes in row.slots)
    return row._replace(slots=slots, grad=row.grad[first:last].clone(), region=region, sums=None)


@pytest.mark.parametrize("shape", [(9, 129), (9, 1), (9, 4, 75)], ids=str)
@of_cases
def test_shards_by_rows_are_parts_of_the_whole(case, shape, backend):
    """Codes, scales and random bits; an empty shard is one."""
    whole = row_of(case, "spread", shape)._replace(sums=None)
    device = device_of(backend)
    shards = [copy_of(cut(whole, a, b), device) for a, b in pairwise((0, 1, 1, 4, 9))]
    ours, wanted = copy_of(whole, device), copy_of(whole)
    backend.step(batch_of(case, shards))
    backend.step(batch_of(case, [ours]))
    reference.step(batch_of(case, [wanted]))
    assert_same_rows([ours], [wanted])
    for k, planes in enumerate(wanted.slots):
        assert_each(
            f"slot {k}", [torch.cat(parts) for parts in zip(*(s.slots[k] for s in shards), strict=True)], planes
        )


def restrided(x: Tensor, kind: str) -> Tensor:
    """The same numbers in another order in memory."""
    if kind == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("which", ["all", "gradient", "codes"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("transposed", (37, 150)), ("spread", (37, 150)), ("transposed", (6, 10, 30)), ("channels last", (7, 5, 6, 11))],
    ids=str,
)
def test_blocks_follow_the_logical_order_whatever_the_strides(kind, shape, which, backend):
    """What comes out is what contiguous memory gives."""
    for case in (*BLOCKS[:3], BLOCKS[4], BLOCKS[-1]):
        plain = row_of(case, "spread", shape)
        slots = tuple(
            tuple(
                restrided(p, kind) if p.shape == shape and (which == "all" or (which == "codes" and k)) else p
                for p in own
            )
            for k, own in enumerate(plain.slots)
        )
        ours = copy_of(plain._replace(slots=slots), device_of(backend))
        ours = ours._replace(grad=ours.grad if which == "codes" else restrided(ours.grad, kind))
        assert not all(p.is_contiguous() for p in (*itertools.chain(*ours.slots), ours.grad))
        wanted = copy_of(plain)
        backend.step(batch_of(case, [ours]))
        reference.step(batch_of(case, [wanted]))
        assert_same_rows([ours], [wanted])


def test_nothing_beside_codes_and_scales_is_touched(backend):
    """Rows of every length around a block and a vector, at odd addresses, between sentinels."""
    device = device_of(backend)
    for case, columns, rows in itertools.product(BLOCKS[:3], (1, 7, 64, 127, 128, 129, 257), (1, 3)):
        row = row_of(case, "normal", (rows, columns))._replace(sums=None)
        memory, slots = [], []
        for planes in row.slots:
            wide = [torch.full((p.numel() + 80,), 77, dtype=torch.int8).to(p.dtype).to(device) for p in planes]
            views = tuple(m[3 : 3 + p.numel()].view(p.shape) for m, p in zip(wide, planes, strict=True))
            for view, plane in zip(views, planes, strict=True):
                view.copy_(plane)
            memory += wide
            slots.append(views)
        ours, wanted = row._replace(slots=tuple(slots), grad=row.grad.to(device)), copy_of(row)
        backend.step(batch_of(case, [ours]))
        reference.step(batch_of(case, [wanted]))
        assert_same_rows([ours], [wanted])
        for m, plane in zip(memory, itertools.chain(*row.slots), strict=True):
            assert (m[:3] == 77).all()
            assert (m[3 + plane.numel() :] == 77).all()


# Encoding, decoding and counting, of formats that no step trains in yet too


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", SHARED)
def test_decoding_and_encoding(name, columns, kernels):
    """Of several tensors at once, also empty and strided ones; to nearest, and with the bits of their place."""
    fmt, device = format_of(name), device_of(kernels)
    shapes = [(5, columns), (0, columns), (2, 3, columns), (1, columns), (min(columns, 40), 2)]
    values = [numbers("spread", shape, k) for k, shape in enumerate(shapes)]
    values += [of_regime(regime, 3 * columns, 5).view(3, columns) for regime in REGIMES]
    values.append(restrided(numbers("spread", (3, columns), 7), "transposed"))
    many = len(values)
    regions = [Region(tuple(x.shape), (7,) * x.dim(), (1 << 33, 1000, 1)[-x.dim() :]) for x in values]
    for noise in (
        None,
        Noise("exp_avg_sq", 3, [5] * many, range(many), regions),
        Noise("param", 3, [5] * many, range(many)),
    ):
        found, wanted = ([zeros(fmt, x.to(d)) for x in values] for d in (device, "cpu"))
        kernels.encode(name, [x.to(device) for x in values], found, noise)
        reference.encode(name, values, wanted, noise)
        for k, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            assert_each(f"tensor {k} {tuple(values[k].shape)}", ours, theirs)
    decoded = [[torch.empty_like(x, device=d) for x in values] for d in (device, "cpu")]
    kernels.decode(name, found, decoded[0])
    reference.decode(name, wanted, decoded[1])
    for k, (x, y) in enumerate(zip(*decoded, strict=True)):
        assert_same_bits(f"tensor {k}, decoded", x, y)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", SHARED)
def test_shards_by_rows_are_encoded_as_the_whole(name, columns, backend):
    fmt, device, x = format_of(name), device_of(backend), numbers("spread", (7, columns), 3)
    whole = zeros(fmt, x.to(device))
    backend.encode(name, [x.to(device)], [whole], Noise("param", 3, [5], [9]))
    parts = [x[a:b].to(device) for a, b in pairwise((0, 2, 2, 7))]
    regions = [Region((b - a, columns), (a, 0), (columns, 1)) for a, b in pairwise((0, 2, 2, 7))]
    planes = [zeros(fmt, part) for part in parts]
    backend.encode(name, parts, planes, Noise("param", 3, [5] * 3, [9] * 3, regions))
    assert_each(name, [torch.cat(own) for own in zip(*planes, strict=True)], whole)


@pytest.mark.parametrize("name", SHARED)
def test_the_scales_of_rows_without_elements_stay(name, backend):
    """With the bits of others in the same call, or alone."""
    values = [torch.zeros(3, 0), torch.ones(2, 5), torch.zeros(2, 0, 4)]
    for given in (values, values[:1]):
        values_there = [x.to(device_of(backend)) for x in given]
        planes = [zeros(format_of(name), x) for x in values_there]
        for own in planes:
            own[-1].fill_(7)
        backend.encode(name, values_there, planes)
        for x, own in zip(given, planes, strict=True):
            assert x.numel() or (own[-1] == 7).all()


@pytest.mark.parametrize("name", SHARED)
def test_new_planes_are_decoded_to_zeros(name, backend):
    out = torch.full((3, 300), 5.0, device=device_of(backend))
    backend.decode(name, [zeros(format_of(name), out)], [out])
    assert_same_bits(name, out, torch.zeros(3, 300))


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", SHARED)
def test_broken_planes_are_counted(name, columns, kernels):
    """Zeros and NaNs with a remainder; in codes nothing is."""
    device = device_of(kernels)
    hi, *others = encoded(name, numbers("spread", (9, columns), 1))
    assert kernels.broken(name, [[plane.to(device) for plane in (hi, *others)]]) == 0
    if name in E4M3:
        hi = random_patterns(hi.dtype, 9 * columns, 2).view(9, columns)
        hi[::2, ::3] = torch.zeros((), dtype=hi.dtype)
    theta = [plane.to(device) for plane in (hi, *others)]
    wanted = reference.broken(name, [(hi, *others)])
    assert (wanted > 0) == (name in E4M3)
    assert kernels.broken(name, [theta]) == wanted
    strided = [restrided(theta[0], "spread"), *theta[1:]]
    assert kernels.broken(name, [strided, theta]) == 2 * wanted
