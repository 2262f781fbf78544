"""What a comparison can be about: the tasks, one row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from collage.harness.tasks.pretrained import PUBLISHED
from collage.harness.tasks.recipes import RECIPES

FINETUNE_LR = 1e-5


@dataclass(frozen=True)
class Loss:
    """How a task's losses are told."""

    says: str = "validation"  # what the one is that a run is judged by
    unit: str = "nats"
    digits: int = 4  # after the point
    training: str = "nats"  # unit of the one that is trained on
    samples: str = "tokens"  # what a run takes so many of in a second


@dataclass(frozen=True)
class Score:
    """A measure of a task beside its loss. More is better."""

    name: str
    percent: bool = False  # a share


@dataclass(frozen=True)
class Task:
    """Something to train models for.

    Args:
        name: on the command line.
        title: in the heading of what it gave.
        says: what is trained on what, in a line.
        models: the recipes that it may train, first the default.
        steps: of a run, unless given.
        settings: those of a run, by field of RunConfig, that are not the recipe's.
        warm_up: whether a run goes on from a warm-up by AdamW under float32 masters, on the recipe's own text.
        pretrained: whether it goes on from published weights.
        loss: how it is told.
        score: None: it has the loss alone.
        needs: module -> extra of this package that installs it.
    """

    name: str
    title: str
    says: str
    models: tuple[str, ...]
    steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    warm_up: bool = False
    pretrained: bool = False
    loss: Loss = field(default_factory=Loss)
    score: Score | None = None
    needs: Mapping[str, str] = field(default_factory=dict)

    def require(self) -> None:
        """Raises ValueError, with the command that installs it, if a package is missing."""
        for module, extra in self.needs.items():
            if find_spec(module) is None:
                raise ValueError(
                    f"task '{self.name}': needs the package {module}: install it with `pip install "
                    f"'collage-optim[{extra}]'`"
                )


_FRESH = [name for name in RECIPES if name not in PUBLISHED]
_OF_TEXT = [name for name in _FRESH if RECIPES[name].objective in ("causal", "masked")]
_LANGUAGE = tuple(sorted(_OF_TEXT, key=lambda name: name != "tiny-llama"))  # the default before the others

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "pretrain", "Training from scratch", "language models from random weights on novels",
            _LANGUAGE, steps=300,
        ),
        Task(
            "finetune", "Fine-tuning",
            f"the same go on with Python source after a warm-up, AdamW at lr {FINETUNE_LR:g}",
            _LANGUAGE, steps=120, settings={"finetune": True}, warm_up=True,
        ),
        Task(
            "classify", "Sentence classification", "published weights of MiniLM learn whether a film review praises",
            ("minilm",), steps=150,
            settings={"eval_sequences": 1024}, pretrained=True, score=Score("accuracy", percent=True),
        ),
        Task(
            "continue", "Continued training",
            f"published weights of SmolLM2 go on with Python source, AdamW at lr {FINETUNE_LR:g}",
            ("smollm2-135m",), steps=30, settings={"finetune": True, "eval_sequences": 32}, pretrained=True,
        ),
        Task(
            "vision", "Image classification", "a small ViT or ResNet on images of ten classes",
            ("tiny-resnet", "tiny-vit"), steps=200,
            settings={"eval_sequences": 360}, needs={"sklearn": "vision"}, score=Score("accuracy", percent=True),
            loss=Loss(samples="images"),
        ),
        Task(
            "rl", "Reinforcement learning", "PPO: a policy of 16 bits that plays CartPole or Acrobot",
            ("cartpole", "acrobot"), steps=800,
            settings={"eval_sequences": 64}, needs={"gymnasium": "rl"}, score=Score("return"),
            loss=Loss("minus the mean", "points of return", digits=1, training="PPO's", samples="moves"),
        ),
    )
}  # fmt: skip


def require_installed(model: str) -> None:
    """Raises ValueError, with the command that installs it, if a package that a recipe's tasks need is missing."""
    for task in TASKS.values():
        if model in task.models:
            task.require()


def get_task(name: str) -> Task:
    """The row of `TASKS` with this name."""
    if name not in TASKS:
        raise ValueError(f"--task: unknown {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]
