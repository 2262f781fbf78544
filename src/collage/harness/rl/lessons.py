"""What a policy is trained on: its own moves, rollout after rollout."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import collage
from collage.harness.rl import rollouts
from collage.harness.rl.acting import Actor
from collage.harness.rl.playing import Table
from collage.harness.rl.ppo import Samples, forward
from collage.harness.tasks.games import Game
from collage.harness.tasks.policies import ActorCritic
from collage.optimizers.base import PrecisionOptimizer


class Lessons:
    """Minibatches without end: each rollout is made by the policy as it then is, and gone through some times.

    Attributes:
        mismatches: of each rollout so far, before it was trained on: how far the policy that acted, as it computed it,
            was from the optimizer's full weights, as the training computes.
    """

    def __init__(
        self, game: Game, model: ActorCritic, optimizer: PrecisionOptimizer, dtype: torch.dtype, batch: int, seed: int
    ) -> None:
        self.mismatches: list[float] = []
        self._game, self._model, self._optimizer, self._dtype, self._batch = game, model, optimizer, dtype, batch
        self._table, self._actor = Table(game, game.actors, seed), Actor(model, seed)
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Samples]:
        while True:
            samples = self._rollout()
            for _ in range(self._game.epochs):
                for rows in torch.split(torch.randperm(self._game.moves, generator=self._generator), self._batch):
                    yield samples.take(rows)

    @torch.no_grad()
    def _rollout(self) -> Samples:
        self._actor.refresh(self._model)
        rollout = rollouts.collect(self._game, self._table, self._actor)
        full = collage.high_precision_state_dict(self._model, self._optimizer)
        self.mismatches.append(rollout.mismatch(partial(forward, self._model, self._dtype, weights=full)))
        return rollout.samples(self._game, partial(forward, self._model, self._dtype))
