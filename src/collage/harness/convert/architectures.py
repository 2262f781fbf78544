"""The order of a transformers model's parameters, by which an optimizer without names has numbered them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn


def in_order(path: Path, groups: int) -> list[str] | None:
    """The names of the parameters as an optimizer was given them: in the model's order, or in Trainer's two groups.

    None where the folder says nothing of the model's class, or for other groups. No code of the folder is run.
    """
    model = _built(path) if path.is_dir() else None
    if model is None or groups > 2:
        return None
    names = [name for name, _ in model.named_parameters()]
    if groups == 1:
        return names
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    return [name for name in names if name in decayed] + [name for name in names if name not in decayed]


def _built(folder: Path) -> nn.Module | None:
    """The model that config.json describes, without memory; None: it is none of transformers'."""
    import transformers

    try:
        (name,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        kind = getattr(transformers, name)
        with torch.device("meta"):
            built: nn.Module = kind(kind.config_class.from_pretrained(folder))
            return built
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
