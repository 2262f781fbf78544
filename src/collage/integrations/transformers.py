"""Effective descent quality in the log of transformers' `Trainer`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, MutableMapping
from dataclasses import fields
from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from collage.monitor import Monitor, Quality, Report, Tally, monitor
from collage.optim import PrecisionOptimizer
from collage.strategies import Strategy

NEVER = 2**62  # calls of a monitor

LOGGED = tuple(f.name for f in fields(Quality) if f.name not in ("steps", "nonzero"))


class EDQCallback(TrainerCallback):
    """Measures what the optimizer's rounding loses, and adds it to every training log of a `Trainer`.

    A log with a loss gains ``edq_ratio``, ``edq``, ``edq_visible``, ``lost``, ``v_ratio``, ``m_error`` and
    ``edq_shadow`` over the steps measured since the log before, as far as they are defined; so does whatever the
    Trainer reports to (its log history, TensorBoard, ...). The run itself does not change by a bit.

    Args:
        optimizer: what to watch; by default the Trainer's own. One of this package.
        every: measure the first step and every step that it divides, as `logging_steps` has the Trainer log them.
        shadow, strategies: as in `collage.monitor`.

    Attributes:
        monitor: of the run, once it has begun.
        window: what the last training log was made of.

    Raises:
        TypeError: when training begins with an optimizer that is not of this package.

    >>> import collage
    >>> model = torch.nn.Linear(4, 2).bfloat16()
    >>> opt = collage.AdamW(model.named_parameters(), strategy="collage-plus")
    >>> callback = EDQCallback(every=10)  # Trainer(model, args, optimizers=(opt, None), callbacks=[callback])
    """

    def __init__(
        self,
        optimizer: PrecisionOptimizer | None = None,
        every: int = 10,
        shadow: int | None = 256,
        strategies: str | Strategy | Iterable[str | Strategy] = (),
    ) -> None:
        self.monitor: Monitor | None = None
        self.window: Report | None = None
        self._optimizer = optimizer
        beside = (strategies,) if isinstance(strategies, str | Strategy) else tuple(strategies)
        self._settings: dict[str, Any] = {"every": every, "shadow": shadow, "strategies": beside}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the monitor, instead of that of an earlier `Trainer.train()`."""
        optimizer = _unwrapped(self._optimizer or kwargs.get("optimizer"))
        self._detach(optimizer)
        self.monitor = monitor(cast("Any", optimizer), **self._settings)
        self._log_before_reporters()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the monitor, which counts from its own first call, what the Trainer's count makes of this step."""
        assert self.monitor is not None
        self.monitor.every = NEVER if (state.global_step + 1) % self._settings["every"] else 1  # the first is measured

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: MutableMapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to a log of training; logs of evaluation stay as they are."""
        if self.monitor is None or logs is None or "loss" not in logs:
            return
        report = self.monitor.window()
        if report.total.steps:
            self.window = report
            logs.update(logged(report.total))
            state.log_history[-1].update(logged(report.total))  # a copy of the logs, made before this call

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop measuring; the report stays."""
        self._detach(_unwrapped(self._optimizer or kwargs.get("optimizer")))

    def report(self) -> Report:
        """The whole run so far; empty before it has begun."""
        return self.monitor.report() if self.monitor else Report(Tally().quality(), [], {}, [], {})

    def _detach(self, optimizer: PrecisionOptimizer) -> None:
        optimizer.monitors = [watching for watching in optimizer.monitors if watching is not self.monitor]

    def _log_before_reporters(self) -> None:
        """Move to the front of the callbacks: TensorBoard and others come before a user's, and log what they are given.

        A callback is not told who calls it, hence the look at the frame. Not found: only the log history gains.
        """
        frame = inspect.currentframe()
        while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
            frame = frame.f_back
        if frame is not None:
            callbacks = frame.f_locals["self"].callbacks
            if self in callbacks:
                callbacks.insert(0, callbacks.pop(callbacks.index(self)))


def logged(quality: Quality) -> dict[str, float]:
    """The numbers of a `Quality` that are defined, by name."""
    return {name: value for name in LOGGED if (value := getattr(quality, name)) is not None}


def _unwrapped(optimizer: Any) -> PrecisionOptimizer:
    """The optimizer inside the wrappers of Accelerate."""
    inner = optimizer
    while not isinstance(inner, PrecisionOptimizer) and isinstance(
        getattr(inner, "optimizer", None), torch.optim.Optimizer
    ):
        inner = inner.optimizer
    if not isinstance(inner, PrecisionOptimizer):
        raise TypeError(
            f"EDQCallback: watches an optimizer of collage, got {type(inner).__name__}; give the Trainer one, "
            "Trainer(..., optimizers=(collage.AdamW(model.named_parameters()), None))"
        )
    return inner
