"""What happens in a run, told to transformers' callbacks as its Trainer tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from collage.optimizers.base import PrecisionOptimizer


class Teller:
    """Counts the steps and tells the callbacks, which say by `control` what is due.

    Args:
        settings: say when to log and to evaluate, when to stop, and which reporters to tell besides.
        callbacks: in this order.
        model, optimizer, schedule: of the run; callbacks are given them.
    """

    def __init__(
        self,
        settings: TrainingArguments,
        callbacks: Sequence[TrainerCallback],
        model: nn.Module,
        optimizer: PrecisionOptimizer,
        schedule: LRScheduler,
    ) -> None:
        self.state, self.control = TrainerState(max_steps=settings.max_steps), TrainerControl()
        untyped: Any = (self.state.compute_steps, get_reporting_integration_callbacks, CallbackHandler)
        compute_steps, reporters_of, handler = untyped
        compute_steps(settings, settings.max_steps)
        listening = [DefaultFlowCallback, *callbacks, *reporters_of(settings.report_to)]
        self._handler: Any = handler(listening, model, None, optimizer, schedule)
        self._settings = settings

    def tell(self, event: str) -> None:
        """An event of `TrainerCallback`, by its name."""
        if event == "on_step_end":
            self.state.global_step += 1
        getattr(self._handler, event)(self._settings, self.state, self.control)

    def log(self, numbers: Mapping[str, Any]) -> None:
        """Numbers of this step."""
        logs = dict(numbers)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._handler.on_log(self._settings, self.state, self.control, logs)
