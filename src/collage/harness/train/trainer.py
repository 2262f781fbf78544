"""transformers' `Trainer`, with what is about precision, and with checkpoints that are whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from collage.harness.tasks.masks import MaskedBlocks
from collage.harness.train import checkpoints
from collage.harness.train.computing import computed
from collage.harness.train.config import RunConfig


class PrecisionTrainer(Trainer):
    """Computes in `compute_dtype`, whatever dtype the weights are stored in.

    The model stays the PreTrainedModel; forward and backward see a cast of its parameters, so gradients come back in
    the parameters' dtype.
    """

    def __init__(self, *args: Any, compute_dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compute_dtype = compute_dtype
        self._staging: Path | None = None
        self.model_accepts_loss_kwargs = False  # the loss is the batch's mean; all batches are of one size
        self.remove_callback(PrinterCallback)
        self.add_callback(_EpochOfData(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch."""
        outputs = computed(model, inputs, self.compute_dtype)
        loss: Tensor = outputs["loss"]
        return (loss, outputs) if return_outputs else loss

    def load_finished(self, checkpoint: Path) -> None:
        """Take the weights and the optimizer's state of a run's last checkpoint."""
        self._load_from_checkpoint(str(checkpoint))
        self._load_optimizer_and_scheduler(str(checkpoint))
        self.state.global_step = self.args.max_steps

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        self._staging = run / checkpoints.STAGING
        shutil.rmtree(self._staging, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)
            checkpoints.publish(self._staging / f"checkpoint-{self.state.global_step}", run)
            shutil.rmtree(self._staging)
        finally:
            self._staging = None
        # By step: deleting a part of a folder makes it look new.
        rotate_checkpoints(str(run), self.args.save_total_limit, use_mtime=False)


class _EpochOfData(TrainerCallback):
    """Tells the training data its epoch. Accelerate does it too, but not in a distributed run."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        data = self._trainer.train_dataset
        if isinstance(data, MaskedBlocks):
            data.set_epoch(int(state.epoch or 0))


def arguments(config: RunConfig, report_to: str, eval_batch: int) -> TrainingArguments:
    """The Trainer's own settings for a run."""
    on_gpu = torch.cuda.is_available()
    result = TrainingArguments(
        output_dir=str(config.out),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        per_device_eval_batch_size=eval_batch,
        gradient_accumulation_steps=config.batch_size // config.micro_batch,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or config.steps,
        save_total_limit=config.keep,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        seed=config.seed,
        data_seed=config.seed,
        report_to=report_to,
        disable_tqdm=True,
        log_level="error",
    )
    assert result.device is not None  # looks for devices now, so that the next line stays: no nn.DataParallel
    result._n_gpu = min(result.n_gpu, 1)
    return result


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its remarks and progress bars; as they were, afterwards."""
    untyped: Any = logging
    verbosity, bars = untyped.get_verbosity(), untyped.is_progress_bar_enabled()
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()
    try:
        yield
    finally:
        untyped.set_verbosity(verbosity)
        if bars:
            untyped.enable_progress_bar()
