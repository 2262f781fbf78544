"""The rehearsal: the real optimizer on a sample of a model's own weights, under every strategy, on made-up gradients.

Nothing is derived from a formula. Every strategy is a parameter group of one `collage.AdamW`, is given the same
gradients, and is compared with float32 by how far its weights have moved. The gradient of a weight is a drift that
stays and noise, both of the same size, so that updates are as large and as steady as those of real runs: on these
gradients bf16 delivers the share of its updates that it delivers when a small Llama is fine-tuned. Weights of a
row have gradients of different sizes, and all of them fall, so that the second moment has to come down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from collage.formats import format_of
from collage.optimizers.adamw import AdamW
from collage.optimizers.parameters import Parameter
from collage.strategies import Strategy

LONGEST = 1000  # steps
REFERENCE = Strategy("fp32", "fp32", "fp32")
FALL = 0.3  # of the gradients, from the first step to the last
SIZE, SPREAD = 1e-3, 1.0  # of a gradient: median, and standard deviation of its logarithm
EPS = 1e-8
STEADY = 0.05  # share of their size that weights move until their gradients have another drift
TINY = 1e-6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of AdamW. lr: in the beginning, from where it falls to final_lr along a cosine.

    steps: of the run that is planned; the rehearsal makes LONGEST of them at most, with the same beginning and end.
    """

    lr: float
    final_lr: float
    weight_decay: float
    betas: tuple[float, float]
    steps: int

    @property
    def rehearsed(self) -> int:
        return min(self.steps, LONGEST)

    @property
    def decayed(self) -> float:
        """The share of itself that decay takes from a weight in the whole run."""
        return self.steps * self.weight_decay * (self.lr + self.final_lr) / 2

    def lr_at(self, done: float) -> float:
        """Of a share of the run that is done."""
        return self.final_lr + (self.lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Moved:
    """What became of some weights under a strategy, beside float32. None: there are no such weights.

    arrived: of float32's movement, as much as was made in its direction. off: |movement - float32's| / |float32's|.
    noise: |movement - float32's| / |weights|.
    """

    arrived: float
    off: float
    noise: float


@dataclass(frozen=True)
class Rehearsed:
    """What a strategy did.

    matrices, vectors: of weights with two dimensions, and of norms and biases; None: there are none.
    decay: of float32's decay the share that arrived; None: none was asked for.
    v_ratio: mean of the second moment over float32's, at the end.
    haste: lr over the size of a weight.
    """

    matrices: Moved | None
    vectors: Moved | None
    decay: float | None
    v_ratio: float
    haste: float

    @property
    def main(self) -> Moved:
        """Of the matrices, or where there are none of what there is."""
        found = self.matrices or self.vectors
        assert found is not None  # nothing is rehearsed without weights
        return found


def rehearse(samples: Sequence[Tensor], strategies: Sequence[Strategy], settings: Settings) -> list[Rehearsed]:
    """Step samples of a model's weights (runs of its matrices, numbers of its vectors) under every strategy."""
    stage = _Stage(samples, (REFERENCE, *strategies), settings)
    stage.run()
    return [stage.judged(k) for k in range(1, len(strategies) + 1)]


class _Cast:
    """Every strategy as a group of one optimizer, with its own copy of the samples."""

    def __init__(
        self, samples: Sequence[Tensor], strategies: Sequence[Strategy], settings: Settings, decay: float
    ) -> None:
        self.settings, self.each = settings, len(samples)
        groups = [{"params": _copies(k, samples, own.dtype), "strategy": own} for k, own in enumerate(strategies)]
        self.optimizer = AdamW(groups, lr=settings.lr, betas=settings.betas, eps=EPS, weight_decay=decay)
        self.parameters = list(self.optimizer.parameters())
        self.start = [self._theta(own) for own in self.parameters]

    def step(self, gradients: Sequence[Tensor], done: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(done)
            for param, gradient in zip(group["params"], gradients, strict=True):
                param.grad = gradient.to(param.dtype)
        self.optimizer.step()

    def movement(self, strategy: int, sample: int) -> Tensor:
        place = strategy * self.each + sample
        return self._theta(self.parameters[place]) - self.start[place]

    def v(self, strategy: int) -> float:
        """Mean of the second moment of the first sample."""
        own = self.parameters[strategy * self.each]
        variance = format_of(self.optimizer.strategy_of(own).variance)
        return float(variance.value(self.optimizer.planes(own)[2]).double().mean())

    def _theta(self, own: Parameter) -> Tensor:
        return format_of(self.optimizer.strategy_of(own).param).value(self.optimizer.theta(own)).double()


def _copies(k: int, samples: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    return [(f"{k}.{i}", nn.Parameter(x.to(dtype, copy=True))) for i, x in enumerate(samples)]


class _Stage:
    """A cast with the decay, and if there is one another without it.

    Parameters of both have the same names, so stochastic rounding has the same bits, and they differ in decay alone.
    """

    def __init__(self, samples: Sequence[Tensor], strategies: Sequence[Strategy], settings: Settings) -> None:
        self.samples, self.settings = [x.bfloat16().float() for x in samples if x.numel()], settings
        decays = (settings.weight_decay, 0.0) if settings.weight_decay else (0.0,)
        self.casts = [_Cast(self.samples, strategies, settings, decay) for decay in decays]
        weights = torch.cat([x.flatten() for x in self.samples if x.dim() > 1] or self.samples)
        self.size = max(float(weights.square().mean().sqrt()), TINY)

    def run(self) -> None:
        steps, memory = self.settings.rehearsed, STEADY * self.size / self.settings.lr
        streams = zip(*(stream(x.shape, steps, memory) for x in self.samples), strict=True)
        for step, gradients in enumerate(streams):
            for cast in self.casts:
                cast.step(gradients, step / steps)

    def judged(self, k: int) -> Rehearsed:
        """The k-th strategy beside the first."""
        by_dim = {x.dim(): self._moved(k, i) for i, x in enumerate(self.samples)}
        decay, v = self._decay(k), self.casts[0].v(k) / self.casts[0].v(0)
        return Rehearsed(by_dim.get(2), by_dim.get(1), decay, v, self.settings.lr / self.size)

    def _moved(self, k: int, sample: int) -> Moved:
        own, whole = (self.casts[0].movement(j, sample) for j in (k, 0))
        missing = (own - whole).norm()
        size = max(self.samples[sample].double().norm(), whole.norm())  # of weights that begin at 0, where they went
        return Moved(_along(own, whole), float(missing / whole.norm()), float(missing / size))

    def _decay(self, k: int) -> float | None:
        """None: there is none, or nothing that could decay."""
        if len(self.casts) == 1:
            return None
        own, whole = (self.casts[0].movement(j, 0) - self.casts[1].movement(j, 0) for j in (k, 0))
        return _along(own, whole) if bool(whole.any()) else None


def _along(x: Tensor, whole: Tensor) -> float:
    """How much of a movement another has made: 1 is all of it."""
    return float((x * whole).sum() / whole.square().sum())


def stream(shape: Sequence[int], steps: int, memory: float, seed: int = 0) -> Iterator[Tensor]:
    """bf16 gradients of weights of a shape, for so many steps. memory: steps after which the drift has changed."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    size, drift, kept = SIZE * torch.exp(SPREAD * normal()), normal(), math.exp(-1 / memory)
    for step in range(steps):
        yield (size * FALL ** (step / steps) * (drift + normal())).bfloat16()
        drift = kept * drift + math.sqrt(1 - kept * kept) * normal()
