"""The records of a run, one for each line of metrics.jsonl, and its progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from collage.harness.train.config import RunConfig
from collage.integrations.transformers import LOGGED, EDQCallback
from collage.monitor.quality import Quality

Record = dict[str, Any]

# What the models' names for their layers share, and shorter names for the rest.
_PREFIXES = ("model.", "transformer.", "bert.", "roberta.", "encoder.")
_SHORTER = (
    ("layers.", "layer "), ("layer.", "layer "), ("h.", "layer "), ("self_attn.", "attention "),
    ("attn.", "attention "),
    ("attention.self.", "attention "), ("attention.output.", "attention out "), ("intermediate.", "mlp in "),
    ("mlp.", "mlp "), ("post_attention_layernorm", "mlp norm"), ("input_layernorm", "attention norm"),
    ("predictions.transform.", "transform "),
)  # fmt: skip


class Recorder(TrainerCallback):
    """Turns the Trainer's logs into records.

    Args:
        config: of the run.
        edq: the callback that watches it; put it before this one.
        record: is given every record.
        tick: is given the number of finished steps.
    """

    def __init__(
        self,
        config: RunConfig,
        edq: EDQCallback,
        record: Callable[[Record], None],
        tick: Callable[[int], None],
    ) -> None:
        self.evaluated: dict[int, float] = {}  # step -> validation loss
        self.scores: dict[int, float] = {}  # step -> the task's other measure, if it has one
        self._edq, self._record, self._tick = edq, record, tick
        self._where = {"strategy": config.strategy, "seed": config.seed}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tick(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tick(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if not math.isfinite(logs.get("eval_loss", logs.get("loss", 0.0))):
            control.should_training_stop = True  # a NaN gradient has reached every weight
        where = {**self._where, "step": state.global_step}
        if "eval_loss" in logs:
            self.evaluated[state.global_step] = logs["eval_loss"]
            scored = {"score": logs["eval_score"]} if "eval_score" in logs else {}
            if scored:
                self.scores[state.global_step] = scored["score"]
            self._record({"kind": "eval", **where, "loss": logs["eval_loss"], **scored})
        if "loss" in logs:
            measured = {name: logs.get(name) for name in ("loss", "grad_norm", *LOGGED)}
            layers = self._edq.window.by_parameter if "edq_ratio" in logs and self._edq.window else {}
            measured |= {"mismatch": logs["mismatch"]} if "mismatch" in logs else {}
            self._record(
                {"kind": "train", **where, "lr": logs["learning_rate"], **measured,
                 "lost_by_layer": lost_by_layer(layers)}
            )  # fmt: skip


def lost_by_layer(parameters: Mapping[str, Quality]) -> dict[str, float | None]:
    """Share of lost updates of each parameter, under a short name, in the model's order."""
    return {label(name): quality.lost for name, quality in parameters.items()}


def label(name: str) -> str:
    """A short name for the layer of a parameter.

    >>> [label(n) for n in ("model.layers.0.self_attn.q_proj.weight", "transformer.h.1.mlp.c_fc.bias")]
    ['layer 0 attention q_proj', 'layer 1 mlp c_fc bias']
    """
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    name = name.removesuffix(".weight")
    for long, short in _SHORTER:
        name = name.replace(long, short, 1) if name.startswith(long) or f".{long}" in name else name
    return name.replace(".", " ")
