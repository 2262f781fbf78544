"""What a recipe is: an architecture and the settings it is trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["gpt", "llama", "bert", "roberta", "bert-classifier", "vit", "resnet", "actor-critic"]
Objective = Literal["causal", "masked", "classes", "policy"]
Schedule = Literal["linear", "cosine-to-a-tenth"]


@dataclass(frozen=True)
class Phase:
    """One stretch of training at one sequence length; its own warm-up and decay."""

    seq_len: int
    lr: float  # peak, after the warm-up
    warmup_steps: int
    steps: int  # the published length; two phases share a shorter run in this proportion
    batch: int  # sequences per optimizer step, over all devices
    micro_batch: int  # sequences per forward pass on one device


@dataclass(frozen=True)
class Recipe:
    """An architecture and the settings it is trained with.

    Of a model of images, `vocab` is how many classes it tells apart, and `positions` and `seq_len` are the pixels of a
    side. Of one that plays a game, `vocab` is how many actions it chooses from, and `positions` and `seq_len` are the
    numbers of an observation.
    """

    name: str
    family: Family
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    positions: int  # longest sequence
    phases: tuple[Phase, ...]
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    schedule: Schedule
    max_grad_norm: float = 1.0
    dropout: float = 0.0
    init_std: float = 0.02  # of the normal weights
    pad_id: int | None = None  # its embedding is never trained; RoBERTa counts positions from it
    others: Mapping[str, Any] = field(default_factory=dict)  # settings of a language model's configuration

    @property
    def objective(self) -> Objective:
        return _OBJECTIVES[self.family]

    @property
    def of_images(self) -> bool:
        return self.family in ("vit", "resnet")

    @property
    def convertible(self) -> bool:
        """Whether `collage.fp8.convert` finds linear layers beside its head: not transformers' Conv1D of a GPT-2."""
        return self.family not in ("gpt", "resnet")

    @property
    def plays(self) -> bool:
        return self.objective == "policy"


_OBJECTIVES: dict[Family, Objective] = {
    "gpt": "causal",
    "llama": "causal",
    "bert": "masked",
    "roberta": "masked",
    "bert-classifier": "classes",
    "vit": "classes",
    "resnet": "classes",
    "actor-critic": "policy",
}
