"""What many tests use: numbers of every regime, rows and batches of every rule, and one comparison of bits."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from oracle import codes
from torch import Tensor

from collage.backends import Batch, Region, Row, reference
from collage.formats import format_of
from collage.layout import zeros
from collage.rng import key_of
from collage.rules import RULES, Rule
from collage.strategies import STRATEGIES, Strategy

SIZES = (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 1023, 1024, 1025, 2049, 40_001)
REGIMES = ("normal", "subnormal", "huge", "tiny", "zeros", "infinite", "nan", "bits")
# Strategies whose weights any parameter can be; those of e4m3 ones belong to a module (test_fp8.py).
BARE = {name: strategy for name, strategy in STRATEGIES.items() if strategy.beside is strategy}
ONES = 0xFFFF  # the largest random bits
NUMBERS = {"betas": (0.9, 0.999), "eps": (1e-8,), "weight_decay": (0.1,), "momentum": (0.9,), "dampening": (0.3,)}
NUMBERS |= {"decay": (0.99,), "weight": (0.25,)}  # the usual settings


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


def random_bits(x: Tensor, seed: int = 9) -> Tensor:
    """For a stochastic encoding, some of them the smallest and the largest."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 1 << 16, x.shape, generator=g, dtype=torch.int32)
    kind = torch.randint(0, 8, x.shape, generator=g)
    return torch.where(kind == 0, 0, torch.where(kind == 1, ONES, bits))


def drawn(name: str, x: Tensor) -> Iterator[Tensor | None]:
    """What an encoding may be given: nothing, or the smallest, the largest and other bits."""
    yield None
    if format_of(name).stochastic:
        yield from (torch.full(x.shape, k, dtype=torch.int32) for k in (0, ONES))
        yield random_bits(x)


class Case(NamedTuple):
    """A rule, the formats of its slots, the arithmetic, and the dtype of gradients."""

    rule: Rule
    formats: tuple[str, ...]
    register: torch.dtype
    gradient: torch.dtype

    def __str__(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return f"{self.rule.name}-{'-'.join(self.formats)}-{short[self.register]}-g{short[self.gradient]}"


def case_of(strategy: str | Strategy, rule: str = "adamw", gradient: torch.dtype | None = None) -> Case:
    """A rule under a strategy; by default with gradients of the parameter's dtype, or bf16 of 8-bit ones."""
    known = Strategy.parse(strategy)
    usual = known.dtype if known.dtype.itemsize > 1 else torch.bfloat16
    return Case(RULES[rule], known.formats(RULES[rule].roles), known.register, gradient or usual)


ONE_SLOT = {
    "average": [
        *itertools.product(("bf16x2:sr", "bf16x3", "fp32"), ("bf16x2", "bf16+fp32", "bf16+kahan", "fp16")),
        ("bf16x2:sr", "bf16+int16"),
        ("fp32", "bf16+int8:sr"),
        ("bf16+int8:sr", "fp16+int8:sr"),
        ("bf16+int16", "fp32"),
    ],
    "accumulate": [
        *(("fp32",), ("bf16",), ("bf16x2",), ("bf16x2:sr",), ("bf16x3:sr",), ("fp16x2",), ("fp16:sr",)),
        *(("bf16+int16",), ("bf16+int8",), ("bf16+int8:sr",), ("fp16+int8",), ("fp16+int8:sr",)),
    ],
    "assign": [(name,) for name in dict.fromkeys(s.param for s in STRATEGIES.values()) if name != "bf16+kahan"],
    "momentum": [("bf16", "bf16"), ("bf16x2", "fp32"), ("fp32", "bf16"), ("bf16:sr", "fp16"), ("int8/128:sr", "fp32")],
    "momentum_nesterov": [("bf16", "bf16"), ("bf16x2:sr", "fp32"), ("int8/128", "bf16"), ("int8/128:sr", "bf16")],
}


def cases() -> Iterator[Case]:
    """Every rule under every strategy, or in the formats of ONE_SLOT, with the gradients that it may be given."""
    for rule in (rule for rule in RULES.values() if rule.elementwise):
        for formats in ONE_SLOT.get(rule.name, ()):
            yield Case(rule, formats, torch.float32, torch.float32 if rule.name == "assign" else torch.bfloat16)
        for name in STRATEGIES if rule.name not in ONE_SLOT else ():
            case = case_of(name, rule.name)
            yield case
            if rule.name == "adamw" and case.gradient != torch.float32:
                yield case._replace(gradient=torch.float32)


def encoded(name: str, x: Tensor) -> tuple[Tensor, ...]:
    """Planes that hold float32 numbers of any shape."""
    planes = zeros(format_of(name), x)
    reference.encode(name, [x], [planes])
    return tuple(planes)


def row_of(case: Case, regime: str, n: int, step: int = 3, shape: tuple[int, ...] | None = None) -> Row:
    """A parameter in the middle of a run: planes that a format made of numbers of the regime. By default one row."""
    slots = []
    if shape is None:
        shape = (n,) if all(format_of(name).elementwise for name in case.formats) else (1, n)
    for k, (slot, name) in enumerate(zip(case.rule.slots, case.formats, strict=True)):
        x = numbers(regime, n, k + 1).view(shape)
        slots.append(encoded(name, x.abs() if slot.role == "variance" else x))
    grad = numbers(regime, n, 4).view(shape).to(case.gradient) if case.rule.gradient else None
    sums = torch.zeros(5, dtype=torch.float64) if case.rule.has_delta else None
    return Row(tuple(slots), grad, step, key_of("w"), sums=sums)


def copy_of(row: Row, device: str = "cpu") -> Row:
    """The same row in memory of its own, strides kept."""

    def copied(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)

    slots = tuple(tuple(map(copied, planes)) for planes in row.slots)
    grad = None if row.grad is None else copied(row.grad)
    return row._replace(slots=slots, grad=grad, sums=None if row.sums is None else row.sums.clone())


def batch_of(
    case: Case, rows: Sequence[Row], maximize: bool = False, hyper: Sequence[float] | None = None, **more: object
) -> Batch:
    """One step of these parameters, at lr 1e-3 and the usual settings."""
    usual = [x for setting in case.rule.settings for x in NUMBERS[setting.name]]
    return Batch(
        case.rule, case.formats, case.register, 1e-3, usual if hyper is None else hyper, maximize, 7,
        planes=[plane for row in rows for planes in row.slots for plane in planes],
        grads=[row.grad for row in rows if row.grad is not None], steps=[row.step for row in rows],
        keys=[row.key for row in rows], regions=[row.region for row in rows if row.region is not None],
        sums=[row.sums for row in rows if row.sums is not None], **more,
    )  # fmt: skip


def reshaped(row: Row, shape: tuple[int, ...], region: Region | None = None) -> Row:
    """The same row in another shape, perhaps part of a larger tensor."""
    slots = tuple(tuple(p.view(shape) for p in planes) for planes in row.slots)
    return row._replace(slots=slots, grad=None if row.grad is None else row.grad.view(shape), region=region)


def strided(x: Tensor, kind: str) -> Tensor:
    """The same numbers, transposed in memory, or every second element of more memory."""
    if kind == "transposed":
        return x.t().contiguous().t()
    wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


def assert_same_rows(ours: Sequence[Row], theirs: Sequence[Row]) -> None:
    """Every plane and every sum."""
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for slot, (mine, wanted) in enumerate(zip(a.slots, b.slots, strict=True)):
            for plane, (x, y) in enumerate(zip(mine, wanted, strict=True)):
                assert_same_bits(f"tensor {k}, slot {slot}, plane {plane}", x, y)
        if a.sums is not None and b.sums is not None:
            assert_same_bits(f"tensor {k}, sums", a.sums, b.sums)


def ordered(x: Tensor) -> Tensor:
    """int64, increasing with the number, adjacent floats adjacent; -0 is just below +0."""
    bits = codes(x)
    if not x.dtype.is_floating_point:
        return x.to(torch.int64)
    sign = 1 << (8 * x.dtype.itemsize - 1)
    return (
        torch.where(bits >= sign, sign - 1 - bits, bits) if x.dtype.itemsize < 8 else bits ^ ((bits >> 63) & (sign - 1))
    )


def assert_same_bits(name: str, got: Tensor, want: Tensor) -> None:
    """Raise AssertionError unless got and want are the same bits. NaN equals NaN; +0 and -0 differ."""
    head = f"{name}: got {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
    if got.dtype != want.dtype or got.shape != want.shape:
        raise AssertionError(head)
    got, want = got.detach().cpu().contiguous().flatten(), want.detach().cpu().contiguous().flatten()
    same = codes(got) == codes(want)
    if want.dtype.is_floating_point:
        same |= got.isnan() & want.isnan()
    wrong = (~same).nonzero().flatten().tolist()
    if wrong:
        i, digits = wrong[0], 2 * want.dtype.itemsize
        a, b = codes(got[i : i + 1]).item(), codes(want[i : i + 1]).item()
        mask = (1 << 4 * digits) - 1
        apart = (ordered(got[i : i + 1]) - ordered(want[i : i + 1])).item()
        raise AssertionError(
            f"{name}: {len(wrong)} of {want.numel()} differ, the first at {i}: got 0x{a & mask:0{digits}x} "
            f"({got[i].item()}), want 0x{b & mask:0{digits}x} ({want[i].item()}), {apart:+d} ulp"
        )


def planes_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter of an optimizer, and every tensor of its states, by position and key."""
    found: dict[str, Tensor] = {}
    for k, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found[f"{k}"] = p.detach()
        found |= {f"{k}.{key}": value for key, value in optimizer.state.get(p, {}).items()}
    return found


def assert_same_planes(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Each bit of what `planes_of` found."""
    assert got.keys() == want.keys()
    for key in want:
        assert_same_bits(key, got[key], want[key])


def assert_each(name: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Each bit of every plane of a number."""
    for k, (x, y) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(f"{name}, plane {k}", x, y)


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Every setting of every group, and how many parameters it has."""
    return [{**group, "params": len(group["params"])} for group in optimizer.param_groups]


@contextmanager
def refused(optimizer: torch.optim.Optimizer, error: type[BaseException], match: str) -> Iterator[None]:
    """An error that says why, and that leaves weights, states, settings and what monitors have seen as they were."""
    planes = copy.deepcopy(planes_of(optimizer))
    settings = copy.deepcopy(settings_of(optimizer))
    reports = [monitor.report() for monitor in getattr(optimizer, "monitors", ())]
    with pytest.raises(error) as caught:
        yield
    assert re.search(match, str(caught.value)), f"{match!r} not in: {caught.value}"
    assert_same_planes(planes_of(optimizer), planes)
    assert settings_of(optimizer) == settings
    assert [monitor.report() for monitor in getattr(optimizer, "monitors", ())] == reports
