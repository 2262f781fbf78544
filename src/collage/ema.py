"""Weight averages that move: an exponential moving average is one more number that must survive small increments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from collage.constants import rounded
from collage.formats import Planes, format_of, split
from collage.rng import Stream, key_of
from collage.sharding import local, region


class EMA:
    """Exponential moving average of a model's weights: average <- decay * average + (1 - decay) * theta.

    At decay 0.9999 an average in bfloat16 never moves. "bf16x2" rounds to nearest: it stands still once the weights are
    within a few per cent of the average, as (1 - decay) of the distance is then below half an ulp of its second
    component. "bf16x2:sr" rounds stochastically and follows all the way, at the same 4 bytes per weight.

    Args:
        model: whose floating-point parameters are averaged, from their values now.
        decay: in [0, 1).
        format: "bf16x2:sr", "bf16x2", "fp32", "bf16", ...; see the table of formats.
        seed: of stochastic rounding.

    Raises:
        ValueError: a decay out of range, an unknown format.

    >>> model = nn.Linear(2, 2).bfloat16()
    >>> ema = EMA(model, decay=0.999)
    >>> ema.update()  # after each optimizer step
    >>> with ema.averaged(): loss = model(torch.ones(1, 2).bfloat16())  # evaluate with the average
    """

    def __init__(self, model: nn.Module, decay: float, format: str = "bf16x2:sr", seed: int = 0) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: needs a number in [0, 1), got {decay}")
        self.format, self.decay, self.seed, self.steps = format_of(format), decay, seed, 0
        if set(self.format.suffixes) - {"", "_lo"}:
            raise ValueError(f"format: '{format}' is a format for trained weights; use 'bf16x2:sr' or 'fp32'")
        self._lent = False  # whether the model has the average now
        self.params = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        self.planes: dict[str, Planes] = {
            name: split(self.format, local(p.detach()).float()) for name, p in self.params.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now. Raises RuntimeError inside `averaged`."""
        if self._lent:
            raise RuntimeError("update() inside averaged(): the model has the average now; update after the with block")
        self.steps += 1
        for name, param in self.params.items():
            theta = local(param.detach()).float()
            weight = torch.tensor(rounded(1.0 - self.decay, torch.float32), dtype=torch.float32, device=theta.device)
            average = self.format.load(self.planes[name], torch.float32)
            moved = average.grown(weight * (theta - average.value))
            bits = None
            if self.format.stochastic:
                bits = Stream(self.seed, self.steps, key_of(name)).bits(region(param).indices(theta.device), slot=0)
            self.planes[name] = self.format.encode(moved, bits)

    def value(self, name: str) -> Tensor:
        """The average of one parameter, float32 (its local part if it is sharded)."""
        return self.format.value(self.planes[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again, bit for bit."""
        own = {name: local(param.detach()).clone() for name, param in self.params.items()}
        lent, self._lent = self._lent, True
        try:
            with torch.no_grad():
                for name, param in self.params.items():
                    local(param.detach()).copy_(self.value(name))
            yield
        finally:
            self._lent = lent
            with torch.no_grad():
                for name, param in self.params.items():
                    local(param.detach()).copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """The planes and the number of updates."""
        return {"steps": self.steps, "planes": {name: list(planes) for name, planes in self.planes.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore. Raises ValueError for another model or another format, before anything is changed."""
        missing = [key for key in ("steps", "planes") if key not in state_dict]
        if missing:
            raise ValueError(f"state_dict: {missing} missing; it needs what EMA.state_dict() returns")
        for name, planes in self.planes.items():
            saved = state_dict["planes"].get(name, ())
            if [(p.shape, p.dtype) for p in saved] != [(p.shape, p.dtype) for p in planes]:
                raise ValueError(f"state_dict: '{name}' is missing, or of another shape or format than this average's")
        self.steps = state_dict["steps"]
        for name, planes in self.planes.items():
            saved = state_dict["planes"][name]
            self.planes[name] = [s.to(p.device, copy=True) for s, p in zip(saved, planes, strict=True)]
