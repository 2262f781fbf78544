"""Lion, the optimizer: its arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from collage.optimizers.base import PrecisionOptimizer
from collage.optimizers.parameters import Group
from collage.rules import Rule
from collage.rules.lion import LION
from collage.strategies import Strategy


class Lion(PrecisionOptimizer):
    """Lion (Chen et al. 2023, Algorithm 2) on low-precision weights without a float32 copy.

        u <- sign(beta1 m + (1 - beta1) g)
        theta <- theta - lr (u + weight_decay theta)
        m <- beta2 m + (1 - beta2) g

    where theta and m are each held in the format that ``strategy`` gives to weights and to first moments. Every weight
    moves by lr at every step, so a tenth of AdamW's lr and ten times its decay are usual.

    Args:
        params, lr, strategy, cast, maximize, seed, skip_nonfinite, capturable, backend: as `AdamW`'s.
        betas: of the interpolation, and of the momentum, in [0, 1).
        weight_decay: decoupled.

    Raises:
        ValueError, TypeError: an argument out of range, a parameter of a wrong dtype; named, with the fix.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(4).bfloat16())
    >>> opt = Lion([("w", w)], lr=1e-4)
    >>> w.grad = torch.ones_like(w)
    >>> opt.step()
    >>> sorted(opt.state[w])
    ['exp_avg', 'param_lo', 'step']
    """

    foreign = (*PrecisionOptimizer.foreign, "amsgrad")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        strategy: str | Strategy = "collage-plus",
        *,
        cast: bool = False,
        maximize: bool = False,
        seed: int = 0,
        skip_nonfinite: bool = False,
        capturable: bool = False,
        backend: str = "auto",
        **dropped: Any,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "weight_decay": weight_decay, "strategy": strategy, "maximize": maximize,
            "seed": seed, "skip_nonfinite": skip_nonfinite, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, backend, cast, dropped)

    def rule_of(self, group: Group) -> Rule:
        """The only one."""
        return LION
