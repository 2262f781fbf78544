"""transformers' `Trainer`, with what is about precision, and with checkpoints that are whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from collage.harness.tasks.masks import MaskedBlocks
from collage.harness.train import checkpoints, shards, world
from collage.harness.train.computing import computed
from collage.harness.train.config import RunConfig
from collage.sharding import any_dtensor


class PrecisionTrainer(Trainer):
    """Computes in `compute_dtype`, whatever dtype the weights are stored in.

    The model stays the PreTrainedModel; forward and backward see a cast of its parameters, so gradients come back in
    the parameters' dtype. If it tells classes apart, evaluations tell its accuracy as "score".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        compute_dtype: torch.dtype,
        classes: bool = False,
        origin: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if classes:
            kwargs |= {"compute_metrics": _accuracy, "preprocess_logits_for_metrics": _likeliest}
        super().__init__(model, *args, **kwargs)
        self.compute_dtype = compute_dtype
        self.sharded = shards.is_sharded(model)
        self._model = model
        self._origin = {**(origin or {}), "processes": world.size(), "sharded": self.sharded}
        self._staging: Path | None = None
        self._progress: dict[str, Any] | None = None
        self.model_accepts_loss_kwargs = False  # the loss is the batch's mean; all batches are of one size
        self.remove_callback(PrinterCallback)
        self.add_callback(_Beginnings(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch. FSDP2 casts by itself."""
        outputs = model(**inputs) if self.sharded else computed(model, inputs, self.compute_dtype)
        loss: Tensor = outputs["loss"]
        return (loss, outputs) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """All of the validation sample, however many processes share it: Trainer's would leave out an uneven rest."""
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(data, self.args.eval_batch_size, collate_fn=self.data_collator)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def load_finished(self, checkpoint: Path) -> None:
        """Take the weights and the optimizer's state of a run's last checkpoint."""
        self._load_from_checkpoint(str(checkpoint))
        self._load_optimizer_and_scheduler(str(checkpoint))
        self.state.global_step = self.args.max_steps

    def begin(self) -> None:
        """What is set once Trainer has prepared all: how gradients are averaged, and the loss not yet logged."""
        if world.size() > 1 and not self.sharded:
            assert isinstance(self.model_wrapped, DistributedDataParallel), "gradients would not be averaged"
            self.model_wrapped.register_comm_hook(None, lambda _, bucket: _mean_in_float32(bucket))
        if self._progress is not None:
            own = self._progress["loss"]  # one for each process; of another number of them their mean goes on
            loss = own[self.args.process_index] if len(own) == self.args.world_size else sum(own) / len(own)
            self._tr_loss.fill_(loss)
            self._globalstep_last_logged = self._progress["logged"]

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Trainer's. An evaluation has marked the model as prepared: DDP would be left out, in silence."""
        if training and not self.sharded:
            model._is_accelerate_prepared = False  # type: ignore[assignment]
        wrapped: nn.Module = super()._wrap_model(model, training, dataloader)
        return wrapped

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        self._staging = run / checkpoints.STAGING
        staged = self._staging / f"checkpoint-{self.state.global_step}"
        if world.is_first():
            shutil.rmtree(self._staging, ignore_errors=True)
        world.wait()
        try:
            super()._save_checkpoint(model, trial)
            self._save_progress(staged)
            world.wait()
            if world.is_first():
                self._publish(staged, run)
        finally:
            self._staging = None
        world.wait()

    def _save_progress(self, staged: Path) -> None:
        """The sum of the losses since the last log, of each process: Trainer begins a new one."""
        losses = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        if world.is_first():
            progress = {"loss": losses, "logged": self._globalstep_last_logged}
            (staged / "progress.json").write_text(json.dumps(progress) + "\n", encoding="utf-8")

    def _publish(self, staged: Path, run: Path) -> None:
        checkpoints.publish(staged, run, self._origin)
        shutil.rmtree(staged.parent)
        # By step: deleting a part of a folder makes it look new.
        rotate_checkpoints(str(run), self.args.save_total_limit, use_mtime=False)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights, whole."""
        if self.sharded:
            state = shards.whole(self._model.state_dict())
            self._save(output_dir, state_dict=state)  # on the first process
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = shards.whole(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            shards.load(self._model, load_file(Path(resume_from_checkpoint) / "model.safetensors"))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._progress = json.loads((Path(checkpoint) / "progress.json").read_text(encoding="utf-8"))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        return norm.full_tensor() if any_dtensor([norm]) else norm


def _likeliest(logits: Tensor, labels: Tensor) -> Tensor:
    """[n, classes] -> [n]: all that accuracy needs."""
    return logits.argmax(-1)


def _accuracy(found: EvalPrediction) -> dict[str, float]:
    predicted: Any = found.predictions
    return {"score": float((predicted == found.label_ids).mean())}


def _mean_in_float32(bucket: Any) -> Any:
    """DDP's mean of the processes' gradients, rounded to their dtype once, not at every addition."""
    total = bucket.buffer().float() / world.size()
    reduced = torch.distributed.all_reduce(total, async_op=True).get_future()
    return reduced.then(lambda done: bucket.buffer().copy_(done.value()[0]))


class _Beginnings(TrainerCallback):
    """Tells the trainer that training begins, and the data its epoch (Accelerate does not in a distributed run)."""

    def __init__(self, trainer: PrecisionTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        data = self._trainer.train_dataset
        if isinstance(data, MaskedBlocks):
            data.set_epoch(int(state.epoch or 0))


def arguments(config: RunConfig, report_to: str, eval_batch: int) -> TrainingArguments:
    """The Trainer's own settings for a run."""
    on_gpu = torch.cuda.is_available()
    micro_batch, passes = config.share(world.size())
    result = TrainingArguments(
        output_dir=str(config.out),
        max_steps=config.steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=eval_batch,
        gradient_accumulation_steps=passes,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or config.steps,
        save_total_limit=config.keep,
        prediction_loss_only=config.recipe.objective != "classes",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
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
