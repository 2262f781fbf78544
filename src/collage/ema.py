"""Weight averages that move: an exponential moving average is one more number that must survive small increments."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from collage.backends import Batch, choose
from collage.casting import require_finite
from collage.checkpoint import exported, numbers_of, require_keys
from collage.formats import fitted, format_of
from collage.fp8.owning import scale_of
from collage.layout import Planes, pieces, zeros
from collage.lending import lent
from collage.optimizers import edits
from collage.optimizers.parameters import dtype_of
from collage.optimizers.planes import write
from collage.owners import Optimizers, Owner, number_of, owners
from collage.rng import key_of
from collage.rules.average import AVERAGE
from collage.sharding import any_dtensor, local, locals_of, placed, region, reshard

log = logging.getLogger("collage")


class EMA:
    """Exponential moving average of a model's weights: average <- decay * average + (1 - decay) * theta.

    At decay 0.9999 an average in bfloat16 never moves. "bf16x2" rounds to nearest: it stands still once the weights are
    within a few per cent of the average, as (1 - decay) of the distance is then below half an ulp of its second
    component. "bf16x2:sr" rounds stochastically and follows all the way, at the same 4 bytes per weight.

    Parameters are looked up by name at every call, so that it follows those that replace them (``assign=True``,
    ``fully_shard``, ``model.to``). Sharded ones have sharded averages.

    Args:
        model: whose trainable parameters are averaged, from their values now. One that is unfrozen later joins at the
            next update, with its value then: that of a constant is its average. One frozen later stays.
        decay: in [0, 1).
        format: "bf16x2:sr", "bf16x2", "fp32", "bf16", ...; see the table of formats.
        optimizer: which trains the model, or a list of all that do: the average follows theta with all its components.
            Without, it follows the visible weights, as the forward pass sees them, and logs that.
        seed: of stochastic rounding.
        frozen: average frozen parameters too.

    Raises:
        ValueError: a decay out of range, an unknown format, nothing to average, an optimizer of another model.

    >>> model = nn.Linear(2, 2).bfloat16()
    >>> ema = EMA(model, decay=0.999)
    >>> ema.update()  # after each optimizer step
    >>> with ema.averaged(): loss = model(torch.ones(1, 2).bfloat16())  # evaluate with the average
    >>> ema
    EMA(decay=0.999, format='bf16x2:sr', steps=1; follows 0 full values, 2 visible weights)
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        format: str = "bf16x2:sr",
        optimizer: Optimizers | None = None,
        *,
        seed: int = 0,
        frozen: bool = False,
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: needs a number in [0, 1), got {decay}")
        self.format, self.decay, self.seed, self.steps = format_of(format), decay, seed, 0
        if set(self.format.suffixes) - {"", "_lo", "_lo2"}:
            raise ValueError(f"format: '{format}' is a format for trained weights; use 'bf16x2:sr' or 'fp32'")
        self.model, self.optimizer, self.frozen = model, optimizer, frozen
        self.planes: dict[str, list[Tensor]] = {}
        self._name = format
        self._params: dict[str, nn.Parameter] = {}  # as they were met last
        self._visible: list[str] = []  # of which there are no low components to follow
        if not self._meet():
            raise ValueError("model: has no trainable parameter to average; frozen=True averages the others too")
        if self._visible:
            log.info(
                "EMA: follows the visible weights of %d of %d parameters; with optimizer= it follows what that keeps "
                "beside them, too", len(self._visible), len(self._params),
            )  # fmt: skip

    def __repr__(self) -> str:
        visible = len(self._visible)
        return (
            f"EMA(decay={self.decay}, format='{self._name}', steps={self.steps}; follows "
            f"{len(self._params) - visible} full values, {visible} visible weights)"
        )

    @torch.no_grad()
    def _meet(self) -> dict[str, nn.Parameter]:
        """The averaged parameters as the model has them now; a new one's average starts at its value.

        Raises ValueError for a parameter that is gone, or not the one that the optimizer or the average is of.
        """
        reshard(self.model)
        params = {
            name: param
            for name, param in self.model.named_parameters()
            if param.is_floating_point() and (name in self.planes or param.requires_grad or self.frozen)
        }
        self._require_same(params)
        owned = self._owners()
        for name, param in params.items():
            was = self._params.get(name, param)
            if was in owned and param not in owned:
                raise ValueError(
                    f"param '{name}': the optimizer has the one that the model had before (load_state_dict(assign="
                    "True), fully_shard), so nothing trains the new one; make the optimizer after that"
                )
        for name, param in params.items():
            if name in self.planes:  # the weights may have moved
                self.planes[name] = [placed(plane, param).to(param.device) for plane in self.planes[name]]
            else:
                self._start(name, param)
        self._params = params
        self._visible = [name for name, p in params.items() if p.dtype.itemsize < 4 and p not in owned]
        return params

    def _require_same(self, params: Mapping[str, Tensor]) -> None:
        """Raise ValueError for averages of parameters that the model no longer has."""
        for name, planes in self.planes.items():
            now, then = tuple(params[name].shape) if name in params else None, tuple(planes[0].shape)
            if now != then:
                has = f"has shape {now}" if now is not None else "is not in the model any more"
                raise ValueError(f"param '{name}': {has}, its average has shape {then}; make the EMA anew")

    def _owners(self) -> dict[Tensor, Owner]:
        return owners(self.model, self.optimizer) if self.optimizer is not None else {}

    def _start(self, name: str, param: nn.Parameter) -> None:
        """Begin an average at the parameter's value, in planes of its shape, strides and placement."""
        edits.require_own([param], f"beginning an average of '{name}'")
        theta = torch.empty_like(local(param.detach()), dtype=torch.float32)
        edits.decode(*number_of(param, self._owners().get(param)), theta)
        require_finite(name, theta, self.format.dtypes[0])
        planes = zeros(self.format, param.detach())
        choose("auto", theta.device).encode(self._name, [theta], [locals_of(planes)])
        self.planes[name] = planes

    def _number_of(self, param: nn.Parameter, owner: Owner | None) -> tuple[str, Planes]:
        """(format, local planes) of a parameter as it is now, should others have changed it."""
        name, planes = number_of(param, owner)
        if choose("auto", planes[0].device).broken(name, [planes]):
            planes = fitted(format_of(name), planes)[0]
        return name, planes

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now. Raises RuntimeError inside `averaged`."""
        edits.require_own(self.model.parameters(), "update()")
        params, owned = self._meet(), self._owners()
        self.steps += 1
        alike: dict[tuple[str, torch.device], list[tuple[str, Planes]]] = {}
        for name, param in params.items():
            theta, planes = self._number_of(param, owned.get(param))
            alike.setdefault((theta, planes[0].device), []).append((name, planes))
        for (theta, device), those in alike.items():
            batch = Batch(
                AVERAGE, (self._name, theta), torch.float32, 0.0, (self.decay,), False, self.seed,
                [x for name, planes in those for x in (*locals_of(self.planes[name]), *planes)], (),
                [self.steps] * len(those), [key_of(name) for name, _ in those],
                [region(params[name]) for name, _ in those] if any_dtensor(params.values()) else (),
            )  # fmt: skip
            choose("auto", device).step(batch)

    def value(self, name: str) -> Tensor:
        """The average of one parameter, float32; a DTensor where the parameter is one."""
        result = torch.empty_like(self.planes[name][0], dtype=torch.float32)
        self._copy(name, local(result))
        return result

    @torch.no_grad()
    def _copy(self, name: str, part: Tensor) -> None:
        """Write this rank's part of the average, rounded to the tensor's dtype."""
        backend = choose("auto", part.device)
        for piece, *planes in pieces([part, *locals_of(self.planes[name])]):
            value = piece if piece.dtype == torch.float32 else torch.empty_like(piece, dtype=torch.float32)
            backend.decode(self._name, [planes], [value])
            if value is not piece:
                piece.copy_(value)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again, bit for bit.

        `high_precision_state_dict` gives the average there; steps, `resync` and loading raise RuntimeError. Averages
        may stand in for one another: the last one to come is seen, until it leaves.
        """
        with lent(self.model, self._meet(), self._copy):
            yield

    @torch.no_grad()
    def high_precision_state_dict(self) -> dict[str, Any]:
        """The average for release: every key of ``model.state_dict()`` but row scales, weights in float32.

        Frozen weights, in float32 too, buffers and other entries are the model's. Tied parameters appear under each of
        their names; sharded ones as DTensors.
        """
        names: dict[Tensor, str] = {param: name for name, param in self._meet().items()}
        shown = numbers_of(self.model)
        require_keys(names, shown)

        def export(param: Tensor, result: Tensor) -> None:
            if param in names:
                self._copy(names[param], result)
            elif scale_of(param) is not None:
                edits.decode(*number_of(param, None), result)
            else:
                result.copy_(local(param))

        return exported(shown, export)

    def state_dict(self) -> dict[str, Any]:
        """To resume from: the planes, which the next `update` writes to, and the number of updates."""
        return {"steps": self.steps, "planes": {name: list(planes) for name, planes in self.planes.items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore. Takes whole planes as well as sharded ones, and averages of parameters that are frozen here.

        Raises:
            ValueError: the state of another model or another format; nothing is changed then.
            RuntimeError: inside `averaged`.
        """
        edits.require_own(self.model.parameters(), "load_state_dict()")
        missing = [key for key in ("steps", "planes") if key not in state_dict]
        if missing:
            raise ValueError(f"state_dict: {missing} missing; it needs what EMA.state_dict() returns")
        self._meet()
        saved: dict[str, list[Tensor]] = state_dict["planes"]
        params = dict(self.model.named_parameters())
        self._require_state(saved, params)
        self.steps = int(state_dict["steps"])
        for name, planes in saved.items():
            if name not in self.planes:
                self._start(name, params[name])
            write(
                locals_of(self.planes[name]),
                [local(placed(plane.to(params[name].device), params[name])) for plane in planes],
            )

    def _require_state(self, saved: Mapping[str, Sequence[Tensor]], params: Mapping[str, Tensor]) -> None:
        """Raise ValueError for the planes of another model or another format."""
        missing, unexpected = sorted(self.planes.keys() - saved.keys()), sorted(saved.keys() - params.keys())
        if missing or unexpected:
            raise ValueError(f"state_dict: missing averages {missing or 'none'}, unexpected {unexpected or 'none'}")
        for name, planes in saved.items():
            found = [(tuple(plane.shape), dtype_of(plane)) for plane in planes]
            wanted = [(tuple(params[name].shape), str(dtype).removeprefix("torch.")) for dtype in self.format.dtypes]
            if found != wanted:
                raise ValueError(
                    f"state_dict: '{name}' is of another shape or format than this average's '{self._name}': {found} "
                    f"instead of {wanted}"
                )
