"""The settings that a sweep can go along, as a table: which values are of interest, and what else follows from one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from collage.harness.text import short
from collage.harness.train.config import RunConfig

Changes = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """A row of AXES.

    Args:
        name: on the command line.
        own: the value that a run has now; None: its optimizer has no such setting.
        changes: what a value changes.
        values: of interest around a run's own.
        whole: whether values are counts.
    """

    name: str
    own: Callable[[RunConfig], float | None]
    changes: Callable[[RunConfig, Any], Changes]
    values: Callable[[float], Sequence[float]]
    whole: bool = False

    def defaults(self, config: RunConfig) -> tuple[float, ...]:
        """Values to try for a run, its own among them, ascending."""
        own = self.require(config)
        return tuple(sorted({*(self._rounded(value) for value in self.values(own)), own}))

    def require(self, config: RunConfig) -> float:
        """A run's own value. Raises ValueError if it has none."""
        own = self.own(config)
        if own is None:
            raise ValueError(f"--axis {self.name}: '{config.optimizer}' has no such setting; choose another axis")
        return own

    def config(self, config: RunConfig, value: float) -> RunConfig:
        """The same run with this value."""
        return replace(config, **self.changes(config, value))

    def parse(self, text: str) -> float:
        """A value of the command line. Raises ValueError naming the flag."""
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"--values: {text!r} is no number; give some, separated by commas") from None
        if self.whole and not value.is_integer():
            raise ValueError(f"--values: {self.name} takes whole numbers, got {text}")
        return int(value) if self.whole else value

    def _rounded(self, value: float) -> float:
        return max(1, round(value)) if self.whole else float(f"{value:.3g}")


def _times(*factors: float) -> Callable[[float], list[float]]:
    return lambda own: [factor * own for factor in factors]


def _always(*values: float) -> Callable[[float], Sequence[float]]:
    return lambda own: values


def _field(name: str) -> tuple[Callable[[RunConfig], Any], Callable[[RunConfig, Any], Changes]]:
    """How a field of its own is read and changed."""
    return lambda config: getattr(config, name), lambda config, value: {name: value}


def _beta(index: int) -> tuple[Callable[[RunConfig], float | None], Callable[[RunConfig, float], Changes]]:
    def own(config: RunConfig) -> float | None:
        return config.betas[index] if config.betas else None

    def changes(config: RunConfig, value: float) -> Changes:
        assert config.betas is not None, "an axis of an optimizer without it is refused"
        first, second = config.betas
        return {"betas": (first, value) if index else (value, second)}

    return own, changes


def _steps(config: RunConfig, steps: int) -> Changes:
    """A shorter run warms up no longer than a tenth of it, as every run does."""
    return {"steps": steps, "warmup_steps": min(config.warmup_steps, max(1, steps // 10))}


def _batch(config: RunConfig, batch: int) -> Changes:
    return {"batch_size": batch, "micro_batch": math.gcd(batch, config.micro_batch)}


AXES: Mapping[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("lr", *_field("lr"), _times(0.1, 0.3, 1, 3, 10)),
        Axis("beta1", *_beta(0), _always(0.8, 0.9, 0.95)),
        Axis("beta2", *_beta(1), _always(0.95, 0.99, 0.999)),  # the paper's ablation
        Axis("eps", *_field("eps"), _times(0.01, 1, 100, 1e4)),
        Axis("weight-decay", *_field("weight_decay"), _always(0.0, 0.01, 0.1, 1.0)),
        Axis("max-grad-norm", *_field("max_grad_norm"), _times(0.1, 1, 10)),
        Axis("steps", lambda config: config.steps, _steps, _times(0.25, 0.5, 1, 2), whole=True),
        Axis("warmup-steps", *_field("warmup_steps"), _times(0.2, 1, 2), whole=True),
        Axis("batch-size", lambda config: config.batch_size, _batch, _times(0.25, 0.5, 1, 2), whole=True),
    )
}


def label(axis: Axis, value: float) -> str:
    """A value in words: "lr 1e-5"."""
    return f"{axis.name} {short(value, 6)}"
