"""Every backend computes the reference's bits: strategy x gradient x size x regime x instruction set x threads.

Triton's kernels run in its interpreter, which takes minutes for all of it: `make test-all`. A part: test_triton.py.
"""

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from oracle import assert_same_bits

from collage import backends
from collage.backends import Batch, Region, Share, cpu, reference
from collage.formats import FORMATS, split
from collage.rng import key_of
from collage.rules.adamw import ADAMW
from collage.strategies import ARITHMETICS, STRATEGIES, Strategy

HYPER = {"usual": (0.9, 0.999, 1e-8, 0.1), "no eps, no decay": (0.0, 0.95, 0.0, 0.0)}
SIZES = (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 1023, 1024, 1025, 2049, 40_001)
REGIMES = ("normal", "subnormal", "huge", "tiny", "zeros", "infinite", "nan", "bits")
UNDER_TEST: list[Any] = [cpu]  # the backend
INSTRUCTIONS = cpu.native.instruction_sets()  # fails here if the kernels were not built: a fallback must hide nothing


def numbers(regime: str, n: int, seed: int) -> torch.Tensor:
    """float32 numbers of a regime; in most others are mixed in, because a vector with one NaN goes another way."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    rare = torch.rand(n, generator=g) < 0.02
    if regime == "subnormal":
        return x * 2.0**-130
    if regime == "huge":
        return x.sign() * torch.rand(n, generator=g).add(0.6).mul(2.0**127)
    if regime == "tiny":
        return x * 1e-20
    if regime == "zeros":
        return torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0)
    if regime == "infinite":
        return torch.where(rare, x.sign() * torch.inf, x)
    if regime == "nan":
        return torch.where(rare, torch.nan, x)
    if regime == "bits":
        return torch.randint(-(2**31), 2**31, (n,), generator=g, dtype=torch.int64).to(torch.int32).view(torch.float32)
    return x


def share(strategy: Strategy, dtype: torch.dtype, regime: str, n: int, step: int = 3) -> Share:
    """A parameter in the middle of a run: planes that a format made of numbers of the regime."""
    variance = numbers(regime, n, 3).abs()
    slots = tuple(
        tuple(split(fmt, x))
        for fmt, x in zip(strategy.formats, (numbers(regime, n, 1), numbers(regime, n, 2), variance), strict=True)
    )
    grad = numbers(regime, n, 4).to(dtype)
    return Share(slots, grad, step, key_of("w"), sums=torch.zeros(5, dtype=torch.float64))


def copy_of(s: Share, device: str = "cpu") -> Share:
    """The same share in memory of its own, strides kept."""

    def copied(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)

    slots = tuple(tuple(map(copied, planes)) for planes in s.slots)
    return s._replace(slots=slots, grad=copied(s.grad), sums=None if s.sums is None else s.sums.clone())


def device() -> str:
    """Where the kernels under test run."""
    return "cuda" if UNDER_TEST[0] is not cpu and not backends.interpreted() else "cpu"


def batch_of(
    strategy: Strategy, shares: list[Share], hyper: str = "usual", maximize: bool = False, seed: int = 7
) -> Batch:
    """One step of these parameters, at lr 1e-3."""
    return Batch(
        ADAMW, strategy, 1e-3, HYPER[hyper], maximize, seed,
        planes=[plane for s in shares for planes in s.slots for plane in planes],
        grads=[s.grad for s in shares], steps=[s.step for s in shares], keys=[s.key for s in shares],
        regions=[s.region for s in shares if s.region is not None],
        sums=[s.sums for s in shares if s.sums is not None],
    )  # fmt: skip


def assert_same(strategy: Strategy, shares: list[Share], hyper: str = "usual", maximize: bool = False) -> None:
    """One step of the reference and of the kernels under test leave the same planes and sums."""
    ours, theirs = [copy_of(s, device()) for s in shares], [copy_of(s) for s in shares]
    reference.step(batch_of(strategy, theirs, hyper, maximize))
    UNDER_TEST[0].step(batch_of(strategy, ours, hyper, maximize))
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for slot, (mine, wanted) in enumerate(zip(a.slots, b.slots, strict=True)):
            for plane, (x, y) in enumerate(zip(mine, wanted, strict=True)):
                assert_same_bits(f"tensor {k}, slot {slot}, plane {plane}", x, y)
        if a.sums is not None:
            assert_same_bits(f"tensor {k}, sums", a.sums, b.sums)


def gradients(strategy: Strategy) -> Iterator[torch.dtype]:
    yield from dict.fromkeys((strategy.dtype, torch.float32))


GRID = [
    pytest.param(strategy, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, strategy in STRATEGIES.items()
    for dtype in gradients(strategy)
]


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "instruction_set", lambda: request.param)
    return request.param


@pytest.fixture(params=[*INSTRUCTIONS, pytest.param("triton", marks=pytest.mark.slow)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "triton":
        yield from interpreted()
    else:
        monkeypatch.setattr(cpu, "instruction_set", lambda: request.param)
        yield request.param


def interpreted() -> Iterator[str]:
    """Triton's kernels under test. NumPy, which carries them out, warns of NaN and overflow."""
    UNDER_TEST[0] = import_module("collage.backends.triton")
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        yield "triton"
    UNDER_TEST[0] = cpu


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("strategy", "dtype"), GRID)
def test_every_strategy_in_every_regime(strategy, dtype, regime, kernels):
    for hyper, maximize in itertools.product(HYPER, (False, True)):
        assert_same(strategy, [share(strategy, dtype, regime, 2100)], hyper, maximize)


@pytest.mark.parametrize(("strategy", "dtype"), GRID)
def test_every_size(strategy, dtype, kernels):
    """All tensors in one call, the empty one too, each at a step of its own."""
    assert_same(strategy, [share(strategy, dtype, "normal", n, step=1 + k % 3) for k, n in enumerate((0, *SIZES))])


def specs() -> Iterator[Strategy]:
    """Every combination of formats, not only those with a name."""
    for combination in itertools.product(FORMATS, FORMATS, FORMATS, ARITHMETICS):
        with contextlib.suppress(ValueError):  # it has no meaning
            yield Strategy(*combination)


def test_every_combination_of_formats(kernels):
    """Those without a row in csrc/strategies.hpp run on formats chosen at run time."""
    tried = 0
    for strategy in specs():
        for dtype, regime in zip(gradients(strategy), ("normal", "bits"), strict=False):
            assert_same(strategy, [share(strategy, dtype, regime, 300)])
        tried += 1
    assert tried == 7 * 6 * 6 + 3 * 2 * 2


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_no_bit(threads, kernels, monkeypatch):
    """359 blocks give work to five threads, whose borders fall inside tensors; sums too are in one order."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    strategy = STRATEGIES["collage-plus-sr"]
    assert_same(strategy, [share(strategy, torch.bfloat16, "normal", n) for n in (300_000, 5, 65_536, 1_000)])


def shard(strategy: Strategy, region: Region) -> Share:
    """A parameter of 2,100 elements that is that part of a larger one."""
    s = share(strategy, torch.bfloat16, "normal", 2100)
    slots = tuple(tuple(p.view(region.sizes) for p in planes) for planes in s.slots)
    return s._replace(slots=slots, grad=s.grad.view(region.sizes), region=region)


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The same numbers, transposed in memory, or every second element of more memory."""
    if kind == "transposed":
        return x.t().contiguous().t()
    wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("kind", ["transposed", "spread"])
@pytest.mark.parametrize("which", ["all", "gradient"])
@pytest.mark.parametrize("name", ["collage-plus-sr", "fp32-master"])
def test_strides(name, which, kind, kernels):
    strategy = STRATEGIES[name]
    s = share(strategy, torch.bfloat16, "normal", 37 * 53)
    slots = tuple(tuple(p.view(37, 53) for p in planes) for planes in s.slots)
    if which == "all":
        slots = tuple(tuple(strided(p, kind) for p in planes) for planes in slots)
    s = s._replace(slots=slots, grad=strided(s.grad.view(37, 53), kind))
    assert not s.grad.is_contiguous()
    assert copy_of(s).slots[0][0].is_contiguous() == (which == "gradient")
    assert_same(strategy, [s])


@pytest.mark.parametrize(
    "region",
    [
        Region((70, 30), (5, 0), (30, 1)),  # rows: one run
        Region((70, 30), (0, 40), (100, 1)),  # columns: a run per row
        Region((70, 30), (2**32 // 100, 40), (100, 1)),  # beyond 32 bits
        Region((70, 30), ((2**32 - 1000) // 30, 7), (30, 1)),  # across them
        Region((2100,), (2**32 - 77,), (1,)),
        Region((7, 10, 30), (1, 2, 3), (5000, 100, 1)),
    ],
)
def test_shards_draw_the_bits_of_the_whole(region, kernels):
    assert_same(STRATEGIES["stochastic"], [shard(STRATEGIES["stochastic"], region)])


def test_nothing_beside_a_tensor_is_touched(kernels):
    """Every size up to two vectors and one, at odd addresses, between sentinels."""
    strategy = STRATEGIES["collage-plus"]
    for n, shift in itertools.product(range(66), (0, 1, 3)):
        s = share(strategy, torch.bfloat16, "normal", n)
        memory = [[torch.full((n + 80,), 77.0, dtype=p.dtype, device=device()) for p in planes] for planes in s.slots]
        views = tuple(tuple(m[shift : shift + n] for m in planes) for planes in memory)
        for planes, own in zip(views, s.slots, strict=True):
            for view, plane in zip(planes, own, strict=True):
                view.copy_(plane)
        UNDER_TEST[0].step(batch_of(strategy, [s._replace(slots=views, grad=s.grad.to(device()), sums=None)]))
        for m in itertools.chain.from_iterable(memory):
            assert (m[:shift] == 77).all()
            assert (m[shift + n :] == 77).all()


@pytest.mark.parametrize("name", ["collage-plus", "fp32-master", "kahan", "bf16"])
def test_broken_planes_are_counted(name, instructions):
    strategy = STRATEGIES[name]
    for regime in REGIMES:
        theta = share(strategy, torch.bfloat16, regime, 2100).slots[0]
        assert cpu.broken(strategy, [theta]) == 0
        theta[0][5:2050:3] = numbers(regime, 682, 9).bfloat16()
        theta[0][7:2050:9] = 0
        wanted = reference.broken(strategy, [theta])
        assert wanted > 0 or name == "bf16" or regime != "normal"
        assert cpu.broken(strategy, [theta]) == wanted, regime


@pytest.mark.parametrize("name", ["collage-plus", "fp32-master", "bf16", "fp32"])
def test_only_thetas_own_memory_is_read_for_broken_planes(name, instructions):
    """Empty and short tensors first: the tail of a long one lies beyond the memory of every other."""
    strategy = STRATEGIES[name]
    for sizes in itertools.permutations((0, 8, 64, 70_001, 3 * 41 * 101)):
        thetas = [share(strategy, strategy.dtype, "normal", n).slots[0] for n in sizes]
        assert cpu.broken(strategy, thetas) == 0


def test_lists_of_other_lengths_are_refused_by_the_kernels():
    def kernel(name: str) -> Any:
        return cpu.native.Operation(cpu.instruction_set(), name, ["bf16"] * 3, gradient="bf16")

    x = torch.ones(8).bfloat16()
    own = [x.data_ptr()]
    rest = {"constants": [[0.0] * 9], "rows": [0]}
    with pytest.raises(ValueError, match="their number is not that of the tensors"):
        cpu.native.Operation(cpu.instruction_set(), "broken", ["bf16"]).run([8, 8], own)
    with pytest.raises(ValueError, match="their number is not that of the tensors"):
        kernel("stream").run([8], own * 3)
    for wrong in ({"rows": []}, {"rows": [1]}, {"constants": [[0.0] * 8]}, {"sums": [0, 0]}, {"layouts": [[], []]}):
        with pytest.raises(ValueError, match=r"number is not that|row of constants"):
            kernel("adamw").run([8], own * 3, own, **{**rest, **wrong})
    for name, formats in (("adamw", ["bf16"]), ("adamw", ["bf16", "bf16", "bf17"]), ("adamv", ["bf16"] * 3)):
        with pytest.raises(ValueError, match="no kernel"):
            cpu.native.Operation(cpu.instruction_set(), name, formats, gradient="bf16")


def test_versions_are_counted():
    """As by any in-place operation: autograd must notice weights that changed between forward and backward."""
    s = share(STRATEGIES["collage-light"], torch.bfloat16, "normal", 10)
    before = [p._version for planes in s.slots for p in planes]
    cpu.step(batch_of(STRATEGIES["collage-light"], [s]))
    assert [p._version for planes in s.slots for p in planes] == [v + 1 for v in before]


@pytest.mark.slow
def test_more_elements_than_31_bits():
    """2**31 + 5,000: the last ones are updated, and the stochastic bits beyond are those of their index."""
    n = 2**31 + 5_000
    strategy = STRATEGIES["stochastic"]
    tail = share(strategy, torch.bfloat16, "normal", 4096)
    start = n - 4096
    slots = tuple((torch.zeros(n, dtype=torch.bfloat16),) for _ in range(3))
    for (plane,), (end,) in zip(slots, tail.slots, strict=True):
        plane[start:] = end
    grad = torch.zeros(n, dtype=torch.bfloat16)
    grad[start:] = tail.grad
    cpu.step(batch_of(strategy, [Share(slots, grad, 3, tail.key)]))
    wanted = tail._replace(region=Region((4096,), (start,), (1,)), sums=None)
    reference.step(batch_of(strategy, [wanted]))
    for (plane,), (end,) in zip(slots, wanted.slots, strict=True):
        assert_same_bits("tail", plane[start:], end)
