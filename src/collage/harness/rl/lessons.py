"""What a policy is trained on: its own moves, rollout after rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from collage.harness.rl import rollouts
from collage.harness.rl.acting import Actor
from collage.harness.rl.playing import Table
from collage.harness.rl.ppo import Samples, forward
from collage.harness.rl.rollouts import Network
from collage.harness.tasks.games import Game
from collage.harness.tasks.policies import ActorCritic


class Lessons:
    """Minibatches without end: each rollout is made by the policy as it then is, and gone through some times.

    Attributes:
        mismatches: of each rollout so far, before it was trained on: how far the policy that acted, as it computed it,
            was from the optimizer's full weights, as the training computes.

    full: gives the model of the optimizer's full weights as they then are.
    """

    def __init__(
        self, game: Game, model: ActorCritic, full: Callable[[], Network], dtype: torch.dtype, batch: int, seed: int
    ) -> None:
        self.mismatches: list[float] = []
        self._game, self._model, self._full, self._dtype, self._batch = game, model, full, dtype, batch
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
        self.mismatches.append(rollout.mismatch(self._full()))
        return rollout.samples(self._game, partial(forward, self._model, self._dtype))
