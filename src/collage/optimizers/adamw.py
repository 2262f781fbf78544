"""AdamW, the optimizer: its arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from collage.optimizers.adam import Moments
from collage.rules.adamw import ADAMW, ADAMW_AMSGRAD
from collage.strategies import Strategy


class AdamW(Moments):
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
        amsgrad: whether to divide by the root of the largest second moment so far (Reddi et al. 2018).
        strategy: a name in ``collage.STRATEGIES``, or a ``collage.Strategy``.
        cast: whether to cast the float32 parameters that train to the strategy's dtype, in place and one at a time;
            what the cast cuts off goes to their low components. Their gradients are dropped.
        maximize: ascend instead of descend.
        seed: of stochastic rounding.
        skip_nonfinite: whether a step whose gradients hold NaN or Inf, on any rank of the default process group (all
            of which have to step then), changes nothing; ``opt.skipped_steps`` counts them, and a monitor says whose
            gradients it was.
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

    rules = (ADAMW, ADAMW_AMSGRAD)
    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
