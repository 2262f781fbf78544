"""Proximal policy optimization (Schulman et al. 2017): what a rollout teaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from collage.harness.rl.acting import of_actions
from collage.harness.tasks.games import Game
from collage.harness.tasks.policies import ActorCritic
from collage.harness.train.computing import computed


@dataclass(frozen=True)
class Samples:
    """Moves, and what there is to learn from them."""

    observations: Tensor  # [n, numbers]; all others [n]
    actions: Tensor
    acted: Tensor  # log-probability under the policy that acted, as it computed it
    advantages: Tensor
    returns: Tensor

    def take(self, rows: Tensor) -> Samples:
        return Samples(**{name: value[rows] for name, value in vars(self).items()})


def forward(
    model: ActorCritic, dtype: torch.dtype, observations: Tensor, weights: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """What the model returns, computed in a dtype; with its own weights, or others by name."""
    outputs: tuple[Tensor, Tensor] = computed(model, {"observations": observations}, dtype, weights)
    return outputs


def advantages(
    game: Game,  # gamma, lambda
    rewards: Tensor,  # [time, games] float32, as all others
    terminated: Tensor,  # nothing comes after this move
    over: Tensor,  # the next move is of another game
    values: Tensor,  # of what the move was made from
    reached: Tensor,  # of what it led to
) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016), backwards through time."""
    surprises = rewards + game.gamma * reached * ~terminated - values
    result, coming = torch.empty_like(surprises), torch.zeros_like(surprises[0])
    for t in reversed(range(len(surprises))):
        coming = surprises[t] + game.gamma * game.gae_lambda * coming * ~over[t]
        result[t] = coming
    return result


def loss(game: Game, logs: Tensor, values: Tensor, samples: Samples) -> Tensor:
    """Minus the clipped objective, minus the entropy's bonus, and the value's squared error: means of a minibatch.

    Args:
        game: the weights of the three.
        logs: [n, actions], log-probabilities under the policy that is trained.
        values: [n].
        samples: n of them.
    """
    ratio = (of_actions(logs, samples.actions) - samples.acted).exp()
    gain = samples.advantages - samples.advantages.mean()
    gain = gain / (samples.advantages.std(correction=0) + 1e-8)
    clipped = ratio.clamp(1.0 - game.clip, 1.0 + game.clip)
    objective = torch.minimum(ratio * gain, clipped * gain).mean()
    entropy = -(logs.exp() * logs).sum(-1).mean()
    error = (values - samples.returns).square().mean()
    return game.value * error - objective - game.entropy * entropy
