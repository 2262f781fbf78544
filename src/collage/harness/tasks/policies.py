"""A policy and a value, each a small network of its own, as PPO was published."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


class ActorCritic(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What to do, and what it is worth: two networks with tanh between their layers, and nothing shared.

    Weights are orthogonal, biases zero; the policy begins almost uniform.
    """

    def __init__(self, observations: int, actions: int, hidden: int, layers: int) -> None:
        super().__init__(PreTrainedConfig())
        self.policy = _network(observations, hidden, layers, actions, gain=0.01)
        self.value = _network(observations, hidden, layers, 1, gain=1.0)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """[n, numbers] -> log-probabilities of the actions [n, actions], and what is to come [n]; both float32."""
        return log_probabilities(self.policy, observations), _outputs(self.value, observations).squeeze(-1)


def log_probabilities(policy: nn.Sequential, observations: Tensor) -> Tensor:
    """[n, numbers] -> [n, actions] float32. The network computes in its biases' dtype, the softmax in float32."""
    return _outputs(policy, observations).log_softmax(-1)


def _outputs(network: nn.Sequential, observations: Tensor) -> Tensor:
    last: Any = network[-1]
    outputs: Tensor = network(observations.to(last.bias.dtype))  # e4m3 weights are not what computes
    return outputs.float()


def _network(inputs: int, hidden: int, layers: int, outputs: int, gain: float) -> nn.Sequential:
    modules: list[nn.Module] = []
    for width, following in pairwise([inputs, *[hidden] * layers]):
        modules += [_layer(width, following, math.sqrt(2.0)), nn.Tanh()]
    return nn.Sequential(*modules, _layer(hidden, outputs, gain))


def _layer(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
