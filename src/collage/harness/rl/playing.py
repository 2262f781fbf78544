"""Many games of one kind, played side by side in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from collage.harness.tasks.games import Game

if TYPE_CHECKING:
    from gymnasium.vector import SyncVectorEnv


@dataclass(frozen=True)
class Move:
    """What came of one move in every game."""

    rewards: Tensor  # [games] float32
    terminated: Tensor  # [games] bool: the game has ended, nothing comes after
    truncated: Tensor  # [games] bool: the time was up, something would have come
    reached: Tensor  # [games, numbers] float32: what the move led to

    @property
    def over(self) -> Tensor:
        return self.terminated | self.truncated


class Table:
    """So many games of one kind, each begun anew when it ends. All depends on the seed and the actions alone.

    Attributes:
        observations: [games, numbers] float32, what there is to act on.
    """

    def __init__(self, game: Game, count: int, seed: int) -> None:
        self._games = _opened(game, count)
        seen, _ = self._games.reset(seed=[seed * count + k for k in range(count)])  # no two seeds share a game
        self.observations = _tensor(seen)

    def move(self, actions: Tensor) -> Move:
        """actions: [games] int64."""
        seen, rewards, terminated, truncated, info = self._games.step(actions.numpy())
        reached = seen.copy()
        for k in (terminated | truncated).nonzero()[0]:
            reached[k] = info["final_obs"][k]
        self.observations = _tensor(seen)
        return Move(_tensor(rewards), torch.tensor(terminated), torch.tensor(truncated), _tensor(reached))


def _tensor(array: Any) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)


def _opened(game: Game, count: int) -> SyncVectorEnv:
    import gymnasium
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    def one() -> gymnasium.Env[Any, Any]:
        return gymnasium.make(game.environment, disable_env_checker=True)

    return SyncVectorEnv([one] * count, autoreset_mode=AutoresetMode.SAME_STEP)
