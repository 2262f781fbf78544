"""One training run under one strategy: `collage train`, and every run of `collage compare`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import collage
from collage.harness.tasks.data import Corpus
from collage.harness.tasks.examples import Examples
from collage.harness.tasks.games import Game
from collage.harness.train import building, checkpoints, shards
from collage.harness.train.config import RunConfig
from collage.harness.train.meters import PeakMemory, StepMeter, UpdateSizes
from collage.harness.train.recording import Record, Recorder
from collage.harness.train.trainer import PrecisionTrainer, arguments, quiet
from collage.integrations.transformers import LOGGED, EDQCallback
from collage.monitor.quality import Report
from collage.optimizers.base import PrecisionOptimizer


@dataclass(frozen=True)
class RunResult:
    """What a run gave. After a resume, what is measured (not the losses) is of the part since then."""

    strategy: str
    seed: int
    parameters: int
    initial_loss: float  # on the validation sample, before the first step
    val_loss: float  # after the last
    since_step: int  # the step it went on from; 0: none
    initial_score: float | None  # the task's other measure, higher is better: accuracy, return; None: it has none
    score: float | None
    mismatch: float | None  # of a policy: how far that which acts is from that which is trained; see rl.rollouts
    last_step: int  # before the configured one if it diverged
    curve: dict[int, float]  # step -> validation loss
    report: Report  # of the monitor
    bytes_by_slot: dict[str, int]  # of the live tensors
    peak_rss_bytes: int  # of the process during this run
    peak_device_bytes: int | None  # of the GPU's allocator
    optimizer_ms: float | None  # median step, without the monitor
    tokens_per_s: float | None  # of the median training step, without the monitor
    seconds: float  # of everything
    update_histogram: dict[str, list[float]] | None
    weights: dict[str, Tensor] = field(repr=False)  # float32, with all that the components hold

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.val_loss)

    def to_dict(self) -> Record:
        """Its row of summary.json."""
        quality = self.report.to_dict()
        state = sum(self.bytes_by_slot.values())
        return {
            "strategy": self.strategy, "seed": self.seed, "initial_loss": self.initial_loss,
            "val_loss": self.val_loss, "initial_score": self.initial_score, "score": self.score,
            "mismatch": self.mismatch,
            "since_step": self.since_step, "last_step": self.last_step,
            **{name: quality["total"][name] for name in LOGGED},
            "frozen": self.report.frozen, "unfollowed": self.report.unfollowed,
            "beside": quality["beside"], "bytes_by_slot": self.bytes_by_slot,
            "bytes_per_param": state / self.parameters if state else None, "state_bytes": state or None,
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_device_bytes": self.peak_device_bytes, "optimizer_ms": self.optimizer_ms,
            "tokens_per_s": self.tokens_per_s, "seconds": self.seconds,
        }  # fmt: skip


class Watch:
    """What a run is measured by. Made before all else: it tells the time and the memory from then on.

    Args:
        config: of the run.
        record, tick: as `run` is given them.
    """

    def __init__(self, config: RunConfig, record: Callable[[Record], None], tick: Callable[[int], None]) -> None:
        self._began, self._memory, self._config, self._told = time.perf_counter(), PeakMemory(), config, (record, tick)

    def follow(
        self, model: nn.Module, optimizer: PrecisionOptimizer, histogram: bool
    ) -> tuple[EDQCallback, StepMeter, Recorder]:
        """The callbacks that see the run, in their order."""
        self._model, self._optimizer = model, optimizer
        self._sizes = UpdateSizes(optimizer, self._config.every) if histogram else None
        self._meter = StepMeter(optimizer)
        self._edq = EDQCallback(optimizer, self._config.every, self._config.shadow or None, self._config.beside)
        self.recorder = Recorder(self._config, self._edq, *self._told)
        return self._edq, self._meter, self.recorder

    def result(self, last: int, since: int = 0, mismatch: float | None = None) -> RunResult:
        """Of a run that was evaluated before its first step and after its last. since: the step it went on from."""
        losses, scores = self.recorder.evaluated, self.recorder.scores
        return RunResult(
            strategy=self._config.strategy,
            seed=self._config.seed,
            parameters=sum(p.numel() for p in self._model.parameters()),
            initial_loss=losses[0],
            val_loss=losses[last],
            initial_score=scores.get(0),
            score=scores.get(last),
            mismatch=mismatch,
            since_step=since,
            last_step=last,
            curve=losses,
            report=self._edq.report(),
            bytes_by_slot=self._meter.bytes,
            peak_rss_bytes=self._memory.rss_bytes(),
            peak_device_bytes=self._memory.device_bytes(),
            optimizer_ms=self._meter.optimizer_ms,
            tokens_per_s=self._meter.tokens_per_second(self._config.tokens_per_step),
            seconds=time.perf_counter() - self._began,
            update_histogram=self._sizes.to_dict() if self._sizes else None,
            weights=self._weights(),
        )

    def _weights(self) -> dict[str, Tensor]:
        weights = collage.high_precision_state_dict(self._model, self._optimizer)
        return shards.whole(weights) if self._config.shard else weights


def run(
    config: RunConfig,
    corpus: Corpus | Examples | None = None,
    *,
    init: Mapping[str, Tensor] | None = None,
    resume: Path | None = None,
    record: Callable[[Record], None] = lambda _: None,
    tick: Callable[[int], None] = lambda _: None,
    report_to: str = "none",
    histogram: bool = False,
) -> RunResult:
    """Build, evaluate, train, evaluate. A run whose loss is not finite ends there.

    Under torchrun every process calls it, and gets the same result, but for the time, memory and, if it is sharded, the
    weights: these has the first one alone.

    Args:
        config: the settings.
        corpus: `config.corpus()`, if it has been read already.
        init: weights to start from, by name; by default those of `config.init`, published or random ones.
        resume: a whole checkpoint of this run; what follows is then what would have followed, bit for bit.
        record: is given each log as a line of metrics.jsonl.
        tick: is given the number of finished steps.
        report_to: as Trainer's.
        histogram: gather the sizes of the updates.
    """
    with quiet():
        data = config.corpus() if corpus is None else corpus
        assert not isinstance(data, Game), "a game has a loop of its own: loops.run"
        session = _Session(config, data, init, (record, tick), report_to, histogram)
        return session.run(resume)


class _Session:
    """A run's parts, from its beginning to its result."""

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus | Examples,
        init: Mapping[str, Tensor] | None,
        listeners: tuple[Callable[[Record], None], Callable[[int], None]],
        report_to: str,
        histogram: bool,
    ) -> None:
        self.watch, self.config = Watch(config, *listeners), config
        if init is None:
            init = building.start(config)
        train_data, validation = building.datasets(config, corpus)
        settings = arguments(config, report_to, building.eval_batch(config, validation))
        model = building.model_of(config, corpus, init)
        if config.shard:
            shards.shard(model, config.compute_dtype(), settings.device)
        optimizer = building.optimizer_of(config, model)
        self.trainer = PrecisionTrainer(
            model=model,
            args=settings,
            train_dataset=train_data,
            eval_dataset=validation,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, config.lr_scale)),
            callbacks=list(self.watch.follow(model, optimizer, histogram)),
            compute_dtype=config.compute_dtype(),
            classes=config.recipe.objective == "classes",
            origin={"run": config.bound(), "text": corpus.checksum()} if config.save_every else None,
        )

    def run(self, resume: Path | None) -> RunResult:
        self.trainer.evaluate()
        if resume is not None and checkpoints.step_of(resume) == self.config.steps:
            self.trainer.load_finished(resume)  # Trainer.train() would take one step more
        else:
            self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        last = self.trainer.state.global_step
        if last not in self.watch.recorder.evaluated:
            self.trainer.evaluate()
        return self.watch.result(last, since=(checkpoints.step_of(resume) or 0) if resume else 0)
