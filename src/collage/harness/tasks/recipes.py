"""Models and their training settings as a table of data, and one function that builds any row of it.

Every model is made from a transformers configuration with random weights; nothing is ever downloaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from collage.harness.tasks.families import FAMILIES
from collage.harness.tasks.recipe import Phase, Recipe
from collage.strategies import Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# About a million parameters over the vocabulary of `data.byte_tokens`, and 2,048 bytes a step. No dropout, so that
# strategies differ in rounding alone. Shapes that soon leave the plateau of mere byte frequencies: wide rather than
# deep, large first weights, and short windows where positions are learned, shorter still where 15 % of the bytes teach.
_TINY_LLAMA = Recipe(
    name="tiny-llama", family="llama", hidden=192, layers=2, heads=3, intermediate=512, vocab=264, positions=128,
    phases=(Phase(seq_len=128, lr=1e-3, warmup_steps=20, steps=600, batch=16, micro_batch=16),),
    betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, schedule="cosine-to-a-tenth", init_std=0.05, pad_id=0,
)  # fmt: skip
_TINY_GPT = replace(
    _TINY_LLAMA, name="tiny-gpt", family="gpt", intermediate=768, positions=64,
    phases=(Phase(seq_len=64, lr=1e-3, warmup_steps=20, steps=600, batch=32, micro_batch=32),),
)  # fmt: skip
_TINY_BERT = replace(
    _TINY_GPT, name="tiny-bert", family="bert", positions=32,
    phases=(Phase(seq_len=32, lr=1e-3, warmup_steps=20, steps=600, batch=64, micro_batch=64),),
    eps=1e-6, weight_decay=0.01, schedule="linear",
)  # fmt: skip
_TINY_ROBERTA = replace(_TINY_BERT, name="tiny-roberta", family="roberta")

# Ten classes of 32 x 32 grey pixels. A batch is a divisor of what `images.digits` keeps for validation.
_TINY_VIT = Recipe(
    name="tiny-vit", family="vit", hidden=64, layers=4, heads=4, intermediate=128, vocab=10, positions=32,
    phases=(Phase(seq_len=32, lr=2e-3, warmup_steps=20, steps=300, batch=60, micro_batch=60),),
    betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, schedule="cosine-to-a-tenth", init_std=0.05,
)  # fmt: skip
_TINY_RESNET = replace(_TINY_VIT, name="tiny-resnet", family="resnet", hidden=32, layers=2, weight_decay=5e-4)

# Published weights: `tasks.pretrained` has them. The settings are those that people fine-tune with.
_MINILM = Recipe(
    name="minilm", family="bert-classifier", hidden=384, layers=6, heads=12, intermediate=1536, vocab=30522,
    positions=512, phases=(Phase(seq_len=40, lr=5e-5, warmup_steps=15, steps=150, batch=16, micro_batch=16),),
    betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, schedule="linear", dropout=0.1, pad_id=0,
)  # fmt: skip
_SMOLLM2_135M = Recipe(
    name="smollm2-135m", family="llama", hidden=576, layers=30, heads=9, intermediate=1536, vocab=49152,
    positions=8192, phases=(Phase(seq_len=96, lr=1e-5, warmup_steps=3, steps=30, batch=2, micro_batch=2),),
    betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, schedule="cosine-to-a-tenth",
    others={
        "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
)  # fmt: skip

# Policies of games; `games.GAMES` says how they play. A step has a part of a rollout, and goes through it at once.
_CARTPOLE = Recipe(
    name="cartpole", family="actor-critic", hidden=64, layers=2, heads=1, intermediate=64, vocab=2, positions=4,
    phases=(Phase(seq_len=4, lr=2e-3, warmup_steps=1, steps=800, batch=256, micro_batch=256),),
    betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, schedule="linear", max_grad_norm=0.5,
)  # fmt: skip
_ACROBOT = replace(
    _CARTPOLE, name="acrobot", vocab=3, positions=6,
    phases=(Phase(seq_len=6, lr=1e-3, warmup_steps=1, steps=600, batch=512, micro_batch=512),),
)  # fmt: skip

# BERT and RoBERTa as the paper trains them (its appendix and its published scripts): phase 1, then phase 2.
_BERT_BASE = Recipe(
    name="bert-base", family="bert", hidden=768, layers=12, heads=12, intermediate=3072, vocab=30522, positions=512,
    phases=(
        Phase(seq_len=128, lr=4e-4, warmup_steps=2000, steps=28125, batch=16384, micro_batch=128),
        Phase(seq_len=512, lr=2.8e-4, warmup_steps=781, steps=1563, batch=32768, micro_batch=16),
    ),
    betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, schedule="linear", dropout=0.1, pad_id=0,
)  # fmt: skip
_BERT_LARGE = replace(_BERT_BASE, name="bert-large", hidden=1024, layers=24, heads=16, intermediate=4096)
_ROBERTA_BASE = replace(
    _BERT_BASE,
    name="roberta-base",
    family="roberta",
    vocab=50265,
    phases=(Phase(seq_len=512, lr=6e-4, warmup_steps=2000, steps=28125, batch=8192, micro_batch=16),),
    betas=(0.9, 0.98),
    pad_id=1,
)


def _gpt(name: str, hidden: int, layers: int, heads: int, lr: float, batch: int, micro_batch: int) -> Recipe:
    """A GPT of the paper: the shapes of GPT-3, trained for 20,000 steps of 2,048-token sequences."""
    phase = Phase(2048, lr, warmup_steps=200, steps=20000, batch=batch, micro_batch=micro_batch)
    return Recipe(
        name, "gpt", hidden, layers, heads, intermediate=4 * hidden, vocab=50257, positions=2048, phases=(phase,),
        betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, schedule="cosine-to-a-tenth",
    )  # fmt: skip


# Llama-7B's published shape and settings (Touvron et al. 2023: a trillion tokens in batches of four million).
_OPENLLAMA_7B = Recipe(
    name="openllama-7b", family="llama", hidden=4096, layers=32, heads=32, intermediate=11008, vocab=32000,
    positions=2048, phases=(Phase(2048, 3e-4, warmup_steps=2000, steps=250_000, batch=2048, micro_batch=4),),
    betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, schedule="cosine-to-a-tenth",
)  # fmt: skip

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _TINY_GPT,
        _TINY_LLAMA,
        _TINY_BERT,
        _TINY_ROBERTA,
        _TINY_VIT,
        _TINY_RESNET,
        _MINILM,
        _SMOLLM2_135M,
        _CARTPOLE,
        _ACROBOT,
        _BERT_BASE,
        _BERT_LARGE,
        _ROBERTA_BASE,
        _gpt("gpt-125m", hidden=768, layers=12, heads=12, lr=6e-4, batch=1024, micro_batch=16),
        _gpt("gpt-1.3b", hidden=2048, layers=24, heads=16, lr=2e-4, batch=1024, micro_batch=16),
        _gpt("gpt-2.7b", hidden=2560, layers=32, heads=32, lr=1.6e-4, batch=512, micro_batch=8),
        _gpt("gpt-6.7b", hidden=4096, layers=32, heads=32, lr=1.2e-4, batch=256, micro_batch=4),
        # The paper only times its 30B model. Shape, lr and batch are those of OPT-30B (Zhang et al. 2022).
        _gpt("gpt-30b", hidden=7168, layers=48, heads=56, lr=1e-4, batch=2048, micro_batch=1),
        _OPENLLAMA_7B,
    )
}


def get_recipe(name: str) -> Recipe:
    """The row of `RECIPES` with this name."""
    if name not in RECIPES:
        raise ValueError(f"model {name!r}: no such recipe; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def require_convertible(model: str, strategy: str) -> None:
    """Raises ValueError, naming a recipe that it can train, for a strategy of e4m3 weights where none are made."""
    recipe = get_recipe(model)
    if recipe.convertible or Strategy.parse(strategy).dtype.itemsize > 1:
        return
    known = next(other.name for other in RECIPES.values() if other.convertible and other.objective == recipe.objective)
    raise ValueError(
        f"strategy: '{strategy}' trains e4m3 weights of linear layers, and '{model}' has none beside its output head; "
        f"give --model {known}, or another strategy"
    )


def build(
    recipe: Recipe | str,
    vocab_size: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    pad_id: int | None = None,
) -> PreTrainedModel:
    """A model with random float32 weights that depend on `seed` alone.

    Args:
        recipe: a row of `RECIPES`, or its name.
        vocab_size: rows of the embedding, `Tokens.vocab_size`; the recipe's own vocabulary by default.
        seq_len: length of the position table; the recipe's longest sequence by default.
        seed: of the weights. torch's global generators are left as they were.
        device: where the model ends up; torch's default device by default. Weights are drawn on the CPU, so they are
            the same everywhere; on "meta" nothing is allocated.
        pad_id: `Tokens.pad_id` of a vocabulary that is not the recipe's own; bytes need none.
    """
    base = get_recipe(recipe) if isinstance(recipe, str) else recipe
    shape = replace(
        base,
        vocab=base.vocab if vocab_size is None else vocab_size,
        positions=base.positions if seq_len is None else seq_len,
        pad_id=base.pad_id if pad_id is None else pad_id,
    )
    target = torch.get_default_device() if device is None else torch.device(device)
    with torch.random.fork_rng(devices=()), torch.device("meta" if target.type == "meta" else "cpu"):
        torch.default_generator.manual_seed(seed)
        model = nn.Module.float(FAMILIES[shape.family](shape))  # whatever torch's default dtype is
    return model if target.type == "meta" else nn.Module.to(model, target)
