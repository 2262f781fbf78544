"""AdamW, the optimizer: its arguments, and what they may be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from collage.optim import PrecisionOptimizer
from collage.rules.adamw import ADAMW
from collage.settings import number, without_foreign
from collage.state import Group
from collage.strategies import Strategy

ROUNDED = 1e-12  # what a schedule may end below 0 (LinearLR to end_factor=0, by its recursion): it moves nothing


class AdamW(PrecisionOptimizer):
    """AdamW on low-precision weights without a float32 copy: Collage (Yu et al. 2024), Algorithm 2.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g**2
        theta <- theta - lr (m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps) + weight_decay theta)

    where theta, m and v are each held in the format that ``strategy`` gives them.

    Args:
        params: ``model.named_parameters()`` (names make reports and errors readable), ``model.parameters()``, or
            groups, each of which may set any argument below but ``cast`` and ``backend``. Bfloat16; float32 ones among
            them are updated in float32.
        lr: learning rate, a float or a 0-d tensor.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        strategy: a name in ``collage.STRATEGIES``, or a ``collage.Strategy``.
        cast: whether to cast the float32 parameters that train to the strategy's dtype, in place and one at a time;
            what the cast cuts off goes to their low components. Their gradients are dropped.
        maximize: ascend instead of descend.
        seed: of stochastic rounding.
        capturable: for CUDA graphs: counts steps on the parameters' device, and reads them and a tensor lr there.
        backend: "auto" (the fastest for the parameters' device), "cpu" (compiled kernels), "triton" (GPU kernels) or
            "reference" (plain torch).

    Raises:
        ValueError, TypeError: an argument out of range, a parameter of a wrong dtype; named, with the fix.

    >>> import torch
    >>> model = torch.nn.Linear(4, 2).bfloat16()
    >>> opt = AdamW(model.named_parameters(), lr=1e-3, strategy="collage-plus")
    >>> model(torch.ones(1, 4).bfloat16()).sum().backward()
    >>> opt.step()
    >>> sorted(opt.state[model.weight])
    ['exp_avg', 'exp_avg_sq', 'exp_avg_sq_lo', 'param_lo', 'step']
    """

    rule = ADAMW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        strategy: str | Strategy = "collage-plus",
        *,
        cast: bool = False,
        maximize: bool = False,
        seed: int = 0,
        capturable: bool = False,
        backend: str = "auto",
        **dropped: Any,
    ) -> None:
        unknown = without_foreign(dropped, "AdamW")
        if unknown:
            raise TypeError(f"AdamW: cannot take {', '.join(sorted(unknown))}; it is unknown")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "strategy": strategy,
            "maximize": maximize, "seed": seed, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, backend, cast)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        for key in ("lr", "eps", "weight_decay"):
            if not isinstance(group[key], Tensor):
                group[key] = number(key, group[key])
            if isinstance(group[key], Tensor) and group[key].numel() != 1:
                raise ValueError(f"{key}: a tensor needs one element, got shape {tuple(group[key].shape)}")
            elsewhere = isinstance(group[key], Tensor) and group[key].device.type != "cpu"  # reading it would wait
            least = -ROUNDED if key == "lr" else 0.0
            if not elsewhere and not least <= float(group[key]) < math.inf:
                raise ValueError(f"{key}: needs a finite number >= 0, got {group[key]}")
        betas = tuple(beta if isinstance(beta, Tensor) else number("betas", beta) for beta in group["betas"])
        if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
            raise ValueError(f"betas: needs two numbers in [0, 1), got {group['betas']}")
        group["betas"] = betas

    def _hyper(self, group: Group) -> list[float | Tensor]:
        return [*group["betas"], group["eps"], group["weight_decay"]]
