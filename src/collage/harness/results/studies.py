"""What the page of results is made of: the studies, one row each."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collage.harness.experiment import Plan, defaults
from collage.harness.options import flag_of
from collage.harness.report.results import REFERENCE
from collage.harness.sweep.axes import AXES
from collage.harness.sweep.study import Study
from collage.harness.tasks.registry import Task, get_task
from collage.harness.text import short
from collage.harness.train.config import RunConfig

USUAL = ("bf16", "collage-light", "collage-plus", "collage-plus-sr", REFERENCE)
FEWER = ("bf16", "collage-plus", "collage-plus-sr", REFERENCE)  # where others have said it
EVERY = ("bf16", "stochastic", *USUAL[1:])
FEWEST = ("bf16", "collage-plus", REFERENCE)  # where a run takes minutes
FP8 = ("collage-fp8-lean", "collage-fp8", "fp8-master", REFERENCE)


@dataclass(frozen=True)
class Evidence:
    """A section of the page.

    Args:
        name: of its records and its plot.
        title: above it.
        task: a name in TASKS.
        seeds: how many, from `first` on.
        says: what to look for.
        model: by default the task's.
        strategies: which are run.
        settings: fields of RunConfig that are not the task's.
        axis: the setting that is varied, a name in AXES; "": none.
        values: of it.
        paper: how docs/paper.md begins the row of the paper's experiment that this is a small one of.
    """

    name: str
    title: str
    task: str
    seeds: int
    says: str = ""
    model: str = ""
    strategies: tuple[str, ...] = USUAL
    settings: Mapping[str, Any] = field(default_factory=dict)
    axis: str = ""
    values: tuple[float, ...] = ()
    paper: str = ""
    first: int = 0

    @property
    def of_task(self) -> Task:
        return get_task(self.task)

    def study(self) -> Study:
        """What is run."""
        axis = AXES[self.axis] if self.axis else None
        return Study(self.plan(), self.strategies, tuple(range(self.first, self.first + self.seeds)), axis, self.values)

    def plan(self) -> Plan:
        task = self.of_task
        settings = {**defaults(task, self.model, self.settings.get("steps")), **self.settings}
        return Plan.of(task, RunConfig.of(out=Path("runs/results"), **settings))

    def command(self) -> str:
        """Makes all of its runs."""
        words = ["collage", "sweep" if self.axis else "compare", "--task", self.task]
        words += ["--model", self.model] if self.model else []
        words += ["--axis", self.axis, "--values", ",".join(short(v, 6) for v in self.values)] if self.axis else []
        words += ["--strategies", ",".join(self.strategies), "--seeds", str(self.seeds)]
        words += ["--seed", str(self.first)] if self.first else []
        for name, value in self.settings.items():
            words += [flag_of(name), *map(str, value if isinstance(value, tuple) else (value,))]
        return shlex.join(words)


EVIDENCE = (
    Evidence(
        "pretrain", "Pre-training, a Llama", "pretrain", 3,
        "A Llama of a million parameters from random weights on novels, byte by byte: large steps, of which little is\n"
        "lost.",
        paper="OpenLLaMA",
    ),
    Evidence(
        "pretrain-gpt", "Pre-training, a GPT", "pretrain", 3, "A GPT-2, same text.", "tiny-gpt", FEWEST, paper="GPT"
    ),
    Evidence(
        "pretrain-bert", "Pre-training, a BERT", "pretrain", 3, "The same text, masked.", "tiny-bert", FEWEST,
        paper="BERT-base",
    ),
    Evidence(
        "pretrain-roberta", "Pre-training, a RoBERTa", "pretrain", 3, "The same again.", "tiny-roberta", FEWEST,
        paper="RoBERTa-base",
    ),
    Evidence(
        "finetune", "Fine-tuning at a small learning rate", "finetune", 3,
        "The Llama goes on with Python source at lr 1e-5 after a warm-up on novels: small steps, of which bf16 loses\n"
        "most.",
    ),
    Evidence(
        "classify", "Sentences, published weights of a BERT", "classify", 3,
        "MiniLM (22.7 M parameters) learns whether a film review praises.", strategies=FEWEST,
    ),
    Evidence(
        "continue", "Training on, published weights of a Llama", "continue", 3,
        "SmolLM2 (134.5 M parameters) goes on with Python source at lr 1e-5.",
        strategies=FEWEST,
    ),
    Evidence(
        "pretrain-fp8", "FP8 weights, pre-training", "pretrain", 6,
        "The Llama's linear layers in e4m3. `fp8-master` has the same forward pass with float32 master weights and\n"
        "moments: what it loses or wins, 8-bit weights do in themselves.",
        strategies=FP8, first=4,
    ),
    Evidence(
        "finetune-fp8", "FP8 weights, fine-tuning", "finetune", 3,
        "The same at small steps, from weights of bfloat16, of which a sixteenth are ties of e4m3: see\n"
        "[fp8.md](fp8.md#what-it-loses).",
        strategies=FP8, first=4,
    ),
    Evidence(
        "continue-fp8", "FP8 weights, published weights of a Llama", "continue", 3,
        "SmolLM2 (134.5 M parameters) goes on with its linear layers in e4m3. Ties show most here.", strategies=FP8,
    ),
    Evidence(
        "vision-resnet", "Images, a ResNet", "vision", 5, "Handwritten digits of 8 × 8 pixels in ten classes.",
        "tiny-resnet", FEWER,
    ),
    Evidence("vision-vit", "Images, a ViT", "vision", 5, "The same digits, a vision transformer.", "tiny-vit", FEWER),
    Evidence(
        "rl-cartpole", "Reinforcement learning, CartPole", "rl", 5,
        "PPO with a policy of 16 bits. Returns are noisy: another seed changes much.", "cartpole", FEWER,
    ),
    Evidence("rl-acrobot", "Reinforcement learning, Acrobot", "rl", 5, "The same, another game.", "acrobot", FEWER),
    Evidence(
        "rl-lr", "Learning rates of CartPole", "rl", 3,
        "Whether a rate that was tuned on lost updates is too high without the loss.", "cartpole", FEWEST,
        {"schedule": "constant"}, axis="lr", values=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    ),
    Evidence(
        "beta2", "The second moment's decay", "pretrain", 3,
        "The paper's ablation in small: β₂ of the Llama's pre-training.", strategies=FEWEST,
        axis="beta2", values=(0.95, 0.99, 0.999), paper="β₂ ablation",
    ),
    Evidence(
        "vision-lr", "Learning rates of a ResNet", "vision", 3,
        "From which learning rate on each strategy loses, stochastic rounding alone among them.", "tiny-resnet",
        EVERY, axis="lr", values=(1e-5, 1e-4, 1e-3, 1e-2),
    ),
    Evidence(
        "finetune-lr", "Learning rates of fine-tuning", "finetune", 3,
        "From which learning rate on each strategy loses, stochastic rounding alone among them.",
        strategies=("bf16", "stochastic", *FEWER[1:]),
        axis="lr", values=(1e-6, 1e-5, 1e-4),
    ),
)  # fmt: skip
