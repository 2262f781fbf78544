"""One run of reinforcement learning under one strategy: every run of `cartpole` and `acrobot`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import collage
from collage.harness.rl import ppo
from collage.harness.rl.acting import mean_return
from collage.harness.rl.lessons import Lessons
from collage.harness.rl.rollouts import Network
from collage.harness.rl.telling import Teller
from collage.harness.tasks import recipes
from collage.harness.tasks.games import Game
from collage.harness.tasks.policies import ActorCritic
from collage.harness.train import building
from collage.harness.train.config import RunConfig
from collage.harness.train.recording import Record
from collage.harness.train.trainer import arguments, quiet
from collage.harness.train.training import RunResult, Watch


def run(
    config: RunConfig,
    game: Game,
    *,
    init: Mapping[str, Tensor] | None = None,
    record: Callable[[Record], None] = lambda _: None,
    tick: Callable[[int], None] = lambda _: None,
    report_to: str = "none",
    histogram: bool = False,
) -> RunResult:
    """Evaluate, train, evaluate, as `training.run`. The score is the mean return, the validation loss minus that.

    All of it is a function of the settings alone; strategies that begin with one policy begin with one rollout.
    """
    with quiet():
        return _Session(config, game, init, (record, tick), report_to, histogram).run()


class _Session:
    """A run's parts, from its beginning to its result."""

    def __init__(
        self,
        config: RunConfig,
        game: Game,
        init: Mapping[str, Tensor] | None,
        listeners: tuple[Callable[[Record], None], Callable[[int], None]],
        report_to: str,
        histogram: bool,
    ) -> None:
        self.watch, self.config, self.game = Watch(config, *listeners), config, game
        self.dtype = config.compute_dtype()
        model = building.model_of(config, game, init)
        assert isinstance(model, ActorCritic)
        self.model = model
        self.optimizer = building.optimizer_of(config, self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, config.lr_scale)
        half = any(p.dtype == torch.float16 for p in self.model.parameters())
        self.scaler = torch.amp.GradScaler("cpu", enabled=half)  # float16 has too few small numbers for gradients
        self.lessons = Lessons(self.game, self.model, self._full, self.dtype, config.batch_size, config.seed)
        self.losses: list[float] = []  # since the last log
        callbacks = self.watch.follow(self.model, self.optimizer, histogram)
        settings = arguments(config, report_to, eval_batch=1)
        self.teller = Teller(settings, callbacks, self.model, self.optimizer, self.schedule)

    def _full(self) -> Network:
        """The model of the optimizer's full weights, whose layers are plain ones: e4m3 layers take none of float32."""
        plain = recipes.build(self.config.model, device="meta")
        assert isinstance(plain, ActorCritic)
        weights = collage.high_precision_state_dict(self.model, self.optimizer)
        return partial(ppo.forward, plain, self.dtype, weights=weights)

    def run(self) -> RunResult:
        self._evaluate()
        self._train()
        if self.teller.state.global_step not in self.watch.recorder.evaluated:
            self._evaluate()
        return self._result()

    def _train(self) -> None:
        self.teller.tell("on_train_begin")
        for samples in self.lessons:
            self._step(samples)
            if self.teller.control.should_evaluate:
                self._evaluate()
            if self.teller.control.should_training_stop:
                break
        self.teller.tell("on_train_end")

    def _step(self, samples: ppo.Samples) -> None:
        self.teller.tell("on_step_begin")
        self.optimizer.zero_grad()
        loss = ppo.loss(self.game, *ppo.forward(self.model, self.dtype, samples.observations), samples)
        torch.autograd.backward(self.scaler.scale(loss))
        self.losses.append(loss.item())
        norm = self._clip()
        self.teller.tell("on_pre_optimizer_step")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.teller.tell("on_optimizer_step")
        rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        self.teller.tell("on_step_end")
        if self.teller.control.should_log:
            self._log({"grad_norm": norm, "learning_rate": rate})

    def _clip(self) -> float | None:
        """Norm of the gradients before they were clipped; they may still be multiplied by the scaler's factor."""
        if not self.config.max_grad_norm:
            return None
        scale = self.scaler.get_scale()
        return collage.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm * scale).item() / scale

    def _log(self, measured: Mapping[str, Any]) -> None:
        self.teller.log({"loss": fmean(self.losses), "mismatch": self.lessons.mismatches[-1], **measured})
        self.losses.clear()

    def _evaluate(self) -> None:
        score = mean_return(self.game, self.model, self.config.eval_sequences)
        self.teller.log({"eval_loss": -score, "eval_score": score})

    def _result(self) -> RunResult:
        return self.watch.result(self.teller.state.global_step, mismatch=fmean(self.lessons.mismatches))
