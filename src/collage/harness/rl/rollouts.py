"""Rollouts: what the policy did, how good it was, and how far it is from the one that is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from collage.harness.rl import ppo
from collage.harness.rl.acting import Actor, of_actions
from collage.harness.rl.playing import Table
from collage.harness.tasks.games import Game

Network = Callable[[Tensor], "tuple[Tensor, Tensor]"]  # as ActorCritic


@dataclass(frozen=True)
class Rollout:
    """Moves of games played side by side."""

    observations: Tensor  # [time, games, numbers]: what a move was made from
    reached: Tensor  # the same, what it led to
    actions: Tensor  # [time, games], as all that follow
    acted: Tensor  # log-probability of the action, as the actor computed it
    rewards: Tensor
    terminated: Tensor
    over: Tensor

    def samples(self, game: Game, network: Network) -> ppo.Samples:
        """What there is to learn. network: its values are those of the critic."""
        values, reached = (
            network(seen.flatten(0, 1))[1].view_as(self.rewards) for seen in (self.observations, self.reached)
        )
        gains = ppo.advantages(game, self.rewards, self.terminated, self.over, values, reached)
        of_moves = (self.observations, self.actions, self.acted, gains, gains + values)
        return ppo.Samples(*(tensor.flatten(0, 1) for tensor in of_moves))

    def mismatch(self, network: Network) -> float:
        """Mean of |log-probability under this network - that of the policy that acted|, over the actions taken."""
        logs, _ = network(self.observations.flatten(0, 1))
        return (of_actions(logs, self.actions.flatten()) - self.acted.flatten()).abs().mean().item()


def collect(game: Game, table: Table, actor: Actor) -> Rollout:
    """Let the actor make a rollout's moves."""
    seen, choices, moves = [], [], []
    for _ in range(game.horizon):
        seen.append(table.observations)
        choices.append(actor.act(table.observations))
        moves.append(table.move(choices[-1][0]))
    reached, rewards, terminated, over = (
        torch.stack([getattr(move, name) for move in moves]) for name in ("reached", "rewards", "terminated", "over")
    )
    actions, acted = map(torch.stack, zip(*choices, strict=True))
    return Rollout(torch.stack(seen), reached, actions, acted, rewards, terminated, over)
