"""transformers' `Trainer`: an optimizer made from its arguments, and effective descent quality in its log."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from collage.monitor import Monitor, monitor
from collage.monitor.quality import Quality, Report, Tally
from collage.optimizers.base import PrecisionOptimizer
from collage.optimizers.named import ADAMW, Named, find, probe
from collage.strategies import Strategy
from collage.unwrapping import unwrapped

NEVER = 2**62  # calls of a monitor

LOGGED = tuple(f.name for f in fields(Quality) if f.name not in ("steps", "nonzero", "edited", "scales"))


def by_name(
    strategy: str | Strategy = "collage-plus", optimizer: str = "adamw", **settings: Any
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """An optimizer as a `Trainer` would make its own: of its arguments, in its two groups, and with names.

    The learning rate comes from the `TrainingArguments`, and so do weight decay, where the optimizer has one, and
    betas and eps, where it has two betas; those that are the `TrainingArguments`' own defaults, which are AdamW's,
    leave it its own. The parameters without decay are those of `Trainer.get_decay_parameter_names`. Only parameters
    that require a gradient are taken, when training begins.

    Args:
        strategy: a name in ``collage.STRATEGIES``, or a ``collage.Strategy``.
        optimizer: as in `collage.make_optimizer`: ``"sgd"``, or ``"wrap:torch.optim.NAdam"``.
        settings: of the optimizer; they win over the `TrainingArguments`.

    Returns:
        What ``Trainer(..., optimizer_cls_and_kwargs=...)`` takes: a tuple that only a Trainer can unpack.

    Raises:
        ValueError, TypeError: an unknown optimizer, and what the optimizer refuses, at once.

    >>> optimizer = by_name("collage-plus", seed=1)  # Trainer(model, args, optimizer_cls_and_kwargs=optimizer)
    """
    named = find(optimizer)
    model = probe(Strategy.parse(strategy))
    named.make(model.parameters(), **{**settings, "strategy": strategy, "backend": "reference"})
    return _ByName((_Named, {**settings, "strategy": strategy, "name": optimizer}))


class _Named(torch.optim.Optimizer):
    """A class, because Trainer calls nothing else to make an optimizer; called, it makes the one of this name."""

    def __new__(cls, params: Any, name: str, **settings: Any) -> Any:
        return find(name).make(params, **settings)


class _ByName(tuple[type[torch.optim.Optimizer], dict[str, Any]]):
    """(class, settings), which looks at the Trainer that unpacks it: Trainer tells an optimizer neither its arguments
    nor its parameters' names."""

    def __iter__(self) -> Iterator[Any]:
        scope = _scope_of(Trainer)
        if scope is None:
            raise RuntimeError(
                "by_name: only a Trainer can unpack it; Trainer(..., optimizer_cls_and_kwargs=by_name(...))"
            )
        trainer = scope["self"]
        model: nn.Module = scope.get("opt_model", trainer.model)  # under FSDP it is the wrapped one
        ours = {**_of_arguments(trainer.args, find(self[1]["name"])), **self[1]}
        return iter((self[0], {**ours, "params": _groups(trainer, model, ours.get("weight_decay"))}))


def _of_arguments(args: TrainingArguments, named: Named) -> dict[str, Any]:
    """What an optimizer has of the settings that the arguments have."""
    adams = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    chosen = {key: value for key, value in adams.items() if value != ADAMW[key]}
    found: dict[str, Any] = {"lr": args.learning_rate}
    if named.takes("weight_decay", args.weight_decay):
        found["weight_decay"] = args.weight_decay
    if "adamw" in named.defaults:  # Muon's, for what is no hidden matrix
        return {**found, "adamw": chosen}
    if named.takes("betas", ADAMW["betas"]):
        found |= {key: value for key, value in chosen.items() if named.takes(key, value)}
    return found


def _groups(trainer: Trainer, model: nn.Module, decay: float | None) -> list[dict[str, Any]]:
    """Trainer's two: the second does not decay. One, if the optimizer has no decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if decay is None:
        return [_group(named)]
    decaying = set(trainer.get_decay_parameter_names(model))
    return [
        {**_group([(name, p) for name, p in named if name in decaying]), "weight_decay": decay},
        {**_group([(name, p) for name, p in named if name not in decaying]), "weight_decay": 0.0},
    ]


def _group(named: list[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """One which may be empty: then torch wants to be told that it has names too."""
    return {"params": named} if named else {"params": [], "param_names": []}


class EDQCallback(TrainerCallback):
    """Measures what the optimizer's rounding loses, and adds it to every training log of a `Trainer`.

    A log with a loss gains ``edq_ratio``, ``edq``, ``edq_visible``, ``lost``, ``v_ratio``, ``m_error``,
    ``edq_shadow``, ``rescaled`` and ``saturated`` over the steps measured since the log before, as far as they are
    defined; so does whatever the Trainer reports to (its log history, TensorBoard, ...). The run itself does not change
    by a bit.

    Args:
        optimizer: what to watch; by default the Trainer's own. One of this package, wrapped or not.
        every: measure the first step and every step that it divides, as `logging_steps` has the Trainer log them.
        shadow, strategies: as in `collage.monitor`.

    Attributes:
        monitor: of the run, once it has begun.
        window: what the last training log was made of.

    Raises:
        TypeError: when training begins with an optimizer that is not of this package.
        ValueError: when it begins with parameters that no optimizer has, and which so would not train.

    >>> import collage
    >>> model = torch.nn.Linear(4, 2).bfloat16()
    >>> opt = collage.AdamW(model.named_parameters(), strategy="collage-plus")
    >>> callback = EDQCallback(every=10)  # Trainer(model, args, optimizers=(opt, None), callbacks=[callback])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
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
        optimizer = self._watched(kwargs)
        _require_trained(kwargs["model"], optimizer, kwargs["optimizer"])
        self._detach(optimizer)
        self.monitor = monitor(optimizer, **self._settings)
        if state.global_step:  # a resumed run measures the steps that it would have measured
            self.monitor.go_on()
        self._log_before_reporters()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the monitor, which counts from its own first call, what the Trainer's count makes of this step."""
        assert self.monitor is not None
        self.monitor.every = (
            NEVER if (state.global_step + 1) % self._settings["every"] else 1
        )  # the run's first is measured

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
        self._detach(self._watched(kwargs))

    def report(self) -> Report:
        """The whole run so far; empty before it has begun."""
        return self.monitor.report() if self.monitor else Report(Tally().quality(), [], {}, [], {})

    def _watched(self, event: dict[str, Any]) -> PrecisionOptimizer:
        try:
            return unwrapped(self._optimizer or event["optimizer"], PrecisionOptimizer)
        except TypeError as error:
            raise TypeError(
                f"EDQCallback: {error}; give the Trainer one, Trainer(..., optimizer_cls_and_kwargs=by_name("
                "'collage-plus'))"
            ) from None

    def _detach(self, optimizer: PrecisionOptimizer) -> None:
        optimizer.monitors = [watching for watching in optimizer.monitors if watching is not self.monitor]

    def _log_before_reporters(self) -> None:
        """Move to the front of the callbacks: TensorBoard and others come before a user's, and log what they are given.

        A callback is not told who calls it, hence the look at the frame. Not found: only the log history gains.
        """
        scope = _scope_of(CallbackHandler)
        callbacks = scope["self"].callbacks if scope else []
        if self in callbacks:
            callbacks.insert(0, callbacks.pop(callbacks.index(self)))


def logged(quality: Quality) -> dict[str, float]:
    """The numbers of a `Quality` that are defined, by name."""
    return {name: value for name in LOGGED if (value := getattr(quality, name)) is not None}


def _scope_of(kind: type) -> dict[str, Any] | None:
    """The local names of the innermost method that led here and whose object is of this kind."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), kind):
        frame = frame.f_back
    return frame and frame.f_locals


def _require_trained(model: nn.Module, watched: torch.optim.Optimizer, stepped: torch.optim.Optimizer) -> None:
    """Raise ValueError if a trainable parameter is in no optimizer, or none of the model's is in the one watched."""
    fix = (
        "it was made for another model, or before this one's parameters were replaced (an adapter loaded, also by "
        "load_best_model_at_end; embeddings resized). Make it afterwards: so does a Trainer(..., "
        "optimizer_cls_and_kwargs=by_name('collage-plus')), after trainer.optimizer = None if it has trained before"
    )
    ours, theirs = ({p for group in opt.param_groups for p in group["params"]} for opt in (watched, stepped))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if p not in ours | theirs]
    if missing:
        raise ValueError(
            f"param '{missing[0]}': {len(missing)} of the model's {len(trained)} trainable parameters are not in the "
            f"optimizer and would not train: {fix}. Freeze what is not to be trained: requires_grad_(False)"
        )
    if ours.isdisjoint(model.parameters()):
        raise ValueError(f"EDQCallback: the optimizer has none of the model's parameters: {fix}")
