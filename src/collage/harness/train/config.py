"""The settings of one training run: defaults from the model's recipe, checked before anything is built."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch

from collage.harness import options
from collage.harness.options import option
from collage.harness.tasks.data import Tokens
from collage.harness.tasks.material import Data, material, require_fitting, tokens_of
from collage.harness.tasks.recipe import Recipe
from collage.harness.tasks.recipe import Schedule as RecipeSchedule
from collage.harness.tasks.recipes import RECIPES, get_recipe, require_convertible
from collage.harness.tasks.registry import FINETUNE_LR
from collage.harness.train import choice
from collage.harness.train.computing import has_bf16_matrix_units

SCHEDULES = (*get_args(RecipeSchedule), "constant")
COMPUTE = ("auto", "fp32", "bf16")

# The groups of the options. Those of RUNS are any run's; OWN and KEPT are of `collage train` alone.
OWN, KEPT = "this run", "checkpoints"
WHAT, TEXT, HOW, WATCH = RUNS = ("what is trained", "text", "how (defaults: the model's recipe)", "what is measured")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of `collage train`. Make it with `RunConfig.of`, which takes what is not given from the recipe.

    Raises:
        ValueError: a value out of range, an unknown name or a missing file; which, what is allowed, and the fix.
    """

    strategy: str = option(OWN, "as `collage info` lists them", "collage-plus", metavar="NAME")
    out: Path = option(OWN, "of everything: checkpoints, logs, weights", metavar="DIR", free=True)
    init: str | None = option(OWN, "weights to start from: a file or folder (default: random)", None, metavar="PATH")
    finetune: bool = option(
        OWN, "the embedded Python source instead of the novels, at a constant lr, AdamW's 1e-5", False
    )
    beside: tuple[str, ...] = option(
        OWN, "also tell what these would have lost on this very run", (), metavar="STRATEGY", free=True
    )

    shard: bool = option(
        OWN, "under torchrun: split weights and optimizer state over the processes (FSDP2)", False, free=True
    )

    save_every: int = option(KEPT, "steps; 0: never, as of a policy (default: 100)", 0, least=0, free=True)
    keep: int = option(KEPT, "the newest N", 2, least=1, free=True)
    resume: bool = option(KEPT, "go on from the newest complete checkpoint in --out", False, free=True)

    model: str = option(WHAT, ", ".join(RECIPES), "tiny-llama", metavar="NAME")
    phase: int = option(WHAT, "of a recipe with several, as BERT's", 1, free=True)
    seed: int = option(WHAT, "of weights, batches, masks and rounding", 0, least=0)

    data: tuple[str, ...] = option(TEXT, "text files or folders (default: embedded novels)", (), metavar="PATH")
    validation: tuple[str, ...] = option(
        TEXT, "text to be judged by (default: the last tenth of the data)", (), metavar="PATH"
    )
    tokenizer: str | None = option(TEXT, "a JSON file of the tokenizers library (default: bytes)", None, metavar="FILE")

    steps: int = option(HOW, "optimizer steps", least=1)
    batch_size: int = option(HOW, "sequences per step", least=1)
    micro_batch: int = option(HOW, "sequences per forward pass; a step adds them up", least=1)
    seq_len: int = option(HOW, "tokens per sequence", least=2)
    optimizer: str = option(HOW, choice.OPTIMIZERS, "adamw", metavar="NAME")
    optimizer_args: tuple[str, ...] = option(
        HOW, "other settings of the optimizer, as momentum=0.9 nesterov=true", (), metavar="NAME=VALUE"
    )
    lr: float = option(HOW, choice.LR)
    betas: tuple[float, float] | None = option(HOW, "decay rates of the moments", metavar=("B1", "B2"))
    eps: float | None = option(HOW, "added to the root of the second moment")
    weight_decay: float | None = option(HOW, "as the optimizer has it: decoupled in AdamW, Lion and Muon, else L2")
    max_grad_norm: float = option(HOW, "gradients are clipped to it; 0: not at all")
    schedule: str = option(HOW, "of the learning rate, after the warm-up", choices=SCHEDULES)
    warmup_steps: int = option(HOW, "of the learning rate", least=0)
    compute: str = option(
        HOW,
        "arithmetic of forward and backward; auto: bf16 where the hardware multiplies matrices in it",
        "auto",
        choices=COMPUTE,
    )

    every: int = option(WATCH, "measure EDQ and log: step 1 and every Nth", 10, least=1, free=True)
    shadow: int = option(WATCH, "follow one weight in N in fp32; 0: none", 256, least=0, free=True)
    eval_every: int = option(WATCH, "steps between evaluations; 0: only at both ends", 0, least=0, free=True)
    eval_sequences: int = option(WATCH, "of the validation text, the same each time", 256, least=1, free=True)

    def __post_init__(self) -> None:
        _require_whole(self)
        _require_positive(self)
        if self.betas is not None and not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas: both need to be in [0, 1), got {self.betas[0]:g} and {self.betas[1]:g}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} are more than the {self.steps} of --steps")
        _require_known("schedule", self.schedule, SCHEDULES)
        _require_known("compute", self.compute, COMPUTE)
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch: must divide batch_size, got {self.micro_batch} and {self.batch_size}; "
                "sequences of a step are processed micro_batch at a time"
            )
        longest = self.recipe.positions
        if self.seq_len > longest:
            raise ValueError(f"seq_len: '{self.model}' has {longest} positions, got {self.seq_len}; at most {longest}")
        require_fitting(vars(self))
        require_convertible(self.model, self.strategy)
        choice.require_makeable(vars(self))

    @classmethod
    def of(cls, model: str, out: Path | str, **given: Any) -> RunConfig:
        """The recipe's settings, with those that are given and not None instead.

        Args:
            model: a name in `recipes.RECIPES`.
            out: folder of the checkpoints and results.
            **given: any field; phase: which stretch of the recipe, from 1.
        """
        chosen = {key: value for key, value in given.items() if value is not None}
        recipe, phase = get_recipe(model), chosen.get("phase", cls.phase)
        if not 1 <= phase <= len(recipe.phases):
            raise ValueError(f"phase: '{model}' has {len(recipe.phases)}, counted from 1, got {phase}")
        stage = recipe.phases[phase - 1]
        finetune = chosen.get("finetune", False)
        settings: dict[str, Any] = {
            "steps": stage.steps, "batch_size": stage.batch, "seq_len": stage.seq_len,
            "max_grad_norm": recipe.max_grad_norm, "schedule": "constant" if finetune else recipe.schedule,
        }  # fmt: skip
        lr = FINETUNE_LR if finetune else stage.lr
        adamws = {"lr": lr, "betas": recipe.betas, "eps": recipe.eps, "weight_decay": recipe.weight_decay}
        settings |= {**chosen, **choice.chosen(chosen.get("optimizer", cls.optimizer), adamws, chosen)}
        settings["strategy"] = options.strategy("strategy", chosen.get("strategy", cls.strategy))
        settings["beside"] = tuple(options.strategy("beside", name) for name in chosen.get("beside", ()))
        batch, steps = settings["batch_size"], settings["steps"]
        whole = batch <= stage.micro_batch or recipe.plays
        settings.setdefault("micro_batch", batch if whole else math.gcd(batch, stage.micro_batch))
        # A shorter run warms up for the same share of its steps as the published one, or less.
        settings.setdefault("warmup_steps", min(stage.warmup_steps, max(1, steps // 10)))
        return cls(model=model, out=Path(out), **settings)

    @classmethod
    def from_options(cls, args: argparse.Namespace, **settings: Any) -> RunConfig:
        """Of a command line; `settings` are used where an option was not given. Errors name the flag."""
        with options.flags_named(cls):
            return cls.of(**{**settings, **options.given(args, cls)})

    @property
    def recipe(self) -> Recipe:
        return get_recipe(self.model)

    @property
    def tokens_per_step(self) -> int:
        """Of an image one, and of a move."""
        return self.batch_size * (1 if self.recipe.of_images or self.recipe.plays else self.seq_len)

    def compute_dtype(self) -> torch.dtype:
        """dtype of forward and backward; "auto" is float32 on a CPU without bf16 matrix units."""
        bf16 = self.compute == "bf16" or (self.compute == "auto" and has_bf16_matrix_units())
        return torch.bfloat16 if bf16 else torch.float32

    def lr_scale(self, step: int) -> float:
        """The share of the peak lr at a step, from 0: a linear warm-up from 1 / warmup_steps, then the schedule."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.schedule == "linear":
            return max(0.0, 1.0 - done)
        if self.schedule == "cosine-to-a-tenth":
            return 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return 1.0

    def tokens(self) -> Tokens:
        """The vocabulary of the text: that of published weights, the given one, or bytes."""
        return tokens_of(vars(self))

    def corpus(self) -> Data:
        """What is trained on: text, a classifier's examples, or a policy's game."""
        return material(vars(self))

    def share(self, processes: int) -> tuple[int, int]:
        """Sequences per forward pass, and passes per step, of each of several processes that share the batch.

        Raises ValueError if they cannot share it evenly.
        """
        if self.batch_size % processes:
            raise ValueError(
                f"batch_size: {self.batch_size} sequences cannot be shared evenly by {processes} processes; give a "
                f"multiple of {processes}, or start another number of them"
            )
        own = self.batch_size // processes
        micro = math.gcd(self.micro_batch, own)
        return micro, own // micro

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {**plain, "out": str(self.out)}

    def bound(self) -> dict[str, Any]:
        """What changes a bit of the weights: the run that continues another has the same."""
        free = {f.name for f in fields(self) if f.metadata["free"]}
        return {key: value for key, value in self.to_dict().items() if key not in free}

    def require_same_run(self, saved: Mapping[str, Any], what: str = "the run") -> None:
        """Raises ValueError if continuing the run with the saved settings under these would change what it computes."""
        known = {**_of_earlier_runs(), **saved}
        different = [(key, known.get(key), ours) for key, ours in self.bound().items() if known.get(key) != ours]
        if different:
            pairs = "; ".join(f"{key}: saved {theirs!r}, here {ours!r}" for key, theirs, ours in different)
            raise ValueError(
                f"--resume: {what} in '{self.out}' has other settings ({pairs}); give the saved ones, or choose "
                "another --out and start there"
            )


def _of_earlier_runs() -> dict[str, Any]:
    """What was so, under another option's name or none, before there was an option for it."""
    return {"optimizer": RunConfig.optimizer, "optimizer_args": []}


def _require_whole(config: RunConfig) -> None:
    for f in fields(config):
        value, least = getattr(config, f.name), f.metadata["least"]
        if least is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{f.name}: needs an integer >= {least}, got {value!r}")


def _require_positive(config: RunConfig) -> None:
    for name, zero in (("lr", False), ("eps", True), ("weight_decay", True), ("max_grad_norm", True)):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
            raise ValueError(f"{name}: needs a finite number {'>= 0' if zero else '> 0'}, got {value!r}")


def _require_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: unknown {value!r}; known: {', '.join(known)}")
