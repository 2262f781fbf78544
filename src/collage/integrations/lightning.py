"""Lightning: effective descent quality of a `Trainer.fit`, in its log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from collage.integrations.transformers import NEVER, logged
from collage.monitor import Monitor, monitor
from collage.monitor.quality import Report, Tally
from collage.optimizers.base import PrecisionOptimizer
from collage.strategies import Strategy
from collage.unwrapping import unwrapped


class EDQCallback(Callback):
    """Measures what the optimizers' rounding loses, and logs it.

    ``edq_ratio``, ``edq``, ``edq_visible``, ``lost``, ``v_ratio``, ``m_error``, ``edq_shadow``, ``rescaled`` and
    ``saturated`` of every measured step, as far as they are defined, go to the loggers and into
    ``trainer.callback_metrics``. Of several optimizers each name ends in the optimizer's position, ``edq_ratio_0``.
    The run itself does not change by a bit, and one resumed by ``ckpt_path`` measures the steps that it would have
    measured.

    Args:
        every: measure an optimizer's first step and every step that it divides.
        shadow, strategies: as in `collage.monitor`.

    Attributes:
        monitors: of the fit, once it has begun, by the optimizer's position in `configure_optimizers`; none for one
            of somewhere else.
        windows: what the last log was made of, likewise.

    Raises:
        TypeError: when training begins and no optimizer is of this package.

    >>> callback = EDQCallback(every=10)  # L.Trainer(callbacks=[callback])
    """

    def __init__(
        self, every: int = 10, shadow: int | None = 256, strategies: str | Strategy | Iterable[str | Strategy] = ()
    ) -> None:
        self.monitors: dict[int, Monitor] = {}
        self.windows: dict[int, Report] = {}
        self._steps: dict[int, int] = {}  # that each optimizer has begun, those before a resume included
        self._measured: set[int] = set()  # whose step has not been logged yet
        beside = (strategies,) if isinstance(strategies, str | Strategy) else tuple(strategies)
        self._settings: dict[str, Any] = {"every": every, "shadow": shadow, "strategies": beside}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the monitors, instead of those of an earlier fit."""
        self._detach(trainer)
        ours = _ours(trainer)
        if not ours:
            got = [f"{type(optimizer).__module__}.{type(optimizer).__name__}" for optimizer in trainer.optimizers]
            raise TypeError(
                "EDQCallback: optimizer: needs one of this package, such as collage.AdamW, got "
                f"{', '.join(got) or 'none'}; return one from configure_optimizers"
            )
        self.monitors = {k: monitor(optimizer, **self._settings) for k, optimizer in ours.items()}
        for k, watching in self.monitors.items():
            if self._steps.get(k):
                watching.go_on()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Tell the optimizer's monitor whether this step is one to measure."""
        for k, candidate in _ours(trainer).items():
            if candidate is _unwrapped(optimizer):
                step = self._steps[k] = self._steps.get(k, 0) + 1
                due = step == 1 or step % self._settings["every"] == 0
                self.monitors[k].every = 1 if due else NEVER
                self._measured |= {k} if due else set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the numbers of what was measured."""
        for k in sorted(self._measured):
            self.windows[k] = self.monitors[k].window()
            ending = f"_{k}" if len(trainer.optimizers) > 1 else ""
            values = {f"{name}{ending}": value for name, value in logged(self.windows[k].total).items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step - 1)  # Lightning's own logs count from 0
            trainer.callback_metrics.update(
                {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in values.items()}
            )
        self._measured = set()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop measuring; the reports stay."""
        self._detach(trainer)

    def report(self, optimizer: int = 0) -> Report:
        """The fit so far, of the optimizer at this position; empty before it has begun."""
        return self.monitors[optimizer].report() if self.monitors else Report(Tally().quality(), [], {}, [], {})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of Lightning's keeps: how many steps each optimizer has made."""
        return {"steps": dict(self._steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self._steps = dict(state_dict["steps"])

    def _detach(self, trainer: Trainer) -> None:
        for optimizer in _ours(trainer).values():
            mine = list(map(id, self.monitors.values()))
            optimizer.monitors = [watching for watching in optimizer.monitors if id(watching) not in mine]


def _ours(trainer: Trainer) -> dict[int, PrecisionOptimizer]:
    """The optimizers of this package, by position."""
    found = {k: _unwrapped(optimizer) for k, optimizer in enumerate(trainer.optimizers)}
    return {k: optimizer for k, optimizer in found.items() if optimizer is not None}


def _unwrapped(optimizer: Any) -> PrecisionOptimizer | None:
    """The optimizer of this package inside another's wrappers, None if there is none."""
    try:
        return unwrapped(optimizer, PrecisionOptimizer)
    except TypeError:
        return None
