"""The games that policies are trained to play, as a table of data: one row for each of their recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Game:
    """A game of gymnasium, and how PPO plays it (Schulman et al. 2017; lambda is of Schulman et al. 2016)."""

    environment: str  # its name in gymnasium
    actors: int  # games played side by side
    horizon: int  # moves of each in a rollout
    epochs: int  # times that a rollout is trained on
    gamma: float  # discount of a reward that comes one move later
    gae_lambda: float
    clip: float  # of the ratio of the new policy's probability to that of the one that acted
    entropy: float  # weight of the policy's entropy in the objective
    value: float = 0.5  # weight of the value's squared error in the loss

    @property
    def moves(self) -> int:
        """In a rollout."""
        return self.actors * self.horizon


GAMES = {
    "cartpole": Game(
        "CartPole-v1", actors=8, horizon=128, epochs=4, gamma=0.98, gae_lambda=0.95, clip=0.2, entropy=0.0
    ),
    "acrobot": Game(
        "Acrobot-v1", actors=16, horizon=128, epochs=4, gamma=0.99, gae_lambda=0.95, clip=0.2, entropy=0.01
    ),
}

_OF_TEXT = ("data", "validation", "tokenizer", "finetune")
_OF_CHECKPOINTS = ("save_every", "resume", "shard")


def require_playable(run: Mapping[str, Any], numbers: int) -> None:
    """Raises ValueError for settings, the fields of a RunConfig, that a policy's run cannot have.

    numbers: in an observation.
    """
    model, game = run["model"], GAMES[run["model"]]
    for names, why in (
        (_OF_TEXT, "learns from the games it plays, not from text"),
        (_OF_CHECKPOINTS, "plays in one process and keeps no checkpoints"),
    ):
        for name in names:
            if run[name]:
                raise ValueError(f"{name}: '{model}' {why}; leave it out")
    if run["seq_len"] != numbers:
        raise ValueError(f"seq_len: '{model}' observes {numbers} numbers; leave it out")
    if game.moves % run["batch_size"]:
        raise ValueError(
            f"batch_size: '{model}' is trained on rollouts of {game.moves} moves; give a divisor of it, got "
            f"{run['batch_size']}"
        )
    if run["micro_batch"] != run["batch_size"]:
        raise ValueError(f"micro_batch: '{model}' is trained on all moves of a step at once; leave it out")
