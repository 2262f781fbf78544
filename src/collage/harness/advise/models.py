"""The weights that `collage advise` looks at: of a file, or of a recipe's or well-known model before it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from collage.advice import weights
from collage.advice.weights import Entry, Weights, gathered
from collage.harness.plan import models as planned
from collage.harness.tasks.pretrained import PUBLISHED
from collage.harness.tasks.recipes import RECIPES, build, get_recipe
from collage.harness.tasks.weights import ACCEPTED as FILES
from collage.harness.tasks.weights import kind_of, read

NAMES = (*RECIPES, *planned.KNOWN)
ACCEPTED = f"{FILES}; or a recipe or model by name, as it is before training or was published ({', '.join(NAMES)})"
SMALL = 10**7  # parameters: of larger recipes and models the weights are drawn, a sample of each
DRAWN = 1 << 14  # numbers of a parameter
STD = 0.02  # of normal weights, as GPT-2, Llama and BERT begin


def find(name: str) -> Weights:
    """The weights of that name, or at that path.

    Raises:
        FileNotFoundError: there are none; the known names are listed. ValueError: a file of another kind.
    """
    if name in NAMES:
        return _by_name(name)
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(
            f"MODEL_OR_RECIPE '{name}': no such recipe, file or folder (nothing is downloaded); known names: "
            + ", ".join(NAMES)
        )
    return gathered((e.name, tuple(e.tensor.shape), e.tensor) for e in read(path) if e.tensor is not None)


def _by_name(name: str) -> Weights:
    if name in PUBLISHED:
        return weights.of(PUBLISHED[name].weights(0))
    model = build(name, device="meta") if name in RECIPES else planned.find(name).build("meta", torch.float32)
    if name in RECIPES and sum(param.numel() for param in model.parameters()) <= SMALL:
        return weights.of(build(name))
    std = get_recipe(name).init_std if name in RECIPES else STD
    return gathered(_drawn(model, std))


def _drawn(model: nn.Module, std: float) -> Iterator[Entry]:
    """As models begin: norms at 1, biases at 0, everything else normal."""
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        yield name, tuple(param.shape), _beginning(name, param, std, generator)


def _beginning(name: str, param: Tensor, std: float, generator: torch.Generator) -> Tensor:
    columns = param[:1].numel() if param.dim() > 1 else 1
    shape = (min(len(param), DRAWN),) if param.dim() < 2 else (min(len(param), max(1, DRAWN // columns)), columns)
    kind = kind_of(name)
    if kind == "norm":
        return torch.ones(shape)
    return torch.zeros(shape) if kind == "bias" else std * torch.randn(shape, generator=generator)
