"""Saved states of one strategy as those of another: every number decoded as it was kept, and encoded as it will be."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from collage.backends.batch import cut
from collage.conversion import Conversion, Rounded, carry, joined
from collage.formats import format_of
from collage.fp8.owning import scale_of
from collage.layout import Plane, Planes
from collage.optimizers import checking, planes
from collage.optimizers.parameters import Parameter, State, name_of
from collage.rules import Rule
from collage.saying import several
from collage.sharding import local, placed
from collage.strategies import Strategy

log = logging.getLogger("collage")


def kept_under(rule: Rule, strategies: Iterable[Strategy], state: Mapping[str, Any]) -> Strategy | None:
    """The first of these strategies whose planes a saved state has; None: it has those of none.

    Where no step was made, theta's planes are enough.
    """
    found = {key: x.dtype for key, x in state.items() if isinstance(x, Tensor) and key != "step"}
    for strategy in strategies:
        wanted = planes.dtypes(rule, strategy)
        words = {key: torch.int16 if wanted.get(key) == torch.int16 else dtype for key, dtype in found.items()}
        if words == wanted or (planes.is_unstepped(state) and words == planes.of_theta(strategy)):
            return strategy
    return None


def from_torch(
    rule: Rule,
    strategy: Strategy,
    parameter: Parameter,
    saved: Mapping[str, Any],
    live: Mapping[str, Tensor],
    report: Conversion | None = None,  # is told what its moments lose
) -> State:
    """A torch.optim state, its moments split into this strategy's planes.

    Theta's other planes are those of the ``live`` state, which may hold more of the weights than plane 0 does; where it
    has none they are derived from the parameter. SGD's states have no counter: one with a momentum has made a step.
    """
    param, name = parameter.tensor, parameter.name
    saved = {key: saved[key] for key in (*rule.prefixes[1:], "step") if key in saved}
    if not rule.torch_counts:
        saved = {key: value for key, value in saved.items() if value is not None}
    checking.require_tensors(saved, name)
    state: State = {}
    planes.initialise(rule, strategy, param, state, capturable=False)
    first = torch.tensor(int(bool(saved)), dtype=torch.int64, device="cpu")
    state["step"] = checking.count(saved.get("step", first), name)
    own = planes.kept(rule, strategy)
    slots = cut(own.formats, planes.planes_of(rule, strategy, param, state))
    for slot, form, out in zip(rule.slots, own.formats, slots, strict=True):
        if slot.prefix in saved:
            checking.require_shape(slot.prefix, saved[slot.prefix], param, name, Plane("", torch.float32))
            value = local(saved[slot.prefix]).to(out[0].device, torch.float32)
            if report is None:
                planes.backend_of(out).encode(form, [value], [out])
            else:
                report.add(slot.prefix, "fp32", form, carry("fp32", [value], form, out))
    return state | planes.theta_among(strategy, live)


def require_held(lost: Rounded, name: str, slot: str, target: str) -> None:
    """Raise ValueError, naming the parameter, for finite numbers that would become infinite."""
    if lost.beyond:
        raise ValueError(
            f"param '{name}': {lost.beyond:,} numbers of {slot} are beyond what '{target}' holds; take a strategy of "
            "bfloat16 formats"
        )


class Converting:
    """A load that converts: the weights as they will show, not written yet, and what was rounded."""

    def __init__(self) -> None:
        self.visible: dict[Tensor, list[Tensor]] = {}  # parameter -> its local part, and that of its scales
        self.report = Conversion()
        self._cut: dict[str, str] = {}  # whose low bits were lost before -> the format that has them
        self._misfits = self._numbers = 0

    def state(
        self,
        rule: Rule,
        saved: Strategy,
        strategy: Strategy,
        parameter: Parameter,
        theirs: State,
        live: Mapping[str, Tensor],  # the state that it has now
    ) -> State:
        """The state of a parameter under its strategy here, out of the saved one. Changes nothing.

        Theta is the weight as it shows now, with the saved low components where they fit; where the saved format has
        none, or they are those of e4m3 weights and these are not, what is here stays. Of weights that are e4m3 here
        alone it is their number that shows, if more of it is here than codes.
        """
        param, fresh = parameter.tensor, State()
        theirs = planes.in_words(rule, saved, {key: placed(x.to(param.device), param) for key, x in theirs.items()})
        planes.initialise(rule, strategy, param, fresh, capturable=False)
        planes.unshare(fresh)
        visible = torch.empty_like(local(param.detach()))
        own = planes.kept(rule, strategy)
        slots = cut(own.formats, planes.planes_of(rule, strategy, visible, fresh))
        for slot, source, target, out in zip(rule.slots, saved.formats(rule.roles), own.formats, slots, strict=True):
            found = [local(theirs[key]) for key in _keys(slot.prefix, source) if key in theirs]
            if slot.prefix == "param" and found and _is_scaled(source) == _is_scaled(target):
                x = local(param.detach())
                self._misfits += self._theta(x, source, found, target, parameter, out)
                self._numbers += x.numel()
                self.visible[param] = [visible, *(local(fresh[key]) for key in fresh if key == planes.SHARED)]
            elif slot.prefix == "param" and found and (number := _number(strategy, param, live)) is not None:
                self._theta(number, source, found, target, parameter, out)
                self.visible[param] = [visible, *(local(fresh[key]) for key in fresh if key == planes.SHARED)]
            elif slot.prefix == "param":
                here = planes.theta_among(strategy, live)
                if format_of(source).dtypes[0] != visible.dtype and planes.of_theta(strategy).keys() != here.keys():
                    self._cut[parameter.name] = source
                fresh |= here
            elif found:
                self._count(slot.prefix, source, target, carry(source, found, target, out), parameter)
        return {**fresh, "step": theirs["step"]}

    def _theta(self, x: Tensor, source: str, lows: Planes, target: str, parameter: Parameter, out: Planes) -> int:
        """Put what shows, x, and its saved low components together. Returns how many of these did not fit."""
        dtype = format_of(source).dtypes[0]
        if x.dtype != dtype and x.dtype == torch.bfloat16:
            raise ValueError(
                f"param '{parameter.name}': it is bfloat16, and the state has low components of {name_of(dtype)} "
                "weights, whose visible ones do not fit into it; `collage convert` takes both, model and state"
            )
        found, own, misfits = joined(x, source, lows)
        self._count("param", source, target, carry(found, own, target, out), parameter)
        return misfits

    def _count(self, slot: str, source: str, target: str, lost: Rounded, parameter: Parameter) -> None:
        require_held(lost, parameter.name, slot, target)
        self.report.add(slot, source, target, lost)

    def finish(self) -> None:
        """Write the weights that show otherwise now, and say what was rounded."""
        for param, values in self.visible.items():
            here = [param.detach(), *(scale for scale in [scale_of(param)] if scale is not None)]
            for own, value in zip(map(local, here), values, strict=True):
                if not torch.equal(own, value):
                    own.copy_(value)
        log.info("state_dict: converted: %s", self.report)
        if self._cut:
            log.info(
                "%s: saved in '%s', of which the model's load has kept what fits into its own weights; with "
                "collage.load_high_precision_state_dict(model, optimizer, weights) before this the low bits stay",
                several([*self._cut]), next(iter(self._cut.values())),
            )  # fmt: skip

    def require_fit(self) -> None:
        """Raise ValueError where the weights here are others than those the state was saved with."""
        if 2 * self._misfits > self._numbers:
            raise ValueError(
                f"state_dict: {self._misfits:,} of {self._numbers:,} low components do not belong to the weights that "
                "the model has now; load its weights first, then the optimizer's state with convert=True"
            )


def _keys(prefix: str, fmt: str) -> list[str]:
    """Of a saved state's planes in a format; the parameter itself is in none."""
    return [prefix + suffix for suffix in format_of(fmt).suffixes if prefix + suffix != "param"]


def _number(strategy: Strategy, param: Tensor, live: Mapping[str, Tensor]) -> Tensor | None:
    """This rank's part of e4m3 weights in float32; None: they are none, or nothing but their codes is known."""
    here, fmt = planes.theta_among(strategy, live), format_of(strategy.param)
    if not _is_scaled(strategy.param) or here.keys() != planes.of_theta(strategy).keys():
        return None
    theta = [local(param.detach()), *map(local, here.values())]
    number = fmt.value(theta)
    return None if torch.equal(number, fmt.visible(theta)) else number


def _is_scaled(fmt: str) -> bool:
    return any(plane.per is None for plane in format_of(fmt).planes)
