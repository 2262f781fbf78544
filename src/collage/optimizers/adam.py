"""Adam, with weight decay as an L2 penalty, and what AdamW shares with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from collage.optimizers.base import PrecisionOptimizer
from collage.optimizers.parameters import Group
from collage.rules import Rule
from collage.rules.adam import ADAM, ADAM_AMSGRAD
from collage.strategies import Strategy


class Moments(PrecisionOptimizer):
    """What Adam and AdamW share: two moments, and AMSGrad's third. A subclass names its rules."""

    rules: ClassVar[tuple[Rule, Rule]]  # without AMSGrad, and with it
    decoupled: ClassVar[bool]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        strategy: str | Strategy,
        settings: dict[str, Any],
        backend: str,
        cast: bool,
        dropped: dict[str, Any],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "strategy": strategy}
        defaults |= {**settings, "decoupled_weight_decay": self.decoupled}
        super().__init__(params, defaults, backend, cast, dropped)

    def rule_of(self, group: Group) -> Rule:
        """The rule that a group's settings ask for."""
        plain, with_maximum = self.rules
        return with_maximum if group.get("amsgrad") else plain

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        if not isinstance(group.setdefault("amsgrad", False), bool):
            raise TypeError(f"amsgrad: needs True or False, got {group['amsgrad']!r}")
        if group.setdefault("decoupled_weight_decay", self.decoupled) != self.decoupled:
            other = "Adam" if self.decoupled else "AdamW"
            raise ValueError(f"decoupled_weight_decay: is {self.decoupled} in this optimizer; use collage.{other}")


class Adam(Moments):
    """Adam (Kingma, Ba 2015) on low-precision weights without a float32 copy, as `AdamW` but for its weight decay.

        g <- g + weight_decay theta
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g**2
        theta <- theta - lr m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps)

    where theta, m and v are each held in the format that ``strategy`` gives them.

    Args:
        params, lr, betas, eps, amsgrad, strategy, cast, maximize, seed, skip_nonfinite, capturable, backend:
            as `AdamW`'s.
        weight_decay: an L2 penalty: it enters the gradient, and so the moments.

    Raises:
        ValueError, TypeError: an argument out of range, a parameter of a wrong dtype; named, with the fix.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(4).bfloat16())
    >>> opt = Adam([("w", w)], lr=1e-3)
    >>> w.grad = torch.ones_like(w)
    >>> opt.step()
    >>> (w.float() + opt.state[w]["param_lo"].float()).tolist()
    [0.9990005493164062, 0.9990005493164062, 0.9990005493164062, 0.9990005493164062]
    """

    rules = (ADAM, ADAM_AMSGRAD)
    decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        strategy: str | Strategy = "collage-plus",
        *,
        amsgrad: bool = False,
        cast: bool = False,
        maximize: bool = False,
        seed: int = 0,
        skip_nonfinite: bool = False,
        capturable: bool = False,
        backend: str = "auto",
        **dropped: Any,
    ) -> None:
        settings = {"amsgrad": amsgrad, "maximize": maximize, "seed": seed}
        settings |= {"skip_nonfinite": skip_nonfinite, "capturable": capturable}
        super().__init__(params, lr, betas, eps, weight_decay, strategy, settings, backend, cast, dropped)
