"""The settings of one training run: defaults from the model's recipe, checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from collage.harness.tasks.data import (
    Corpus,
    Tokens,
    byte_tokens,
    default_corpus,
    finetune_corpus,
    read_corpus,
    tokenizer_tokens,
)
from collage.harness.tasks.recipes import Recipe, get_recipe
from collage.harness.tasks.recipes import Schedule as RecipeSchedule
from collage.strategies import Strategy

SCHEDULES = (*get_args(RecipeSchedule), "constant")
COMPUTE = ("auto", "fp32", "bf16")
FINETUNE_LR = 1e-5

# What may differ between a run and the one that continues it: nothing that changes a bit of the weights.
_FREE_ON_RESUME = ("out", "resume", "keep", "every", "shadow", "beside", "eval_every", "eval_sequences", "save_every")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of `collage train`. Make it with `RunConfig.of`, which takes what is not given from the recipe.

    Raises:
        ValueError: a value out of range, an unknown name or a missing file; which, what is allowed, and the fix.
    """

    model: str  # a recipe's name
    out: Path  # folder of the checkpoints and results
    strategy: str
    seed: int  # of the weights, the order of the data, the masks and stochastic rounding
    steps: int
    batch_size: int  # sequences per optimizer step
    micro_batch: int  # sequences per forward pass
    seq_len: int
    lr: float  # peak
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    schedule: str
    warmup_steps: int
    max_grad_norm: float
    data: tuple[str, ...] = ()  # text files and folders; none: the embedded corpus
    validation: tuple[str, ...] = ()
    tokenizer: str | None = None  # a tokenizers file; none: bytes
    finetune: bool = False  # the other embedded corpus, a small constant lr
    init: str | None = None  # weights to start from
    compute: str = "auto"  # arithmetic of forward and backward
    every: int = 10  # one monitored and logged step in this many
    shadow: int = 256  # the monitor follows one element in this many; 0: none
    beside: tuple[str, ...] = ()  # strategies run beside it on the shadow's sample
    eval_every: int = 0  # 0: before the first step and after the last alone
    eval_sequences: int = 256  # of the validation text, the same ones each time
    save_every: int = 0  # 0: no checkpoints
    keep: int = 2  # checkpoints
    resume: bool = False

    def __post_init__(self) -> None:
        Strategy.parse(self.strategy)
        for name in self.beside:
            Strategy.parse(name)
        _require_whole(self)
        _require_positive(self)
        for beta in self.betas:
            if not 0.0 <= beta < 1.0:
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
        longest = get_recipe(self.model).positions
        if self.seq_len > longest:
            raise ValueError(f"seq_len: '{self.model}' has {longest} positions, got {self.seq_len}; at most {longest}")

    @classmethod
    def of(cls, model: str, out: Path | str, *, phase: int = 1, **given: Any) -> RunConfig:
        """The recipe's settings, with those that are given and not None instead.

        Args:
            model: a name in `recipes.RECIPES`.
            out: folder of the checkpoints and results.
            phase: which stretch of the recipe, from 1.
            **given: any field.
        """
        recipe = get_recipe(model)
        if not 1 <= phase <= len(recipe.phases):
            raise ValueError(f"phase: '{model}' has {len(recipe.phases)}, counted from 1, got {phase}")
        stage = recipe.phases[phase - 1]
        chosen = {key: value for key, value in given.items() if value is not None}
        finetune = chosen.get("finetune", False)
        settings: dict[str, Any] = {
            "strategy": "collage-plus", "seed": 0, "steps": stage.steps, "batch_size": stage.batch,
            "seq_len": stage.seq_len, "lr": FINETUNE_LR if finetune else stage.lr, "betas": recipe.betas,
            "eps": recipe.eps, "weight_decay": recipe.weight_decay, "max_grad_norm": recipe.max_grad_norm,
            "schedule": "constant" if finetune else recipe.schedule,
        }  # fmt: skip
        settings |= chosen
        settings["strategy"] = str(Strategy.parse(settings["strategy"]))
        batch, steps = settings["batch_size"], settings["steps"]
        settings.setdefault("micro_batch", math.gcd(batch, stage.micro_batch) if batch > stage.micro_batch else batch)
        # A shorter run warms up for the same share of its steps as the published one, or less.
        settings.setdefault("warmup_steps", min(stage.warmup_steps, max(1, steps // 10)))
        return cls(model=model, out=Path(out), **settings)

    @property
    def recipe(self) -> Recipe:
        return get_recipe(self.model)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def compute_dtype(self) -> torch.dtype:
        """dtype of forward and backward; "auto" is float32 on a CPU without bf16 matrix units."""
        bf16 = self.compute == "bf16" or (self.compute == "auto" and _has_bf16_matrix_units())
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
        """The vocabulary of the text."""
        return tokenizer_tokens(self.tokenizer) if self.tokenizer else byte_tokens()

    def corpus(self) -> Corpus:
        """The text: the given one, or the embedded one of the regime."""
        tokens = self.tokens()
        if self.data:
            return read_corpus(self.data, self.validation or None, tokens)
        if self.validation:
            raise ValueError("validation: given without data; give both, or neither for the embedded texts")
        return finetune_corpus(tokens) if self.finetune else default_corpus(tokens)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {**plain, "out": str(self.out)}

    def require_same_run(self, saved: Mapping[str, Any]) -> None:
        """Raises ValueError if continuing the run with the saved settings under these would change what it computes."""
        ours = self.to_dict()
        different = [key for key in ours if key not in _FREE_ON_RESUME and saved.get(key) != ours[key]]
        if different:
            pairs = "; ".join(f"{key}: saved {saved.get(key)!r}, here {ours[key]!r}" for key in different)
            raise ValueError(
                f"--resume: the run in '{self.out}' has other settings ({pairs}); give the saved ones, or choose "
                "another --out and start there"
            )


def _require_whole(config: RunConfig) -> None:
    least = {
        "seed": 0, "steps": 1, "batch_size": 1, "micro_batch": 1, "seq_len": 2, "warmup_steps": 0, "every": 1,
        "shadow": 0, "eval_every": 0, "eval_sequences": 1, "save_every": 0, "keep": 1,
    }  # fmt: skip
    for name, minimum in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name}: needs an integer >= {minimum}, got {value!r}")


def _require_positive(config: RunConfig) -> None:
    for name, zero in (("lr", False), ("eps", True), ("weight_decay", True), ("max_grad_norm", True)):
        value = getattr(config, name)
        if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
            raise ValueError(f"{name}: needs a finite number {'>= 0' if zero else '> 0'}, got {value!r}")


def _require_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: unknown {value!r}; known: {', '.join(known)}")


def _has_bf16_matrix_units() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))
