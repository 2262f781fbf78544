"""What a run is made of: the model in the strategy's dtype, its optimizer, its data."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel

from collage import fp8
from collage.harness.tasks import recipes, weights
from collage.harness.tasks.data import Corpus, Tokens
from collage.harness.tasks.examples import Examples, Rows
from collage.harness.tasks.games import Game
from collage.harness.tasks.masks import CausalBlocks, MaskedBlocks
from collage.harness.tasks.material import Data
from collage.harness.tasks.pretrained import PUBLISHED
from collage.harness.train import choice
from collage.harness.train.config import RunConfig
from collage.optimizers.base import PrecisionOptimizer
from collage.strategies import Strategy

Samples: TypeAlias = "Rows | CausalBlocks | MaskedBlocks"


def model_of(config: RunConfig, corpus: Data, init: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The recipe's model, its parameters rounded to bf16 and held in the strategy's dtype; its buffers as they are.

    Every strategy starts from the same rounded weights, those in float32 too; those of linear layers that are e4m3 keep
    what that cuts off for the optimizer to begin with. `init` replaces the random weights.
    """
    model = _fresh(config, corpus.tokens if isinstance(corpus, Corpus) else None)
    if init is not None:
        _take(model, init)
    strategy = Strategy.parse(config.strategy)
    for p in model.parameters():
        p.data = p.data.bfloat16().to(strategy.beside.dtype)
    if strategy.beside is not strategy:
        fp8.convert(model)
    return model


def require_fit(config: RunConfig, init: Mapping[str, Tensor]) -> None:
    """Raises ValueError if the weights are not those of the run's model. Allocates no model, reads no text."""
    tokens = None if config.recipe.objective in ("classes", "policy") else config.tokens()
    _matched(_fresh(config, tokens, device="meta"), init)


def _fresh(config: RunConfig, tokens: Tokens | None, device: str | None = None) -> PreTrainedModel:
    """tokens: None of a model that does not predict any."""
    if tokens is None:
        return recipes.build(config.model, seed=config.seed, device=device)
    pad_id = tokens.pad_id if config.tokenizer else None
    return recipes.build(config.model, tokens.vocab_size, seed=config.seed, device=device, pad_id=pad_id)


@torch.no_grad()
def _take(model: nn.Module, init: Mapping[str, Tensor]) -> None:
    for p, value in _matched(model, init):
        p.copy_(value)


def _matched(model: nn.Module, init: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter and its weights, by name; a tied parameter may be there under any of its names."""
    matched: list[tuple[nn.Parameter, Tensor]] = []
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    for p, known in names.items():
        value = next((init[name] for name in known if name in init), None)
        if value is None:
            raise ValueError(f"--init: has no weight '{known[0]}'; give the weights of a model of the same recipe")
        if value.shape != p.shape:
            raise ValueError(
                f"--init: weight '{known[0]}' has shape {tuple(value.shape)}, the model's is {tuple(p.shape)}; "
                "give the same --model and --tokenizer as it was trained with"
            )
        matched.append((p, value))
    return matched


def start(config: RunConfig) -> Mapping[str, Tensor] | None:
    """The weights to start from: those of `config.init`, published ones, or None: random."""
    if config.init:
        return read_weights(config.init)
    published = PUBLISHED.get(config.model)
    return published.weights(config.seed) if published else None


def read_weights(path: str) -> dict[str, Tensor]:
    """The weights in a safetensors file, a state dict, or the folder of a transformers model."""
    return {entry.name: entry.tensor for entry in weights.read(Path(path)) if entry.tensor is not None}


def optimizer_of(config: RunConfig, model: nn.Module) -> PrecisionOptimizer:
    """The run's, on all parameters. In BERTs biases and norm weights do not decay, as they were published."""
    kinds = {name: weights.kind_of(name) for name, _ in model.named_parameters()}
    sparing = config.recipe.family in ("bert", "roberta", "bert-classifier") and config.weight_decay is not None
    spared = {name for name, kind in kinds.items() if sparing and (kind == "norm" or name.endswith("bias"))}
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [{"params": [(name, p) for name, p in named if name not in spared]}]
    if spared:
        groups.append({"params": [(name, p) for name, p in named if name in spared], "weight_decay": 0.0})
    return choice.made(vars(config), groups)


def require_enough(config: RunConfig, data: Data, flag: str = "--data") -> None:
    """Raises ValueError if there is too little for a step; a game never ends."""
    if not isinstance(data, Game):
        datasets(config, data, flag)


def datasets(config: RunConfig, corpus: Corpus | Examples, flag: str = "--data") -> tuple[Samples, Subset[Any]]:
    """What is trained on, windows of text or examples, and a fixed sample of what is held out, spread evenly over it.

    Raises:
        ValueError: too little text for a step or for one window; ``flag`` says where it was given.
    """
    if isinstance(corpus, Examples):
        train: Samples = Rows(corpus.train)
        held_out: Samples = Rows(corpus.validation)
    else:
        train, held_out = _windows(config, corpus, flag)
    if len(train) < config.batch_size:
        raise ValueError(_too_few(config, corpus, len(train), flag))
    # Whole batches only: Trainer drops a short last one.
    count = min(config.eval_sequences, len(held_out))
    count = max(count - count % eval_batch(config, held_out), 1)
    return train, Subset(held_out, [i * len(held_out) // count for i in range(count)])


def _too_few(config: RunConfig, corpus: Corpus | Examples, count: int, flag: str) -> str:
    if isinstance(corpus, Examples):
        return f"--batch-size: {corpus.name} has {count} examples to train on, fewer than a step's {config.batch_size}"
    return (
        f"{flag}: {len(corpus.train):,} tokens are {count} windows of {config.seq_len}, fewer than a step's "
        f"{config.batch_size}; give more text, or a smaller --batch-size or --seq-len"
    )


def _windows(config: RunConfig, corpus: Corpus, flag: str) -> tuple[Samples, Samples]:
    """Of the text that is trained on, and of that which is held out."""
    held_out_flag = "--validation" if corpus.validation_files else f"validation, the last tenth of {flag}"
    for name, ids in ((flag, corpus.train), (held_out_flag, corpus.validation)):
        if len(ids) < config.seq_len:
            raise ValueError(
                f"{name}: {len(ids):,} tokens do not fill one window of {config.seq_len}; give more text, or a smaller "
                "--seq-len"
            )
    if config.recipe.objective == "causal":
        return CausalBlocks(corpus.train, config.seq_len), CausalBlocks(corpus.validation, config.seq_len)
    return (
        MaskedBlocks(corpus.train, config.seq_len, corpus.tokens, config.seed),
        MaskedBlocks(corpus.validation, config.seq_len, corpus.tokens, fixed=True),
    )


def eval_batch(config: RunConfig, held_out: Sized) -> int:
    """Sequences per forward pass of an evaluation."""
    return min(config.micro_batch, config.eval_sequences, len(held_out))
