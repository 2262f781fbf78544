"""What can be planned for: recipes, well-known models, a transformers configuration, or a file of weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from collage.harness.tasks import weights
from collage.harness.tasks.recipe import Recipe
from collage.harness.tasks.recipes import RECIPES, build

_UNDROPPED = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}

# Name -> (kind of transformers' configuration, where it differs from that kind's defaults). Nothing is downloaded.
KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": ("gpt2", _UNDROPPED),
    "gpt2-medium": ("gpt2", {**_UNDROPPED, "n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {**_UNDROPPED, "n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("gpt2", {**_UNDROPPED, "n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-2-7b": ("llama", {"max_position_embeddings": 4096}),
    "llama-2-13b": (
        "llama",
        {"max_position_embeddings": 4096, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
         "num_attention_heads": 40, "num_key_value_heads": 40},
    ),
    "llama-3-8b": (
        "llama",
        {"vocab_size": 128256, "max_position_embeddings": 8192, "intermediate_size": 14336, "num_key_value_heads": 8},
    ),
    "llama-3-70b": (
        "llama",
        {"vocab_size": 128256, "max_position_embeddings": 8192, "hidden_size": 8192, "intermediate_size": 28672,
         "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    ),
}  # fmt: skip
CONFIG = "config.json"
LONGEST = 2048  # tokens of a sequence, if nothing is said


class Model(NamedTuple):
    """Something to plan for.

    build: makes it, on a device ("meta": without memory), its parameters in a dtype.
    sequences, length: what a rank computes at a time if nothing is said; 0 sequences: nothing can be computed.
    longest: sequence it takes.
    """

    name: str
    build: Callable[[str, torch.dtype], nn.Module]
    sequences: int
    length: int
    longest: int


def find(name: str) -> Model:
    """The model of that name, or at that path.

    Raises:
        FileNotFoundError, ValueError: there is none, or none that can be planned for.
    """
    if name in RECIPES:
        return _of_recipe(RECIPES[name])
    if name in KNOWN:
        kind, settings = KNOWN[name]
        return _of_settings(name, {"model_type": kind, **settings})
    path = Path(name)
    if not path.exists():
        known = ", ".join((*RECIPES, *KNOWN))
        raise FileNotFoundError(
            f"MODEL '{name}': no such recipe, model, file or folder (nothing is downloaded); known names: {known}"
        )
    config = path / CONFIG if path.is_dir() else path
    if config.suffix == ".json" and config.exists() and not config.name.endswith(".index.json"):
        return _of_settings(name, _read(config))
    return _of_shapes(name, [entry.tensor.shape for entry in weights.read(path) if entry.tensor is not None])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"MODEL '{path}': not JSON ({error})") from None
    if not isinstance(found, dict) or "model_type" not in found:
        raise ValueError(f"MODEL '{path}': not a configuration of transformers: it has no 'model_type'")
    return found


def _of_recipe(recipe: Recipe) -> Model:
    model, phase = build(recipe, device="meta"), recipe.phases[-1]
    if recipe.objective not in ("causal", "masked"):  # it takes no tokens alone: its weights and states are told
        return _of_shapes(recipe.name, [p.shape for p in model.parameters()])
    config = model.config
    make = partial(_language_model, config, recipe.objective == "masked")
    return Model(recipe.name, make, phase.micro_batch, phase.seq_len, recipe.positions)


def _of_settings(name: str, settings: dict[str, Any]) -> Model:
    """A masked language model if its architecture says so, else a causal one."""
    from transformers import AutoConfig

    masked = any("MaskedLM" in architecture for architecture in settings.get("architectures") or ())
    try:
        config = AutoConfig.for_model(**{**settings, "use_cache": False})
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"MODEL '{name}': not a configuration that transformers knows: {error}") from None
    longest = getattr(config, "max_position_embeddings", None) or LONGEST
    return Model(name, partial(_language_model, config, masked), 1, min(longest, LONGEST), longest)


def _language_model(config: Any, masked: bool, device: str, dtype: torch.dtype) -> nn.Module:
    """Drawn in its dtype: no copy in float32 is ever there."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    with torch.device(device):
        model: nn.Module = auto.from_config(config, dtype=dtype)
    if not masked:
        model.loss_type = "ForCausalLM"  # type: ignore[assignment]  # of GPT-2's class transformers cannot tell, and warns
    return model.train()


class _Bare(nn.Module):
    """Parameters of a file, in no order that a forward pass would know."""

    def __init__(self, shapes: Iterable[tuple[int, ...]], device: str, dtype: torch.dtype) -> None:
        super().__init__()
        empty = (torch.empty(shape, device=device, dtype=dtype) for shape in shapes)
        self.weights = nn.ParameterList(nn.Parameter(x) for x in empty)


def _of_shapes(name: str, shapes: list[tuple[int, ...]]) -> Model:
    if not shapes:
        raise ValueError(f"MODEL '{name}': no floating-point weights in it")
    return Model(name, lambda device, dtype: _Bare(shapes, device, dtype), 0, 0, 0)
