"""Moments: how far stored m and v, and the updates that come of them, are from float64's under the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.harness.bench.accuracy.held import Held

EPS, LR, STD = 1e-8, 1.0, 1e-3
BETAS = ((0.9, 0.9), (0.95, 0.95), (0.98, 0.98), (0.9, 0.99), (0.9, 0.995), (0.9, 0.999))
STEADY, DROPPED = 3, 6  # times 1 / (1 - beta2) steps, at first and then with gradients a tenth as large
LEAST = 200  # steps of either
WINDOW = 100  # steps whose updates are looked at, at most: the last ones before the drop
ROWS, COLUMNS = 4, 256  # of a scenario: whole blocks of every format here
EVERY = 32  # one element in so many is an outlier: one in every block
OUTLIERS = (1e2, 1e3, 1e4)  # times as large as its mates


class Scenario(NamedTuple):
    """Gradients of some rows, times STD: N(0, noise**2), and constants from fixed / 10 to fixed of either sign.

    A share of the rows and of the elements is 0, others at every step. One element in EVERY is an outlier; all elements
    are e**N(0, mixed**2) times as large.
    """

    name: str
    noise: float = 1.0
    fixed: float = 0.0
    zero_rows: float = 0.0
    zeros: float = 0.0
    outlier: float = 1.0
    mixed: float = 0.0


SCENARIOS = (
    Scenario("dense"),
    Scenario("constant", noise=0.0, fixed=1.0),
    Scenario("sparse rows", zero_rows=0.9),
    Scenario("sparse", zeros=0.9),
    Scenario("mixed", mixed=1.0),
    *(Scenario(f"mates {k:g}", outlier=k) for k in OUTLIERS),
)
CONSTANT = 1  # which of them
SHAPE = (len(SCENARIOS) * ROWS, COLUMNS)


class Gradients:
    """A stream of them, all scenarios in one tensor, the same for everyone."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(0)
        numbers = list(zip(*SCENARIOS, strict=True))[1:]
        noise, fixed, self.zero_rows, self.zeros, outlier, mixed = map(_per_row, numbers)
        normal = torch.empty(SHAPE).normal_(generator=self.rng)
        size = STD * torch.exp(mixed * normal)
        size[:, ::EVERY] *= outlier
        self.noise = noise * size
        self.fixed = fixed * size * normal.sign() * 10.0 ** -torch.rand(SHAPE, generator=self.rng)
        self.fixed[1::2] = -self.fixed[::2]  # torchao's codes are not symmetric

    def draw(self, scale: float) -> Tensor:
        """[rows, columns] float32, numbers that bfloat16 has."""
        g = self.fixed + self.noise * torch.empty(SHAPE).normal_(generator=self.rng)
        element, row = torch.rand(SHAPE, generator=self.rng), torch.rand(SHAPE[0], 1, generator=self.rng)
        there = (element >= self.zeros) & (row >= self.zero_rows)
        return torch.where(there, g * scale, 0.0).bfloat16().float()


def _per_row(numbers: Sequence[Any]) -> Tensor:
    """One number for each scenario -> [rows, 1]."""
    return torch.tensor(numbers, dtype=torch.float32).repeat_interleave(ROWS)[:, None]


class Truth:
    """Adam in float64."""

    def __init__(self, betas: tuple[float, float]) -> None:
        self.m, self.v = torch.zeros(2, *SHAPE, dtype=torch.float64)
        self.betas, self.steps = betas, 0

    def step(self, grad: Tensor) -> Tensor:
        """The update."""
        g, (beta1, beta2) = grad.double(), self.betas
        self.steps += 1
        self.m = beta1 * self.m + (1.0 - beta1) * g
        self.v = beta2 * self.v + (1.0 - beta2) * g * g
        m, v = self.m / (1.0 - beta1**self.steps), self.v / (1.0 - beta2**self.steps)
        update: Tensor = -LR * m / (v.sqrt() + EPS)
        return update


class Updates:
    """Sums over the updates of a window, by scenario."""

    def __init__(self) -> None:
        self.error, self.norm, self.largest = torch.zeros(3, len(SCENARIOS), dtype=torch.float64)

    def add(self, update: Tensor, true: Tensor) -> None:
        self.error += looked_at((update - true).square()).sum(1)
        self.norm += looked_at(true.square()).sum(1)
        self.largest = self.largest.maximum(looked_at(update.double().abs()).amax(1))

    def found(self, at: str) -> dict[str, float]:
        return keyed("error", at, (self.error / self.norm).sqrt()) | keyed("largest", at, self.largest)


def looked_at(x: Tensor) -> Tensor:
    """[rows, columns] -> [scenarios, elements], without the columns where a scenario may have an outlier."""
    return x.view(len(SCENARIOS), -1, EVERY)[..., 1:].flatten(1)


def keyed(what: str, at: str, numbers: Tensor) -> dict[str, float]:
    """One number for each scenario, by "what scenario at"."""
    return {f"{what} {s.name} {at}": float(x) for s, x in zip(SCENARIOS, numbers, strict=True)}


def look(held: Held, truth: Truth, at: str) -> dict[str, float]:
    """Of m rms error / rms, and of a constant one stored / true; of v stored / true. Means over elements."""
    m, true = looked_at(held.value("exp_avg").double()), looked_at(truth.m)
    v, wanted = looked_at(held.value("exp_avg_sq").double()), looked_at(truth.v)
    error = ((m - true).square().sum(1) / true.square().sum(1)).sqrt()
    ratio = torch.where(wanted == 0, torch.nan, v / wanted).nanmean(1)
    kept = float((m[CONSTANT] / true[CONSTANT]).mean())
    return {f"m constant {at}": kept, **keyed("m error", at, error), **keyed("v", at, ratio)}


def phases(betas: tuple[float, float]) -> tuple[int, int]:
    """Steps before the drop and after it."""
    steady, dropped = (max(LEAST, round(times / (1.0 - betas[1]))) for times in (STEADY, DROPPED))
    return steady, dropped


def measure(
    makers: Mapping[str, Callable[..., Held]], betas: tuple[float, float], tick: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """What all lose side by side: name -> "what scenario beta2" -> number; " dropped" behind it after the drop."""
    at, hyper = f"{betas[1]:g}", (*betas, EPS, 0.0)
    held = {name: make(torch.zeros(SHAPE), LR, hyper) for name, make in makers.items()}
    found: dict[str, dict[str, float]] = {name: {} for name in held}
    gradients, truth, updates = Gradients(), Truth(betas), {name: Updates() for name in held}
    steady, dropped = phases(betas)
    first = max(steady - WINDOW, steady // 2)
    for step in range(steady + dropped):
        grad = gradients.draw(1.0 if step < steady else 0.1)
        true = truth.step(grad)
        for name, own in held.items():
            if first <= step < steady:
                own.restart()
            own.step(grad)
            if first <= step < steady:
                updates[name].add(own.value("param").double(), true)
            if step + 1 in (steady, steady + dropped):
                found[name] |= look(own, truth, at if step < steady else f"{at} dropped")
        tick()
    return {name: own | updates[name].found(at) for name, own in found.items()}
