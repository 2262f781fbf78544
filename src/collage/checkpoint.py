"""Weights in full precision: out of the optimizers' components, and into them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from collage.backends import choose
from collage.casting import require_finite
from collage.collectives import together
from collage.formats import format_of
from collage.fp8.owning import is_scale, scale_of
from collage.layout import pieces
from collage.optimizers import edits
from collage.optimizers.parameters import dtype_of
from collage.owners import Optimizers, Owner, number_of, owners
from collage.saying import several
from collage.sharding import any_dtensor, local, placed, reshard

log = logging.getLogger("collage")


@torch.no_grad()
def high_precision_state_dict(model: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    """Every key of ``model.state_dict()``; low-precision weights as float32 with all that their components hold.

    (The row scales of e4m3 weights are part of their numbers, and have no key.)

    Inside `EMA.averaged` it is the average that is exported. Cast to bfloat16, about one value in 1,000 becomes the
    neighbour of the visible weight hi: where lo is exactly half an ulp, the cast ties to even. Nothing is wrong then.

    Args:
        model: whose weights are exported.
        optimizer: which trains them, or a list of all that do; also as Accelerate, Lightning or Fabric wrapped it.

    Returns:
        A dict that ``load_state_dict(strict=True)`` takes, of a float32 model or of this one. Buffers and other
        entries are as they are. Tied parameters appear under each of their names; sharded ones as DTensors.

    Raises:
        TypeError: an optimizer of somewhere else.
        ValueError: an optimizer of another model; trained weights that no optimizer given has, or that
            ``model.state_dict()`` does not show.

    >>> import collage
    >>> model = torch.nn.Linear(2, 1).bfloat16()
    >>> opt = collage.AdamW(model.named_parameters())
    >>> high_precision_state_dict(model, opt)["weight"].dtype
    torch.float32
    """
    reshard(model)
    owned = owners(model, optimizer)
    shown = numbers_of(model)
    _require_shown(model, owned, [p for p, owner in owned.items() if owner.optimizer.state.get(p)], shown)
    alone = [name for name, p in model.named_parameters() if _may_lose(p) and p not in owned]
    if alone:
        raise ValueError(
            f"optimizer: has none of {several(alone)}, which are trained, so that what another one keeps beside them "
            "would be left out; give every optimizer, [a, b], or freeze what none trains (requires_grad_(False))"
        )
    misfits: dict[Tensor, int] = {}

    def export(param: Tensor, result: Tensor) -> None:
        if id(param) in edits.LENT or param.dtype == torch.float64:
            result.copy_(edits.LENT[id(param)]() if id(param) in edits.LENT else local(param))
            return
        misfits[param] = edits.decode(*number_of(param, owned.get(param)), result)

    result = exported(shown, export)
    for optimizer in {id(owner.optimizer): owner.optimizer for owner in owned.values()}.values():
        mine = [owned[p].parameter for p, n in misfits.items() if n and p in owned and owned[p].optimizer is optimizer]
        optimizer.tell([(parameter, misfits[parameter.tensor], local(parameter.tensor).numel()) for parameter in mine])
    return result


def exported(shown: Mapping[str, Any], export: Callable[[Tensor, Tensor], None]) -> dict[str, Any]:
    """A copy of a module's state_dict (``keep_vars=True``), its floating-point parameters in float32 at least.

    export: writes a parameter's number into this rank's part of a float32 tensor like it.
    """
    result: OrderedDict[str, Any] = OrderedDict()
    for key, tensor in shown.items():
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            result[key] = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
            export(tensor, local(result[key]))
        else:
            result[key] = tensor.detach().clone() if isinstance(tensor, Tensor) else tensor
    _copy_versions(shown, result)
    return result


def _copy_versions(source: Mapping[str, Any], target: OrderedDict[str, Any]) -> None:
    """The modules' versions, which torch keeps beside the keys: some read by them what they load."""
    if hasattr(source, "_metadata"):
        vars(target)["_metadata"] = source._metadata


def _require_shown(
    model: nn.Module, owned: Mapping[Tensor, Owner], held: Iterable[Tensor], shown: Mapping[str, Any]
) -> None:
    """Raise ValueError where an optimizer holds numbers of this model that no key of its state_dict stands for."""
    own: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    require_keys({param: own[param] for param in held if param in own}, shown)
    foreign = [owned[param].parameter.name for param in held if param not in own]
    alone = [name for param, name in own.items() if _may_lose(param) and param not in owned]
    if foreign and alone:
        raise ValueError(
            f"optimizer: has none of {several(alone)}, and trains {several(foreign)}, which the model has not: "
            "flattened (ZeRO) or replaced after the optimizer was made? Shard with FSDP2 (fully_shard); make the "
            "optimizer last"
        )


def require_keys(params: Mapping[Any, str], shown: Mapping[str, Any]) -> None:
    """Raise ValueError for parameters, by name, that none of the state_dict's tensors is."""
    keyed = set(map(id, shown.values()))
    hidden = [name for param, name in params.items() if id(param) not in keyed]
    if hidden:
        raise ValueError(
            f"model: its state_dict() has other tensors in the place of {several(hidden)} (FSDP1, or a hook that makes "
            "new ones), so that their full precision has no key. Shard with FSDP2 (fully_shard), or remove the hook"
        )


def _may_lose(param: Tensor) -> bool:
    """Whether it is trained and too narrow for a float32 number."""
    return param.requires_grad and param.is_floating_point() and param.dtype.itemsize < 4


@torch.no_grad()
def load_high_precision_state_dict(model: nn.Module, optimizer: Optimizers, state_dict: Mapping[str, Any]) -> None:
    """Split float32 weights into the components the optimizer keeps; load everything else as torch does.

    The way to start from a float32 checkpoint: ``model.bfloat16()`` alone throws the low 16 bits away. Tied weights
    may be there under one of their names, as Hugging Face's ``save_pretrained`` stores them. A sharded model takes
    whole tensors (the same on every rank) as well as DTensors, and is loaded on every rank: what one refuses, all do.
    Frozen weights are rounded to their own dtype.

    Args:
        model: whose weights are loaded.
        optimizer: which trains them, or a list of all that do.
        state_dict: every key of ``model.state_dict()``.

    Raises:
        ValueError: a missing, an unexpected or a misshapen key; an optimizer of another model; a trained weight that
            is in no optimizer, if its low bits would be cut off. Nothing is changed then.
        RuntimeError: inside `EMA.averaged`.
    """
    reshard(model)
    owned = {p: owner for p, owner in owners(model, optimizer).items() if _is_split(owner)}
    edits.require_own([*owned, *model.parameters()], "load_high_precision_state_dict()")
    own = numbers_of(model)
    _require_shown(model, owned, owned, own)
    parts = model.state_dict().keys() - own.keys()
    whole = _with_tied(own, {key: x for key, x in state_dict.items() if key not in parts})
    _require_same(own, whole)
    values = OrderedDict((key, _at(tensor, whole[key])) for key, tensor in own.items())
    with together(own.values(), "state_dict: this rank's part of the weights"):
        _require_lossless(own, values, owned)
        for key, tensor in own.items():
            if isinstance(tensor, Tensor) and tensor in owned:
                require_finite(key, local(values[key]), tensor.dtype)
    others = OrderedDict(model.state_dict(), **{key: x for key, x in values.items() if not _is_scaled(own[key])})
    _copy_versions(state_dict, others)
    model.load_state_dict(others, strict=True)
    for key, tensor in own.items():
        if isinstance(tensor, Tensor) and (tensor in owned or _is_scaled(tensor)):
            if tensor in owned:
                owned[tensor].optimizer.theta(owned[tensor].parameter)  # begins its state
            format, planes = number_of(tensor, owned.get(tensor))
            value = local(values[key]).to(planes[0].device, torch.float32)
            choose("auto", value.device).encode(format, [value], [planes])


def numbers_of(model: nn.Module) -> dict[str, Any]:
    """What a model's state_dict has, but for what is a part of another entry's number."""
    shown: dict[str, Any] = model.state_dict(keep_vars=True)
    for key in [key for key in shown if is_scale(key, shown)]:
        del shown[key]
    return shown


def _is_scaled(tensor: Any) -> bool:
    return isinstance(tensor, nn.Parameter) and scale_of(tensor) is not None


def _at(tensor: Any, value: Any) -> Any:
    """A value for a tensor, placed as it is. What is no tensor stays."""
    return placed(value.to(tensor.device) if any_dtensor([tensor]) else value, tensor)


def _is_split(owner: Owner) -> bool:
    """Whether its optimizer splits it. Raises TypeError for a trained parameter of a dtype that it does not take."""
    try:
        owner.optimizer.strategy_of(owner.parameter)
    except TypeError:
        if owner.parameter.tensor.requires_grad or owner.optimizer.state.get(owner.parameter.tensor):
            raise
        return False
    return True


def _require_same(own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for keys, shapes and kinds that are not the model's."""
    missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"state_dict: missing keys {missing or 'none'}, unexpected keys {unexpected or 'none'}")
    for key, tensor in own.items():
        value = state_dict[key]
        if not isinstance(tensor, Tensor) or key.endswith("_extra_state"):  # of any shape: the module's own affair
            continue
        if not isinstance(value, Tensor) or value.is_floating_point() != tensor.is_floating_point():
            got = dtype_of(value) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"state_dict['{key}']: is {got}, the model's is {dtype_of(tensor)}")
        if value.layout != torch.strided or value.is_meta:
            kind = "on the meta device" if value.is_meta else str(value.layout)
            raise ValueError(f"state_dict['{key}']: is {kind}; give dense numbers")
        if value.shape != tensor.shape:
            raise ValueError(
                f"state_dict['{key}']: has shape {tuple(value.shape)}, the model's is {tuple(tensor.shape)}"
            )


def _require_lossless(own: Mapping[str, Any], values: Mapping[str, Any], owned: Mapping[Tensor, Owner]) -> None:
    """Raise ValueError for trained weights that would lose their low bits; say how many others do."""
    lossy = {key: p for key, p in own.items() if isinstance(p, nn.Parameter) and _loses(values[key], p, owned.get(p))}
    alone = [key for key, p in lossy.items() if p.requires_grad and p not in owned]
    if alone:
        raise ValueError(
            f"optimizer: has none of {several(alone)}, which are trained, so that loading would cut their low bits "
            "off; give every optimizer, [a, b]; or freeze them (requires_grad_(False)); or round their values in "
            "state_dict"
        )
    if lossy:
        log.info("rounded to their own dtype: %s; frozen, or of a format without low components", several([*lossy]))


def _loses(value: Tensor, param: Tensor, owner: Owner | None) -> bool:
    """Whether a parameter whose format has no low components would drop bits of this value."""
    if owner is not None and len(format_of(owner.format).planes) > 1:
        return False
    parts = (part.float() for (part,) in pieces([local(value)]))
    return any(bool(((x != x.to(param.dtype).float()) & ~x.isnan()).any()) for x in parts)


def _with_tied(own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state_dict, each weight under all the names that the model has for the very same tensor."""
    places = {key: _place(tensor) for key, tensor in own.items() if isinstance(tensor, Tensor)}
    there = {place: state_dict[key] for key, place in places.items() if key in state_dict}
    absent = {key: there[place] for key, place in places.items() if key not in state_dict and place in there}
    return {**state_dict, **absent}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where its numbers lie: equal for tied tensors. A tensor without memory is tied to itself alone."""
    part = local(tensor)
    return part.data_ptr() or id(tensor), part.dtype, part.shape, part.stride()
