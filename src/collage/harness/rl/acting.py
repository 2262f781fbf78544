"""The policy that acts: what the forward pass sees of the weights, computed in 16 bits."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from collage.harness.rl.playing import Table
from collage.harness.tasks.games import Game
from collage.harness.tasks.policies import ActorCritic, log_probabilities

UNSEEN = 2**20  # an evaluation's seed: the same games for all, and none that is trained on


class Actor:
    """A copy of a policy as it would be deployed: weights and arithmetic of 16 bits, whatever trains it.

    A float16 policy acts in float16; any other in bfloat16, to which float32 weights are rounded; e4m3 ones stay.
    """

    def __init__(self, model: ActorCritic, seed: int) -> None:
        trained = next(model.parameters()).dtype
        dtype = trained if trained == torch.float16 else torch.bfloat16
        self._policy = copy.deepcopy(model.policy).to(dtype).requires_grad_(False)
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def refresh(self, model: ActorCritic) -> None:
        """Take over the weights as they are now."""
        self._policy.load_state_dict(model.policy.state_dict())  # row scales of e4m3 weights too

    def act(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """[n, numbers] -> an action drawn for each, [n] int64, and its log-probability, [n] float32; it may be NaN."""
        logs = log_probabilities(self._policy, observations)
        drawn = torch.rand(len(logs), 1, generator=self._generator)
        actions = (logs.exp().cumsum(-1) <= drawn).sum(-1).clamp(max=logs.shape[-1] - 1)
        return actions, of_actions(logs, actions)


def of_actions(logs: Tensor, actions: Tensor) -> Tensor:
    """[n, actions], [n] -> [n]: of the actions taken."""
    return logs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def mean_return(game: Game, model: ActorCritic, count: int) -> float:
    """Rewards of a game added up, the mean over so many of them, played by the policy that acts; NaN if that is."""
    actor, table = Actor(model, UNSEEN), Table(game, count, UNSEEN)
    total, playing = torch.zeros(count), torch.ones(count, dtype=torch.bool)
    while playing.any():
        actions, logs = actor.act(table.observations)
        if not logs.isfinite().all():
            return math.nan
        move = table.move(actions)
        total += move.rewards * playing
        playing &= ~move.over
    return total.mean().item()
