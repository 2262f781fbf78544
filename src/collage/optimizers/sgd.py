"""Stochastic gradient descent, the optimizer: its arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from collage.optimizers.base import PrecisionOptimizer
from collage.optimizers.parameters import Group
from collage.rules import Rule
from collage.rules.sgd import SETTINGS, SGD_MOMENTUM, SGD_NESTEROV
from collage.rules.sgd import SGD as PLAIN
from collage.strategies import Strategy


class SGD(PrecisionOptimizer):
    """SGD on low-precision weights without a float32 copy, with momentum and Nesterov's.

        g <- g + weight_decay theta
        b <- momentum b + (1 - dampening) g     (b <- g at the first step)
        theta <- theta - lr (g + momentum b  with nesterov, else b; g without momentum)

    where theta and b are each held in the format that ``strategy`` gives to weights and to first moments.

    Args:
        params, lr, strategy, cast, maximize, seed, skip_nonfinite, capturable, backend: as `AdamW`'s.
        momentum: what is kept of b, >= 0. 0: there is no b, and no state for it.
        dampening: what is not taken of the gradient into b.
        weight_decay: an L2 penalty: it enters the gradient.
        nesterov: needs a momentum and no dampening.

    Raises:
        ValueError, TypeError: an argument out of range, a parameter of a wrong dtype; named, with the fix.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(4).bfloat16())
    >>> opt = SGD([("w", w)], lr=1e-3, momentum=0.9)
    >>> w.grad = torch.ones_like(w)
    >>> opt.step()
    >>> sorted(opt.state[w])
    ['momentum_buffer', 'param_lo', 'step']
    """

    foreign = (*PrecisionOptimizer.foreign, "amsgrad")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
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
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "strategy": strategy, "maximize": maximize, "seed": seed, "skip_nonfinite": skip_nonfinite,
            "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, backend, cast, dropped)

    def rule_of(self, group: Group) -> Rule:
        """Plain without a momentum, which then keeps no state."""
        if not isinstance(group["momentum"], Tensor) and not group["momentum"]:
            return PLAIN
        return SGD_NESTEROV if group["nesterov"] else SGD_MOMENTUM

    def _validate(self, group: Group) -> None:
        group["momentum"] = SETTINGS[0].checked(group["momentum"])  # it says which rule is to be validated
        super()._validate(group)
        if group["nesterov"] and (self.rule_of(group) is PLAIN or float(group["dampening"])):
            raise ValueError("nesterov: needs a momentum > 0 and dampening=0")
