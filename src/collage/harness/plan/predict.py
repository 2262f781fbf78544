"""How much memory each rank needs in a training step, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from collage.advice.memory import state_bytes
from collage.harness.plan.simulation import Simulated, Work, simulate
from collage.rules import Rule
from collage.rules.adamw import ADAMW
from collage.strategies import Strategy


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Bytes of one rank in a training step under a strategy.

    released: whether each gradient is used and freed as soon as backward has it (`collage.release_gradients`).
    gradients: of all parameters; activations: what forward leaves for backward. Never all at once: gradients come while
    activations go.
    at_peak: what is in use when most is, by kind (`ledger.KINDS`), the states among it.
    """

    strategy: str
    released: bool
    weights: int
    states: int
    gradients: int
    activations: int
    at_peak: dict[str, int]

    @property
    def peak(self) -> int:
        """The most that is in use at a time."""
        return sum(self.at_peak.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "peak": self.peak}


def predict(model: nn.Module, strategies: Iterable[str | Strategy], work: Work, rule: Rule = ADAMW) -> list[Prediction]:
    """Two predictions for each strategy: with gradients that stay until the step, and released.

    Weights, gradients and states are counted parameter by parameter, tied ones once; the rest is what the model's own
    forward and backward allocate on tensors without memory. A fused step needs nothing of a parameter's size.

    Args:
        model: on the meta device; a language model of transformers, unless `work.sequences` is 0. It stays as it is.
        strategies: names, or others.
        work: what each rank computes.
        rule: of the optimizer.

    Raises:
        ValueError: a model whose shapes depend on values.
    """
    known = [Strategy.parse(strategy) for strategy in strategies]
    dtypes = dict.fromkeys(strategy.dtype for strategy in known)
    found = {(dtype, release): simulate(model, dtype, work, release) for dtype in dtypes for release in (False, True)}
    shapes = [tuple(param.shape) for param in model.parameters() if param.requires_grad]
    return [
        _prediction(strategy, release, found[strategy.dtype, release], state_bytes(rule, strategy, shapes, work.ranks))
        for strategy in known
        for release in (False, True)
    ]


def _prediction(strategy: Strategy, released: bool, found: Simulated, states: int) -> Prediction:
    return Prediction(
        strategy=str(strategy), released=released, weights=found.weights, states=states, gradients=found.gradients,
        activations=found.activations, at_peak={**found.peak, "states": states},
    )  # fmt: skip
