"""Which linear layers of a model become e4m3 ones, and why one cannot."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from collage.fp8.linear import Float8Linear
from collage.saying import several
from collage.sharding import any_dtensor

log = logging.getLogger("collage")


def chosen(model: nn.Module, skip: Iterable[str]) -> dict[str, nn.Linear]:
    """The layers to convert, by name. Raises ValueError, TypeError for one that cannot be, and where there is none."""
    modules = dict(model.named_modules())
    kept = _heads(model, modules) | _skipped(modules, [skip] if isinstance(skip, str) else list(skip))
    layers = {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and name not in kept}
    others = [name for name in layers if _is_of_others(name, modules)]
    if others:
        log.info(
            "%s stay in bfloat16: of other classes than nn.Linear, or multiplied by their parents", several(others)
        )
    layers = {name: layer for name, layer in layers.items() if name not in others}
    for name, layer in layers.items():
        _require_convertible(name, layer)
    _require_apart(model, layers)
    if not layers:
        raise ValueError(
            "model: none of its layers is left to convert; its output head stays as it is, and what skip names"
        )
    return layers


def _heads(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The output head: what transformers says it is, and layers outside its base model; elsewhere the last one."""
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    output = getattr(model, "get_output_embeddings", None)
    if output is None:
        return set(linear[-1:]) if len(linear) > 1 else set()
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    return {name for name in linear if modules[name] is output() or id(modules[name]) not in inside}


def _skipped(modules: dict[str, nn.Module], patterns: list[str]) -> set[str]:
    """Names that are given, match a pattern, or lie below such a module. Raises ValueError for what is none's name."""
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"skip: needs names of modules or patterns of names, got {type(pattern).__name__}")
        tops = [name for name in modules if name and (name == pattern or fnmatchcase(name, pattern))]
        if not tops:
            linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
            raise ValueError(
                f"skip: no module is named {pattern!r}; its linear layers are {', '.join(linear)}; "
                f"'*.{pattern}' is all of that name, wherever they are"
            )
        found |= {name for name in modules for top in tops if f"{name}.".startswith(f"{top}.")}
    return found


def _is_of_others(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether its forward may be another's: torch's encoder layers multiply past it when they evaluate."""
    layer = modules[name]
    if isinstance(modules[name.rpartition(".")[0]], nn.TransformerEncoderLayer):
        return True
    return type(layer) is not nn.Linear and not isinstance(layer, Float8Linear) and not is_parametrized(layer)


def _require_convertible(name: str, layer: nn.Linear) -> None:
    """Raise for a layer whose weight is not its own finite matrix."""
    weight = layer._parameters.get("weight")
    fix = f"or skip=['{name}']"
    if isinstance(layer, Float8Linear):
        raise ValueError(f"'{name}': is converted already; convert a model once")
    if is_parametrized(layer) or weight is None:
        raise ValueError(f"'{name}': its weight is made of others (weight_norm, ...); remove that, {fix}")
    if "forward" in vars(layer):
        raise ValueError(f"'{name}': its forward was replaced (by Accelerate?); convert the model before that, {fix}")
    if any_dtensor([weight]):
        raise ValueError(f"'{name}': its weight is sharded; convert the model before fully_shard, {fix}")
    if is_lazy(weight) or weight.is_meta:
        raise ValueError(f"'{name}': its weight has no numbers yet; convert the model once it has, {fix}")
    if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(
            f"'{name}': its weight is a {type(weight.data).__name__}, {weight.dtype}; convert floats, {fix}"
        )
    if not weight.numel():
        raise ValueError(f"'{name}': its weight has no elements, {tuple(weight.shape)}; {fix.removeprefix('or ')}")
    if not bool(torch.isfinite(weight.detach().float()).all()):
        raise ValueError(f"'{name}': its weight is not finite, as float32; mend it, {fix}")


def _require_apart(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Raise ValueError where something else has a weight too: it would stay with the old one."""
    users: dict[int, list[str]] = defaultdict(list)
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if type(tensor.data) is Tensor and not is_lazy(tensor) and tensor.layout == torch.strided:
            users[tensor.untyped_storage()._cdata].append(name)
    for name, layer in layers.items():
        sharing = users[layer.weight.untyped_storage()._cdata]
        if len(sharing) > 1:
            others = [other for other in sharing if other != f"{name}.weight".removeprefix(".")]
            raise ValueError(
                f"'{name}': shares its weight with {several(others)}; skip=['{name}'] leaves it in bfloat16, or give "
                "it a weight of its own, layer.weight = nn.Parameter(layer.weight.detach().clone())"
            )
