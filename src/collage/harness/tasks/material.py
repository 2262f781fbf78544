"""What a run is trained on: text, examples or a game, and which settings go with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from collage.harness.tasks import images
from collage.harness.tasks.data import (
    Corpus,
    Tokens,
    byte_tokens,
    default_corpus,
    finetune_corpus,
    read_corpus,
    tokenizer_tokens,
)
from collage.harness.tasks.examples import Examples
from collage.harness.tasks.games import GAMES, Game, require_playable
from collage.harness.tasks.pretrained import PUBLISHED, reviews
from collage.harness.tasks.recipes import get_recipe

Data: TypeAlias = "Corpus | Examples | Game"
Run: TypeAlias = "Mapping[str, Any]"  # the fields of a RunConfig


def require_fitting(run: Run) -> None:
    """Raises ValueError for settings of text where there is a game, images, sentences, or a vocabulary already."""
    recipe, model = get_recipe(run["model"]), run["model"]
    if recipe.plays:
        require_playable(run, recipe.positions)
    if run["tokenizer"] and model in PUBLISHED:
        raise ValueError(f"tokenizer: '{model}' has a vocabulary of its own; leave it out")
    if recipe.of_images:
        _require_images(run, recipe.positions)
    elif run["finetune"] and recipe.objective == "classes":
        raise ValueError(f"finetune: '{model}' tells sentences apart, and has no use for source; leave it out")


def _require_images(run: Run, side: int) -> None:
    for name in ("validation", "tokenizer", "finetune"):
        if run[name]:
            raise ValueError(f"{name}: '{run['model']}' is trained on images, not on text; leave it out")
    if run["seq_len"] != side:
        raise ValueError(f"seq_len: '{run['model']}' takes images of {side} x {side} pixels; leave it out")


def tokens_of(run: Run) -> Tokens:
    """The vocabulary of the text: that of published weights, the given one, or bytes."""
    published = PUBLISHED.get(run["model"])
    if published and published.tokens:
        return published.tokens()
    return tokenizer_tokens(run["tokenizer"]) if run["tokenizer"] else byte_tokens()


def material(run: Run) -> Data:
    """The text, the given one or the embedded one of the regime; of a classifier its examples, of a policy its game."""
    recipe = get_recipe(run["model"])
    if recipe.plays:
        return GAMES[run["model"]]
    if recipe.of_images:
        return images.examples(run["data"])
    if run["validation"] and not run["data"]:
        raise ValueError("validation: given without data; give both, or neither for the embedded texts")
    if recipe.objective == "classes":
        return reviews.examples(run["data"], run["validation"], run["seq_len"])
    tokens = tokens_of(run)
    if run["data"]:
        return read_corpus(run["data"], run["validation"] or None, tokens)
    return finetune_corpus(tokens) if run["finetune"] else default_corpus(tokens)
