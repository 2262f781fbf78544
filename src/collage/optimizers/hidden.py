"""Which parameters are hidden matrices, that Muon is for: by their shapes, and by the names of what is not hidden."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from collage.optimizers.orthogonal import sizes_of
from collage.optimizers.parameters import Parameter
from collage.saying import several
from collage.sharding import is_flat_shard

log = logging.getLogger("collage")

# Embeddings, and layers that give classes or tokens, as models name them
OUTER = re.compile(r"embed|(^|\.)(wte|wpe|lm_head|head|classifier|score)\.|^((module|_orig_mod)\.)*output\.", re.I)


def is_matrix(param: Tensor, flatten: bool) -> bool:
    """Whether it is one, or is to be seen as one."""
    return param.dim() == 2 or (flatten and param.dim() > 2)


def require_blocks(parameter: Parameter, split: Sequence[int]) -> None:
    """Raise ValueError, naming it, for a parameter that Muon cannot see as a matrix of such blocks of rows."""
    shape, name = tuple(parameter.tensor.shape), parameter.name
    if is_flat_shard(parameter.tensor):
        raise ValueError(
            f"param '{name}': a flat shard of FullyShardedDataParallel is no matrix; use fully_shard (FSDP2)"
        )
    if not is_matrix(parameter.tensor, parameter.group["flatten"]):
        fix = "flatten=True sees it as a matrix [out, all else]; or give it" if len(shape) > 2 else "give it"
        raise ValueError(
            f"param '{name}': Muon is for matrices, and its shape is {shape}; {fix} to AdamW, in a group with "
            "use_muon=False"
        )
    try:
        sizes_of(split, shape[0])
    except ValueError as error:
        raise ValueError(f"param '{name}': {error}") from None


def parted(group: Mapping[str, Any], flatten: bool) -> list[dict[str, Any]]:
    """A group that says nothing of `use_muon` as one of hidden matrices and one of all others, where it has both.

    Raises:
        ValueError: parameters without names, not all of them matrices: there may be embeddings among them.
    """
    params = group["params"]
    entries: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    named = [entry for entry in entries if isinstance(entry, tuple)]
    if len(named) < len(entries):
        _require_matrices(entries, flatten)
        return [{**group, "params": entries, "use_muon": True}]
    hidden = [(name, p) for name, p in named if is_matrix(p, flatten) and not OUTER.search(name)]
    names = {name for name, _ in hidden}
    others = [(name, p) for name, p in named if name not in names]
    if hidden and others:
        outer = several([name for name, p in others if is_matrix(p, flatten)] or ["none"])
        log.info("Muon: %d matrices; AdamW: %d others, of matrices %s", len(hidden), len(others), outer)
    parts = ((hidden, True), (others, False))
    return [{**group, "params": own, "use_muon": muon} for own, muon in parts if own or not entries]


def _require_matrices(params: Iterable[Any], flatten: bool) -> None:
    found = next((p for p in params if isinstance(p, Tensor) and not is_matrix(p, flatten)), None)
    if found is not None:
        raise ValueError(
            f"params: one has shape {tuple(found.shape)}, and Muon is for hidden matrices. Give names, "
            "model.named_parameters(), by which embeddings and heads are told from these and left to AdamW; or groups "
            "that say use_muon=True or False"
        )
