"""Any other optimizer on low-precision weights: decode a bucket of parameters, let it make its step, encode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from collage.conversion import Conversion
from collage.formats import format_of
from collage.monitor.shadow import Follower
from collage.optimizers.base import PrecisionOptimizer
from collage.optimizers.parameters import Group, Parameter
from collage.optimizers.planes import cut_of
from collage.optimizers.settings import checked_seed
from collage.optimizers.wrapping import loading
from collage.optimizers.wrapping.bucket import Memory
from collage.optimizers.wrapping.foreign import OWN, Foreign, given_by_name
from collage.optimizers.wrapping.probing import Kept, Shape, is_elementwise, probed
from collage.optimizers.wrapping.shadow import WrappedShadow
from collage.optimizers.wrapping.slots import Formats, checked, require_known, require_signs
from collage.optimizers.wrapping.stepping import InBuckets
from collage.rules import Rule
from collage.rules.assign import ASSIGN
from collage.strategies import Strategy

REWRITING = ("train", "eval")  # methods of optimizers that write weights outside of a step
ELEMENTWISE = replace(ASSIGN, torch=lambda group, keys: "")  # a state of the optimizer itself may be loaded
RULE = replace(ELEMENTWISE, elementwise=False)


def wrap(
    optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer],
    *args: Any,
    strategy: str | Strategy = "collage-plus",
    states: Mapping[str, str] | None = None,
    bucket_mb: float = 64,
    cast: bool = False,
    seed: int = 0,
    skip_nonfinite: bool = False,
    backend: str = "auto",
    **kwargs: Any,
) -> Wrapped:
    """Any optimizer that updates each parameter by itself, on low-precision weights without a float32 copy.

    A step takes parameters in buckets: theta and the optimizer's states are decoded to float32, the optimizer makes its
    own step on those alone, and what it made is encoded. So the update is the optimizer's own, of the float32 value:
    under "fp32-master" the bits are those of the optimizer on float32 weights. Its floor is float32's, with ":sr" too.

    States of the parameter's shape take the strategy's format for momentum or variance by their names (``exp_avg``,
    ``momentum_buffer``, ``exp_avg_sq``, ``square_avg``, ``sum``, ...), iterates (``z``, ``ax``) that of the weights.
    All others stay as the optimizer makes them; ``repr`` says which.

    Args:
        optimizer: constructed, or a class, whose arguments follow: ``wrap(torch.optim.NAdam, params, lr=1e-3)``. Its
            own ``foreach`` or ``fused`` may be on. Do not use it by itself any more.
        strategy, cast, seed, skip_nonfinite, backend: as `AdamW`'s. A group may have a ``strategy`` of its own.
        states: name -> format of a state, as in ``states={"prev": "fp32"}``; wins over what its name says.
        bucket_mb: MiB of float32 numbers that a step holds at a time; a parameter that is larger goes alone.

    Returns:
        An optimizer with the same groups, settings and keys of ``state_dict()``: planes have our suffixes
        (``exp_avg_sq_lo``), those of theta begin with ``param_``.

    Raises:
        TypeError: what is no optimizer, or one that cannot step by its gradients alone (LBFGS needs a closure).
        ValueError: one that needs all of its parameters at once (Prodigy, D-Adaptation), a strategy in bfloat16
            arithmetic, an unknown strategy or format.

    >>> model = torch.nn.Linear(4, 2).bfloat16()
    >>> opt = wrap(torch.optim.NAdam, model.named_parameters(), lr=1e-3, strategy="collage-plus")
    >>> model(torch.ones(1, 4).bfloat16()).sum().backward()
    >>> opt.step()
    >>> sorted(opt.state_dict()["state"][0])
    ['exp_avg', 'exp_avg_sq', 'exp_avg_sq_lo', 'mu_product', 'param_lo', 'param_step', 'step']
    """
    _require_wrappable(optimizer if isinstance(optimizer, type) else type(optimizer))
    arguments = None
    if isinstance(optimizer, type):
        arguments = given_by_name(optimizer, args, kwargs)
        optimizer = optimizer(*args, **kwargs)
    elif args or kwargs:
        unknown = ", ".join([*(f"{x!r:.40}" for x in args), *kwargs])
        raise TypeError(f"wrap: {unknown}: the optimizer is constructed already; give its class to give it arguments")
    ours = {"strategy": strategy, "seed": seed, "skip_nonfinite": skip_nonfinite}
    return Wrapped(optimizer, arguments, ours, states, bucket_mb, cast, backend)


def _require_wrappable(kind: type) -> None:
    if not issubclass(kind, torch.optim.Optimizer):
        raise TypeError(f"wrap: needs a torch.optim.Optimizer, or a class of one, got {kind.__name__}")
    if issubclass(kind, PrecisionOptimizer):
        raise TypeError(f"wrap: {kind.__name__} keeps its weights in a strategy's formats already; use it as it is")


class Wrapped(InBuckets):
    """What `wrap` makes.

    Attributes:
        base: the optimizer that was wrapped. Its ``state`` is that of every parameter, in planes.
        states, bucket_mb: as given to `wrap`.
    """

    foreign = ()

    def __init__(
        self,
        base: torch.optim.Optimizer,
        arguments: Mapping[str, Any] | None,
        ours: dict[str, Any],
        states: Mapping[str, str] | None,
        bucket_mb: float,
        cast: bool,
        backend: str,
    ) -> None:
        if not isinstance(bucket_mb, int | float) or not bucket_mb > 0:
            raise ValueError(f"bucket_mb: needs a number > 0, got {bucket_mb!r}")
        self.base, self.bucket_mb, self.states = base, bucket_mb, checked(states)
        self._elementwise: dict[int, bool] = {}
        self._memory = Memory()
        self._foreign = Foreign(base, arguments)
        self._foreign.look()
        tried = [probed(self._foreign, group) for group in base.param_groups]  # before anything is cast
        require_known(self.states, [own.states for each in tried for own in each.values()])
        for group, each in zip(base.param_groups, tried, strict=True):
            self._require_signs({**ours, **group}, each)
        super().__init__([dict(group) for group in base.param_groups], {**base.defaults, **ours}, backend, cast, {})
        self._tried = tried
        self._require_whole_blocks(self.parameters())
        base.param_groups = self.param_groups
        self._optimizer_step_pre_hooks.update(base._optimizer_step_pre_hooks)
        self._optimizer_step_post_hooks.update(base._optimizer_step_post_hooks)
        self._take_over()

    def _take_over(self) -> None:
        """The states that the optimizer has already, in planes; those of its constructor are made anew, in float32."""
        for parameter in self.parameters():
            found = self.base.state.get(parameter.tensor)
            if found and self._foreign.has_stepped(found):
                self.base.state[parameter.tensor] = self._in_planes(parameter, found)
            else:
                self.base.state.pop(parameter.tensor, None)

    def rule_of(self, group: Group) -> Rule:
        """Of theta alone: it becomes what the optimizer made of it. The states are the optimizer's."""
        return ELEMENTWISE if self._is_elementwise(group) else RULE

    def _is_elementwise(self, group: Group) -> bool:
        """Whether a shadow can follow single elements; tried once for a group, and only if there is one.

        Not of a group that is being loaded, which has no parameters yet.
        """
        if not self.monitors or not any(group is own for own in self.param_groups):
            return True
        if id(group) not in self._elementwise:
            self._elementwise[id(group)] = is_elementwise(self._foreign, group)
        return self._elementwise[id(group)]

    def shadow(self, stride: int, strategies: Sequence[Strategy]) -> Follower:
        """What follows the steps: the optimizer itself, in float32 and under other strategies."""
        for strategy in strategies:
            self._require_float32("strategies", strategy)
        return WrappedShadow(self, self._foreign, stride, strategies)

    def _validate(self, group: Group) -> None:
        super(PrecisionOptimizer, self)._validate(group)
        group["seed"] = checked_seed(group["seed"])
        self._require_float32("strategy", Strategy.parse(group["strategy"]))

    def _require_float32(self, setting: str, strategy: Strategy) -> None:
        if strategy.register != torch.float32:
            raise ValueError(
                f"{setting}: '{strategy}' adds increments in bfloat16 arithmetic, and {self._foreign.name} gives no "
                "increment but a new float32 number; use 'collage-plus', 'collage-light' or 'bf16'"
            )

    def __getattr__(self, name: str) -> Any:
        foreign = self.__dict__.get("_foreign")
        if name in REWRITING and foreign and foreign.has(name):
            return partial(self._rewrite, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    @torch.no_grad()
    def reset_moments(self) -> None:
        """As every optimizer's here; what the optimizer keeps in its groups stays."""
        super().reset_moments()
        self.base.state.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as the optimizer itself takes one; it may have a strategy of its own."""
        if not hasattr(self, "_tried"):  # the optimizer's own, while it is being wrapped
            super().add_param_group(param_group)
            return
        known = list(self.param_groups)
        self.base.add_param_group(param_group)
        group = self.base.param_groups[-1]
        self.param_groups[:] = known
        tried = probed(self._foreign, group)
        self._require_signs({**self.defaults, **group}, tried)
        super().add_param_group(group)
        self._tried.append(tried)
        try:
            added = self.param_groups[-1]
            self._require_whole_blocks(self._those_of(added, added["params"]))
        except ValueError:
            self.param_groups.pop()
            self._tried.pop()
            raise

    def _require_signs(self, group: Mapping[str, Any], tried: Mapping[Shape, Kept]) -> None:
        require_signs(Formats(Strategy.parse(group["strategy"]), self.states), [own.states for own in tried.values()])

    def _require_whole_blocks(self, parameters: Iterable[Parameter]) -> None:
        """Raise ValueError, naming the parameter, where its shards cut blocks in which the optimizer's states are."""
        for parameter in (own for own in parameters if own.tensor.requires_grad):
            formats, kept = self.formats_of(parameter), self._kept(parameter.group_index, parameter.tensor)
            planes = [plane for name in kept.shaped if (fmt := formats.of(name)) for plane in format_of(fmt).planes]
            reason = cut_of(planes, formats.strategy, parameter.tensor)
            if reason:
                raise ValueError(f"param '{parameter.name}': {reason}")

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, its planes with our suffixes, and those of theta, which begin with ``param_``."""
        return loading.merged(super().state_dict(), self.param_groups, self.base.state)

    def load_state_dict(  # type: ignore[override]  # torch's has nothing to return
        self, state_dict: dict[str, Any], convert: bool = False
    ) -> Conversion | None:
        """Restore every plane byte for byte. Also takes a state of the optimizer itself, unwrapped.

        Args:
            state_dict: of this optimizer, wrapped or not.
            convert: take a state of another strategy too, as `AdamW.load_state_dict` does; with the same ``states``.

        Raises:
            ValueError: a state of another strategy (without ``convert``), or of other names or shapes. Nothing is
                changed then.
        """
        own, report = list(self.parameters()), Conversion() if convert else None
        saved, is_raw = loading.arranged(state_dict, self.param_groups, OWN)
        loaded = loading.checked_states(
            saved, is_raw, own, self.formats_of, lambda p: self._kept(p.group_index, p.tensor), report
        )
        theta = loading.with_theta(saved, own, self.state) if is_raw else loading.of_theta(saved)
        of_theta = super().load_state_dict(theta, convert)
        self.base.param_groups = self.param_groups
        self.base.state.clear()
        for parameter in self.parameters():
            if parameter.tensor in loaded:
                state = loaded[parameter.tensor]
                self.base.state[parameter.tensor] = self._in_planes(parameter, state) if is_raw else state
        return None if of_theta is None or report is None else of_theta + report

    def __getstate__(self) -> dict[str, Any]:
        mine = ("base", "states", "bucket_mb", "_tried")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in mine}, **self._foreign.facts()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "arguments" in state:
            self._elementwise, self._memory = {}, Memory()
            self._foreign = Foreign.of(self.base, state)
            self.base.param_groups = self.param_groups

    def __repr__(self) -> str:
        """torch's, and which states the optimizer keeps in which formats."""
        lines = [super().__repr__(), f"wraps {type(self.base).__module__}.{self._foreign.name}"]
        for index, (group, tried) in enumerate(zip(self.param_groups, self._tried, strict=True)):
            formats = Formats(Strategy.parse(group["strategy"]), self.states)
            lines.append(f"group {index}: {formats.shown(kept.states for kept in tried.values())}")
        return "\n".join(lines)
