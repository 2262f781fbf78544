"""Every backend computes the reference's bits: rule x formats x gradient x size x regime x instruction set x threads.

Triton's kernels run in its interpreter, which takes minutes for all of it: `make test-all`. A part: test_triton.py.
"""

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from helpers import (
    ONE_SLOT,
    REGIMES,
    SIZES,
    Case,
    assert_same_bits,
    assert_same_rows,
    batch_of,
    case_of,
    cases,
    copy_of,
    encoded,
    numbers,
    reshaped,
    row_of,
    strided,
)

from collage import backends
from collage.backends import BACKENDS, Noise, Region, Row, cpu, reference
from collage.formats import FORMATS, format_of, split
from collage.layout import zeros
from collage.rules import RULES
from collage.strategies import ARITHMETICS, STRATEGIES, Strategy

INSTRUCTIONS = cpu.native.instruction_sets()  # fails here if the kernels were not built: a fallback must hide nothing
NO_EPS, NO_DECAY = (0.0, 0.95, 0.0, 0.0), (0.0, 0.0)
CASES = [pytest.param(case, id=str(case)) for case in cases()]


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(cpu, "instruction_set", lambda: request.param)
    return cpu


@pytest.fixture(params=[*INSTRUCTIONS, pytest.param("triton", marks=pytest.mark.slow)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend under test, on one of its instruction sets."""
    yield from under_test(request.param, monkeypatch)


def under_test(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Triton's kernels, or those of the CPU on an instruction set."""
    if name == "triton":
        yield from interpreted()
    else:
        monkeypatch.setattr(cpu, "instruction_set", lambda: name)
        yield cpu


def interpreted() -> Iterator[Any]:
    """Triton's kernels under test. NumPy, which carries them out, warns of NaN and overflow."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        yield import_module("collage.backends.triton")


def device_of(backend: Any) -> str:
    """Where the kernels under test run."""
    return "cuda" if backend is not cpu and not backends.interpreted() else "cpu"


def assert_same(backend: Any, case: Case, rows: Sequence[Row], **settings: Any) -> None:
    """One step of the reference and of the kernels under test leave the same planes and sums.

    Steps that are not measured may have loops of their own; in Triton's interpreter, which is slow, they have not.
    """
    theirs = [copy_of(row) for row in rows]
    reference.step(batch_of(case, theirs, **settings))
    for measured in (True, False) if backend is cpu or not backends.interpreted() else (True,):
        ours = [copy_of(row, device_of(backend)) for row in rows]
        ours = ours if measured else [row._replace(sums=None) for row in ours]
        backend.step(batch_of(case, ours, **settings))
        assert_same_rows(ours, theirs)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CASES)
def test_every_rule_and_strategy_in_every_regime(case, regime, kernels):
    assert_same(kernels, case, [row_of(case, regime, 2100)])
    assert_same(kernels, case, [row_of(case, regime, 1100)], maximize=True, scale=1024.0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_other_settings(name, kernels):
    for rule, hyper in (("adamw", NO_EPS), ("adam", NO_EPS), ("sgd", (0.0,)), ("lion", (0.0, 0.0, 0.0))):
        case = case_of(name, rule)
        for regime in ("normal", "bits"):
            assert_same(kernels, case, [row_of(case, regime, 300)], hyper=hyper, maximize=True)


@pytest.mark.parametrize("case", CASES)
def test_every_size(case, kernels):
    """All tensors in one call, the empty one too, each at a step of its own."""
    assert_same(kernels, case, [row_of(case, "normal", n, step=1 + k % 3) for k, n in enumerate((0, *SIZES))])


def specs() -> list[Strategy]:
    """Every combination of formats, not only those with a name."""
    found = []
    for combination in itertools.product(FORMATS, FORMATS, FORMATS, ARITHMETICS):
        with contextlib.suppress(ValueError):  # it has no meaning
            found.append(Strategy(*combination))
    return found


@pytest.mark.parametrize(
    ("rule", "every"),
    [("adamw", 11), ("sgd_momentum", 47), ("adam_amsgrad", 61)]
    + [pytest.param(rule, 1, marks=pytest.mark.slow) for rule in ("adamw", "adam_amsgrad", "lion")],
)
def test_combinations_of_formats(rule, every, kernels):
    """Those without a fused kernel go block by block. A quick run takes one in some, of all formats in every slot."""
    known = specs()
    weights = (
        sum(fmt.dtypes[0].is_floating_point for fmt in FORMATS.values()) - 1
    )  # one has a meaning in bfloat16 arithmetic only
    moments = sum("+" not in name for name in FORMATS) - 2  # codes, nearest and stochastic, are for one of two roles
    assert len(known) == weights * moments**2 + 3 * 2 * 2
    for k, strategy in enumerate(known[::every]):
        regime, gradient = (("normal", None), ("bits", torch.float32))[k % 2]
        case = case_of(strategy, rule, gradient)
        assert_same(kernels, case, [row_of(case, regime, 300)])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_no_bit(threads, kernels, monkeypatch):
    """359 blocks give work to five threads, whose borders fall inside tensors; sums too are in one order."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for case in (case_of("collage-plus-sr"), case_of("fp32-states", "lion")):
        assert_same(kernels, case, [row_of(case, "normal", n) for n in (300_000, 5, 65_536, 1_000)])


STRIDED = [case_of("collage-plus-sr"), case_of("fp32-master"), case_of("stochastic", "sgd_momentum")]
STRIDED += [Case(RULES[rule], ONE_SLOT[rule][0], torch.float32, torch.bfloat16) for rule in ("average", "momentum")]


@pytest.mark.parametrize("kind", ["transposed", "spread"])
@pytest.mark.parametrize("which", ["all", "gradient"])
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_strides(case, which, kind, kernels):
    row = reshaped(row_of(case, "normal", 37 * 53), (37, 53))
    if which == "all":
        row = row._replace(slots=tuple(tuple(strided(p, kind) for p in planes) for planes in row.slots))
    if row.grad is not None:
        row = row._replace(grad=strided(row.grad, kind))
        assert not row.grad.is_contiguous()
    assert copy_of(row).slots[0][0].is_contiguous() == (which == "gradient")
    assert_same(kernels, case, [row])


REGIONS = [
    Region((70, 30), (5, 0), (30, 1)),  # rows: one run
    Region((70, 30), (0, 40), (100, 1)),  # columns: a run per row
    Region((70, 30), (2**32 // 100, 40), (100, 1)),  # beyond 32 bits
    Region((70, 30), ((2**32 - 1000) // 30, 7), (30, 1)),  # across them
    Region((2100,), (2**32 - 77,), (1,)),
    Region((7, 10, 30), (1, 2, 3), (5000, 100, 1)),
]


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("rule", ["adamw", "adamw_amsgrad", "sgd_momentum"])
def test_shards_draw_the_bits_of_the_whole(rule, region, kernels):
    case = case_of("stochastic", rule)
    assert_same(kernels, case, [reshaped(row_of(case, "normal", 2100), region.sizes, region)])


def test_nothing_beside_a_tensor_is_touched(kernels):
    """Every size up to two vectors and one, at odd addresses, between sentinels."""
    for case in (case_of("collage-plus"), case_of("stochastic", "sgd_momentum")):
        for n, shift in itertools.product(range(66), (0, 1, 3)):
            row = row_of(case, "normal", n)
            memory = [
                [torch.full((n + 80,), 77.0, dtype=p.dtype, device=device_of(kernels)) for p in planes]
                for planes in row.slots
            ]
            views = tuple(tuple(m[shift : shift + n] for m in planes) for planes in memory)
            for planes, own in zip(views, row.slots, strict=True):
                for view, plane in zip(planes, own, strict=True):
                    view.copy_(plane)
            grad = row.grad.to(device_of(kernels))
            kernels.step(batch_of(case, [row._replace(slots=views, grad=grad, sums=None)]))
            for m in itertools.chain.from_iterable(memory):
                assert (m[:shift] == 77).all()
                assert (m[shift + n :] == 77).all()


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_and_encoding(name, kernels):
    """Of several tensors at once, also strided ones; to nearest, and stochastically with the bits of their place."""
    fmt, device = format_of(name), device_of(kernels)
    for regime in REGIMES:
        values = [numbers(regime, n, k) for k, n in enumerate((0, 1, 33, 2100))]
        values.append(strided(numbers(regime, 1100, 9).view(11, 100), "transposed"))
        regions = [Region(tuple(x.shape), (7,) * x.dim(), (1000, 1)[-x.dim() :]) for x in values]
        for noise in (
            None,
            Noise("exp_avg_sq", 3, [5] * 5, range(5), regions),
            Noise("momentum_buffer", 3, [5] * 5, range(5)),
        ):
            found, wanted = ([zeros(fmt, x.to(d)) for x in values] for d in (device, "cpu"))
            kernels.encode(name, [x.to(device) for x in values], found, noise)
            reference.encode(name, values, wanted, noise)
            for k, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
                for plane, (x, y) in enumerate(zip(ours, theirs, strict=True)):
                    assert_same_bits(f"{regime}, tensor {k}, plane {plane}", x, y)
        decoded = [[torch.empty_like(x, device=d) for x in values] for d in (device, "cpu")]
        kernels.decode(name, found, decoded[0])
        reference.decode(name, wanted, decoded[1])
        for k, (x, y) in enumerate(zip(*decoded, strict=True)):
            assert_same_bits(f"{regime}, tensor {k}, decoded", x, y)


def test_encoding_in_the_reference_is_what_a_format_does():
    x = numbers("normal", 3000, 0).view(3, 1000)
    for name, fmt in FORMATS.items():
        for plane, wanted in zip(encoded(name, x), split(fmt, x), strict=True):
            assert_same_bits(name, plane, wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_broken_planes_are_counted(name, kernels):
    dtype, single = FORMATS[name].dtypes[0], len(FORMATS[name].planes) == 1
    for regime in REGIMES:
        if not FORMATS[name].elementwise:
            continue
        theta = [plane.to(device_of(kernels)) for plane in encoded(name, numbers(regime, 2100, 1))]
        assert kernels.broken(name, [theta]) == 0
        theta[0][5:2050:3] = numbers(regime, 682, 9).to(dtype).to(theta[0].device)
        theta[0][7:2050:9] = 0
        theta[-1][3:50] = -1.0
        wanted = reference.broken(name, [theta])
        assert wanted > 0 or single or regime not in ("normal", "tiny")
        assert kernels.broken(name, [theta]) == wanted, regime
        spread = [strided(plane.view(21, 100), "spread") for plane in theta]
        assert kernels.broken(name, [spread, theta]) == 2 * wanted


@pytest.mark.parametrize("name", ["bf16x2", "bf16+fp32", "bf16", "fp32", "bf16x3"])
def test_only_thetas_own_memory_is_read_for_broken_planes(name, instructions):
    """Empty and short tensors first: the tail of a long one lies beyond the memory of every other."""
    for sizes in itertools.permutations((0, 8, 64, 70_001, 3 * 41 * 101)):
        thetas = [encoded(name, numbers("normal", n, 1)) for n in sizes]
        assert instructions.broken(name, thetas) == 0


@pytest.mark.parametrize("rule", ["adamw", "average"])
def test_versions_are_counted(rule, kernels):
    """As by any in-place operation: autograd must notice weights that changed between forward and backward."""
    case = next(case for case in cases() if case.rule.name == rule)
    row = copy_of(row_of(case, "normal", 10), device_of(kernels))
    looked_at = [planes for slot, planes in zip(case.rule.slots, row.slots, strict=True) if not slot.written]
    before = row.slots[0][0]._version, [p._version for planes in looked_at for p in planes]
    kernels.step(batch_of(case, [row]))
    assert (row.slots[0][0]._version, [p._version for planes in looked_at for p in planes]) == (
        before[0] + 1,
        before[1],
    )


@pytest.mark.slow
def test_more_elements_than_31_bits():
    """2**31 + 5,000: the last ones are updated, and the stochastic bits beyond are those of their index."""
    n = 2**31 + 5_000
    case = case_of("stochastic")
    tail = row_of(case, "normal", 4096)
    start = n - 4096
    slots = tuple((torch.zeros(n, dtype=torch.bfloat16),) for _ in range(3))
    for (plane,), (end,) in zip(slots, tail.slots, strict=True):
        plane[start:] = end
    grad = torch.zeros(n, dtype=torch.bfloat16)
    grad[start:] = tail.grad
    cpu.step(batch_of(case, [Row(slots, grad, 3, tail.key)]))
    wanted = tail._replace(region=Region((4096,), (start,), (1,)), sums=None)
    reference.step(batch_of(case, [wanted]))
    for (plane,), (end,) in zip(slots, wanted.slots, strict=True):
        assert_same_bits("tail", plane[start:], end)


def test_backends_are_rows():
    assert backends.fastest(torch.device("cpu")) == "cpu"
    assert backends.fastest(torch.device("cuda")) == "triton"
    assert backends.fastest(torch.device("mps")) == "reference"
    assert list(BACKENDS) == ["cpu", "triton", "reference"]


def operation(name: str, formats: Sequence[str], gradient: str = "") -> Any:
    return cpu.native.Operation(cpu.instruction_set(), name, formats, gradient=gradient)


def test_lists_of_other_lengths_are_refused_by_the_kernels():
    x = torch.ones(8).bfloat16()
    own = [x.data_ptr()]
    with pytest.raises(ValueError, match="their number is not that of the tensors"):
        operation("broken", ["bf16"]).run([8, 8], own)
    with pytest.raises(ValueError, match="their number is not that of the tensors"):
        operation("stream", ["bf16"] * 3, "bf16").run([8], own * 3)
    whole = {"constants": [[0.0] * 9], "rows": [0]}
    for wrong in ({"rows": []}, {"rows": [1]}, {"constants": [[0.0] * 8]}, {"sums": [0, 0]}, {"layouts": [[], []]}):
        with pytest.raises(ValueError, match=r"number is not that|row of constants"):
            operation("adamw", ["bf16"] * 3, "bf16").run([8], own * 3, own, **{**whole, **wrong})
    assert (x == 1).all()


@pytest.mark.parametrize(
    ("name", "formats", "gradient"),
    [
        ("adamw", ["bf16"], "bf16"),  # too few slots
        ("adamw", ["bf16", "bf16", "bf17"], "bf16"),
        ("adamw", ["bf16"] * 3, ""),  # it reads a gradient
        ("average", ["bf16"] * 2, "bf16"),  # it reads none
        ("adamw", ["bf16"] * 3, "bf16x2"),
        ("adamv", ["bf16"] * 3, "bf16"),
    ],
)
def test_what_has_no_kernel_is_refused(name, formats, gradient):
    with pytest.raises(ValueError, match="no kernel"):
        operation(name, formats, gradient)
