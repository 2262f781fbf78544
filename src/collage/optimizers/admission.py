"""What an optimizer lets in: weights of which dtypes, cast or not, and what it says of those it finds strange."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from weakref import ref

import torch
from torch import Tensor

from collage import backends
from collage.casting import require_finite
from collage.formats import format_of
from collage.fp8.owning import scale_of
from collage.optimizers import planes
from collage.optimizers.parameters import Group, Parameter, State, name_of
from collage.rules import Rule
from collage.saying import several, warn_once
from collage.sharding import any_dtensor, is_flat_shard
from collage.strategies import STRATEGIES, Strategy

log = logging.getLogger("collage")

_stepped_last: dict[int, Callable[[], object]] = {}  # by seed: the optimizer with unnamed parameters that did


def strategy_of(parameter: Parameter) -> Strategy:
    """The group's strategy, as dtype and shape have it; float32 ones step in float32. TypeError for any other dtype."""
    strategy = Strategy.parse(parameter.group["strategy"])
    own = strategy.on(parameter.tensor.dtype)
    if own is not None:
        return own.of(parameter.tensor.shape)
    if parameter.tensor.dtype == torch.float32:
        return STRATEGIES["fp32"]
    raise _wrong_dtype(parameter, strategy)


def _wrong_dtype(parameter: Parameter, strategy: Strategy) -> TypeError:
    found, wanted = parameter.tensor.dtype, name_of(strategy.beside.dtype)  # no cast makes e4m3 ones
    cast = f"cast it, p.data = p.data.to(torch.{wanted})"
    if found.is_complex:
        fix = "no strategy takes complex numbers; leave it to an optimizer of torch"
    elif found == torch.float8_e4m3fn and scale_of(parameter.tensor) is not None:
        fix = "collage.fp8.convert made it: use strategy='collage-fp8', 'collage-fp8-lean' or 'fp8-master'"
    elif found.itemsize == 1:
        fix = "is it a quantised weight? Then freeze it, p.requires_grad_(False), and train adapters"
    elif found == torch.float64:
        fix = f"{cast}, which drops most of its bits, or leave it to an optimizer of torch"
    else:
        fix = f"{cast}, or choose a strategy for {name_of(found)}"
    return TypeError(f"param '{parameter.name}': strategy '{strategy}' needs {wanted}, got {name_of(found)}; {fix}")


def require_low_precision(parameters: Sequence[Parameter], before: int | None) -> int:
    """How many of the parameters that train are float32 under a strategy for narrower ones.

    Args:
        before: how many there were when this was last asked; None: never.

    Raises:
        ValueError: all are, so that the strategy has nothing to work on. (Beside frozen low ones it is a warning.)
    """
    trained = [parameter for parameter in parameters if parameter.tensor.requires_grad]
    full = [
        parameter
        for parameter in trained
        if strategy_of(parameter).dtype == torch.float32 != Strategy.parse(parameter.group["strategy"]).dtype
    ]
    if full and len(full) == len(trained):
        _refuse_float32(
            full, {p.tensor.dtype for p in parameters if not p.tensor.requires_grad}, later=before is not None
        )
    return len(full)


def tell_of_float32(now: int, before: int | None) -> None:
    """Say how many parameters are float32 under a strategy for narrower ones; before as in `require_low_precision`."""
    if before is None and now:
        log.info("%d parameters are float32 and are updated in float32", now)
    elif now > (before or 0):
        warn_once(
            f"{now} parameters are float32 and are updated in float32; there were {before}: did a "
            "framework cast some, or were they unfrozen? cast=True casts what trains when it is added"
        )


def _refuse_float32(full: Sequence[Parameter], frozen: set[torch.dtype], later: bool) -> None:
    strategy = Strategy.parse(full[0].group["strategy"])
    low = name_of(strategy.beside.dtype)
    what = f"all {len(full)} trainable parameters are float32, and strategy '{strategy}' trains {low} ones"
    if frozen - {torch.float32}:
        warn_once(
            f"{what}: they are updated in float32. For adapters in {low} cast them (autocast_adapter_dtype=False), "
            "or say cast=True; for float32 ones say strategy='fp32'"
        )
    elif later:
        raise ValueError(
            f"params: {what}. They were cast after the optimizer was made: model.float(), or a framework that prepares "
            f"models in mixed precision (Accelerate: mixed_precision='no'). Keep them in {low}, or use strategy='fp32'"
        )
    else:
        raise ValueError(
            f"params: {what}. Say cast=True, which keeps what the cast cuts off; or load the model in {low} "
            f"(from_pretrained(..., dtype=torch.{low}); PEFT's adapters: autocast_adapter_dtype=False), or use "
            "strategy='fp32'"
        )


def require_converted(parameters: Sequence[Parameter]) -> None:
    """Raise ValueError where a strategy of e4m3 weights finds none, or one whose row scales no module has."""
    converted, bare = False, None
    for parameter in parameters:
        strategy = Strategy.parse(parameter.group["strategy"])
        if strategy.beside is strategy:
            continue
        if parameter.tensor.dtype == strategy.dtype:
            converted = True
            if parameter.tensor.requires_grad and scale_of(parameter.tensor) is None:
                raise ValueError(
                    f"param '{parameter.name}': it is {name_of(strategy.dtype)}, and no module has its row scales; "
                    f"collage.fp8.convert(model) makes both out of wider weights. {_LAST}"
                )
        elif not converted:
            bare = strategy
    if bare is not None and not converted:
        raise ValueError(
            f"params: strategy '{bare}' trains {name_of(bare.dtype)} weights, and there are none; call "
            f"collage.fp8.convert(model) first. {_LAST}"
        )


_LAST = "Make the optimizer last, of model.named_parameters()"


def to_be_cast(parameters: Sequence[Parameter]) -> list[Parameter]:
    """The float32 parameters that train under a strategy for narrower ones. Raises ValueError if one cannot be cast.

    parameters: all of the optimizer's that are there so far.
    """
    wide = [
        parameter
        for parameter in parameters
        if parameter.tensor.requires_grad
        and parameter.tensor.dtype == torch.float32 != Strategy.parse(parameter.group["strategy"]).dtype
    ]
    users: dict[int, list[Parameter]] = {}
    for parameter in parameters:
        if not any_dtensor([parameter.tensor]) and parameter.tensor.numel():
            users.setdefault(parameter.tensor.untyped_storage().data_ptr(), []).append(parameter)
    for name, param, group in ((parameter.name, parameter.tensor, parameter.group) for parameter in wide):
        if any_dtensor([param]):
            raise ValueError(
                f"param '{name}': cast=True cannot cast a DTensor; cast the model before it is sharded, "
                "collage.to_bf16(model), and then collage.load_high_precision_state_dict(model, optimizer, full)"
            )
        sharing = users[param.untyped_storage().data_ptr()] if param.numel() else []
        for other in (other for other in sharing if other.tensor is not param):
            raise ValueError(
                f"param '{name}': cast=True would part it from '{other.name}', with which it shares memory; give them "
                "memory of their own, p.data = p.data.clone(), or use collage.to_bf16(model)"
            )
        require_finite(name, param.detach(), Strategy.parse(group["strategy"]).beside.dtype)
    return wide


def cast(rule_of: Callable[[Group], Rule], wide: Sequence[Parameter], states: MutableMapping[Tensor, State]) -> None:
    """Cast these parameters, one at a time."""
    for parameter in wide:
        strategy = Strategy.parse(parameter.group["strategy"]).beside.of(parameter.tensor.shape)
        planes.cast(
            rule_of(parameter.group),
            strategy,
            parameter.tensor,
            states[parameter.tensor],
            parameter.group["capturable"],
        )


def warn_of_fallback(devices: set[torch.device]) -> None:
    """Say where there are no kernels."""
    for device in devices:
        reason = backends.missing(backends.fastest(device))
        if reason:
            warn_once(f"no kernels for {device.type}, so steps take the slow reference backend: {reason}")


def warn_of_underflow(rule: Rule, strategy: Strategy) -> None:
    """A second moment is a square: float16 has none below 3e-8, of gradients below 5e-3."""
    if "variance" in rule.roles and format_of(strategy.variance).dtypes[0] == torch.float16:
        warn_once(
            f"variance: in '{strategy.variance}' squares of gradients below some 5e-3 become 0, and updates several "
            "times too large; use variance='bf16', 'bf16x2' or 'fp32'"
        )


def warn_of_flat_shards(strategy: Strategy, parameters: Iterable[Parameter]) -> None:
    """FSDP1's shards do not know their place, which random bits depend on, and its dictionaries take no integers."""
    flat = [parameter.name for parameter in parameters if is_flat_shard(parameter.tensor)]
    dtypes = {dtype for name in strategy.formats() for dtype in format_of(name).dtypes}
    if flat and (strategy.stochastic or not all(dtype.is_floating_point for dtype in dtypes)):
        warn_once(
            f"params: {several(flat)}: flat shards of FullyShardedDataParallel, whose ranks draw the same random bits "
            f"and whose dictionaries take no integers; for strategy '{strategy}' shard with fully_shard (FSDP2), or "
            "use 'collage-plus' here"
        )


def warn_of_shared_bits(optimizer: object, groups: Sequence[Group], first: bool) -> None:
    """Unnamed parameters draw random bits by position: optimizers that step in turns draw the same."""
    for group in groups:
        if group.get("param_names") or not Strategy.parse(group["strategy"]).stochastic:
            continue
        last = _stepped_last.get(group["seed"], lambda: None)()
        if last not in (None, optimizer) and not first:
            warn_once(
                "unnamed parameters of two optimizers round stochastically with one seed, so they draw the same "
                "random bits; give names (model.named_parameters(), or [(name, p)] for one), or a seed to each"
            )
        _stepped_last[group["seed"]] = ref(optimizer)


def warn_of_cleared(strategy: Strategy, lost: Sequence[str]) -> None:
    """Where states were taken away after steps, and the weights stayed, their low components went with them."""
    if lost and len(format_of(strategy.param).planes) > 1:
        warn_once(
            f"the optimizer state of {several(lost)} was cleared after steps, and with it the low "
            "components of these weights; opt.reset_moments() starts moments anew and keeps weights"
        )
