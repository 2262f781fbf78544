"""Which optimizer trains a parameter, and so all that is known of its number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from collage.formats import format_of
from collage.fp8.owning import remainder_of, scale_of
from collage.layout import Planes
from collage.optimizers.base import PrecisionOptimizer
from collage.optimizers.parameters import Parameter, dtype_of
from collage.sharding import local
from collage.unwrapping import unwrapped

Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


class Owner(NamedTuple):
    """Whose a parameter is."""

    optimizer: PrecisionOptimizer
    parameter: Parameter

    @property
    def format(self) -> str:
        """The format that its weights are kept in."""
        return self.optimizer.strategy_of(self.parameter).param


def owners(model: nn.Module, optimizers: Optimizers) -> dict[Tensor, Owner]:
    """Every parameter of one optimizer, or of several.

    Raises TypeError, ValueError if one is not of this package, or has none of the model's parameters, or not all here.
    """
    found: dict[Tensor, Owner] = {}
    own = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    for given in optimizers if isinstance(optimizers, Sequence) else [optimizers]:
        optimizer = unwrapped(given, PrecisionOptimizer)
        theirs = {parameter.tensor: Owner(optimizer, parameter) for parameter in optimizer.parameters()}
        if own and not any(p in theirs for p in own.values()):
            raise ValueError(
                f"optimizer: has none of the model's parameters, not even '{next(iter(own))}'; was it made for another "
                "model, or before this one's parameters were replaced?"
            )
        if any(p not in theirs for group in given.param_groups for p in group["params"]):
            raise ValueError(
                f"optimizer: {type(given).__name__} spreads its parameters over ranks, and those of others have their "
                "components there; shard with FSDP2 (fully_shard) instead, which shows every rank its part of each"
            )
        for param in theirs.keys() & found.keys():
            raise ValueError(f"optimizer: two of those given have param '{theirs[param].parameter.name}'")
        found |= theirs
    if not found:
        raise ValueError("optimizer: needs the one that trains the model, or all of them; got none")
    return found


_VISIBLE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def number_of(param: Tensor, owner: Owner | None) -> tuple[str, Planes]:
    """(format, local planes) of a parameter; the visible one, or a float32 copy, where no optimizer has more.

    Raises ValueError where the optimizer has more than the parameter's dtype lets it use.
    """
    if owner is None or not owner.optimizer.state.get(param):
        visible, scale = local(param.detach()), scale_of(param)
        if scale is not None:
            low = remainder_of(param) if param.requires_grad else None  # of a frozen one hi is all there is
            return "e4m3+int16", (
                visible,
                torch.zeros_like(visible, dtype=torch.int16) if low is None else low,
                local(scale),
            )
        return _VISIBLE.get(param.dtype, "fp32"), (visible if param.dtype in _VISIBLE else visible.float(),)
    kept = {key for key in owner.optimizer.state[param] if key.startswith("param")}
    if kept != {"param" + suffix for suffix in format_of(owner.format).suffixes[1:]}:
        raise ValueError(
            f"param '{owner.parameter.name}': it is {dtype_of(param)}, and its state has {sorted(kept) or 'nothing'} "
            "beside it: was it cast after the optimizer was made? Cast it back first, p.data = p.data.to(...)"
        )
    return owner.format, owner.optimizer.theta(owner.parameter)
