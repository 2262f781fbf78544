"""Published weights, their vocabularies and labelled text, out of packages and files that install without a hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from collage.harness.tasks.data import Tokens
from collage.harness.tasks.pretrained import minilm, smollm2


@dataclass(frozen=True)
class Published:
    """What a recipe starts from. Both raise ValueError, with the command that installs it, for a missing package.

    Args:
        weights: of a run with this seed, by the names of the recipe's model.
        tokens: its vocabulary; None: of whole examples, which `reviews` makes.
    """

    weights: Callable[[int], dict[str, Tensor]]
    tokens: Callable[[], Tokens] | None


PUBLISHED: dict[str, Published] = {  # by the recipe's name
    "minilm": Published(minilm.weights, None),
    "smollm2-135m": Published(smollm2.weights, smollm2.tokens),
}
