"""Sums of the squares of gradients: the reference against exact rationals, and every backend against the reference."""

import itertools
import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers import REGIMES, assert_same_bits, numbers, strided
from test_backends import INSTRUCTIONS, device_of, interpreted, operation, under_test
from torch import Tensor

from collage.backends import cpu, reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (*range(66), 1000, 1023, 1024, 1025, 2047, 2048, 2049, 40_001)
FEW = (0, 1, 33, 1023, 1024, 1025, 2500)  # in the interpreter, which is slow


@pytest.fixture(params=[*INSTRUCTIONS, "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend under test, on one of its instruction sets."""
    yield from under_test(request.param, monkeypatch)


def assert_same(backend: Any, grads: list[Tensor]) -> None:
    """The sums of the reference; strides are kept."""
    moved = [g.to(device_of(backend), memory_format=torch.preserve_format) for g in grads]
    found = backend.squares(moved)
    assert found.device == moved[0].device
    assert_same_bits("sums of squares", found, reference.squares(grads))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_size(regime, dtype, kernels):
    sizes = SIZES if kernels is cpu else FEW
    assert_same(kernels, [numbers(regime, n, n).to(dtype) for n in sizes])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_a_tensor_counts(dtype, kernels):
    """At odd addresses, between NaN."""
    grads = []
    for n, shift in itertools.product((1, 31, 32, 33, 65, 1024, 1025) if kernels is cpu else (1, 1024), (0, 1, 3)):
        memory = torch.full((n + 80,), torch.nan, dtype=dtype)
        grads.append(memory[shift : shift + n].copy_(numbers("normal", n, n)))
    assert_same(kernels, grads)
    assert kernels.squares([g.to(device_of(kernels)) for g in grads]).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_count_in_the_order_of_rows(dtype, kernels):
    """Whatever the strides: transposed, spread, one element for all, permuted, of no dimension."""
    x = numbers("normal", 37 * 53, 1).to(dtype).view(37, 53)
    cube = numbers("normal", 5 * 7 * 40, 2).to(dtype).view(5, 7, 40)
    grads = [strided(x, "transposed"), strided(x, "spread"), x[:1].expand(30, 53), x[0, 0], x[0, 0].expand(1500)]
    grads += [cube.permute(2, 0, 1), cube[:, ::3, 1:], x[:0].t()]
    assert_same(kernels, grads)
    assert_same_bits("contiguous", reference.squares(grads), reference.squares([g.contiguous() for g in grads]))


def test_another_order_is_another_sum():
    """So the comparisons here would see one."""
    grads = [numbers("normal", 37 * 53, k).view(37, 53) for k in range(20)]
    assert (reference.squares(grads) != reference.squares([g.t() for g in grads])).sum() > 5


def test_many_tensors_of_all_dtypes(kernels):
    count = 2000 if kernels is cpu else 40
    assert_same(kernels, [numbers("normal", 3 * k % 50, k).to(DTYPES[k % 3]) for k in range(count)])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_no_bit(threads, monkeypatch):
    """359 blocks give work to five threads, whose borders fall inside tensors."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_same(cpu, [numbers("normal", n, n).bfloat16() for n in (300_000, 5, 65_536, 1_000)])


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_more_blocks_than_are_summed_at_once(name, monkeypatch):
    """2**20 elements and more: their sums of 1,024 blocks are added in turn."""
    monkeypatch.setattr(cpu, "instruction_set", lambda: name)
    assert_same(cpu, [numbers("normal", n, n) for n in (2_100_000, 2**20, 7)])


def test_more_sums_of_blocks_than_triton_adds_at_once():
    """A number is the root of its block's sum."""
    roots = [numbers("normal", n, n) for n in (2050, 1, 1024)]
    first = torch.tensor([0, 2050, 2051, 3075])
    for triton in interpreted():
        sums, found = torch.cat(roots).double().square(), torch.zeros(3, dtype=torch.float64)
        triton.add_up_halved[(3,)](sums.to(device_of(triton)), first.to(device_of(triton)), found.to(device_of(triton)))
        in_blocks = [torch.zeros(root.numel(), 1024).index_copy_(1, torch.tensor([0]), root[:, None]) for root in roots]
        assert_same_bits("sums", found, reference.squares(in_blocks))


def test_of_nothing(kernels):
    assert_same_bits("none", kernels.squares([]), torch.zeros(0, dtype=torch.float64))
    empty = [torch.zeros(0, 5), torch.zeros(3, 0)]
    assert_same_bits("empty", kernels.squares([g.to(device_of(kernels)) for g in empty]), torch.zeros(2).double())


def test_a_gradient_is_neither_written_nor_followed(kernels):
    g = torch.ones(1500, device=device_of(kernels), requires_grad=True)
    for backend in (kernels, reference):
        assert not backend.squares([g, g.t()]).requires_grad
    assert g._version == 0


def exact(x: Tensor) -> Fraction:
    return sum((Fraction(number) ** 2 for number in x.double().tolist()), Fraction(0))


def within(found: float, x: Tensor) -> bool:
    """The contract's bound: squares are exact, and a number is in 20 sums at most, and one more for each 2**20."""
    want = exact(x)
    return abs(Fraction(found) - want) <= want * (20 + Fraction(x.numel(), 2**20)) / 2**53


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", ["normal", "subnormal", "huge", "tiny", "zeros", "bits"])
def test_the_sum_is_nearly_exact(regime, dtype):
    for n in (1, 2, 3, 1025, 20_000):
        x = numbers(regime, n, n).to(dtype)
        x = x.where(x.isfinite(), 0)
        (found,) = reference.squares([x]).tolist()
        assert within(found, x)
        assert not within(found * (1 + 2.0**-45), x) or exact(x) == 0


def test_each_square_is_exact_at_both_ends_of_the_range():
    for bits in (1, 0x7FFFFF, 0x800000, 0x7F7FFFFF):  # the least and largest subnormal and normal
        x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        assert Fraction(reference.squares([x]).item()) == exact(x) > 0


def test_the_order_is_the_one_that_is_written_down():
    """In plain Python: blocks halved pairwise, their sums likewise, and those in turn."""

    def halved(terms: list[float]) -> Iterator[float]:
        for first in range(0, len(terms), 1024):
            block = terms[first : first + 1024]
            block += [0.0] * (1024 - len(block))
            while len(block) > 1:
                block = [a + b for a, b in zip(block[: len(block) // 2], block[len(block) // 2 :], strict=True)]
            yield block[0]

    for n in (5, 3000, 1_050_000):
        x = numbers("normal", n, n)
        total = 0.0
        for part in halved(list(halved([a * a for a in x.tolist()]))):
            total += part
        assert reference.squares([x]).item() == total


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_finite_exactly_if_every_element_is(dtype, kernels):
    device, draw = device_of(kernels), random.Random(1)
    for n in (1, 1025) if kernels is not cpu else (1, 33, 1024, 2500):
        good = torch.full((n,), torch.finfo(dtype).max, dtype=dtype, device=device)
        grads = [good, -good, torch.tensor([math.inf, -math.inf], dtype=dtype, device=device)]
        for place, wrong in itertools.product({0, n - 1, draw.randrange(n)}, (math.nan, math.inf, -math.inf)):
            grads.append(good.clone())
            grads[-1][place] = wrong
        finite = kernels.squares([*grads, good]).isfinite().tolist()
        assert finite == [True, True, *[False] * (len(grads) - 2), True]


def test_what_the_kernels_cannot_do_is_refused():
    x = torch.ones(8).bfloat16()
    with pytest.raises(ValueError, match="sums: their number is not that of the tensors"):
        operation("squares", ["bf16"]).run([8], [x.data_ptr()])
    with pytest.raises(ValueError, match="no kernel for 'squares'"):
        operation("squares", ["bf16x2"])
