"""The torch.optim.Optimizer shell: groups, planes, step, state_dict. The numerics are below it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from collage import backends
from collage.backends.batch import cut, folded
from collage.collectives import together
from collage.conversion import Conversion
from collage.fp8.owning import taken_remainder
from collage.layout import Planes
from collage.monitor.shadow import Follower, Shadow
from collage.optimizers import admission, checking, edits, loading, planes
from collage.optimizers.converting import Converting
from collage.optimizers.guarded import Guarded
from collage.optimizers.memory import has_memory
from collage.optimizers.parameters import Group, Parameter, named, require_unique
from collage.optimizers.plan import require_whole_blocks
from collage.optimizers.settings import checked_seed, without_foreign
from collage.rules import Setting
from collage.sharding import as_bytes, local, placed
from collage.strategies import Strategy

ROUNDED = 1e-12  # what a schedule may end below 0 (LinearLR to end_factor=0, by its recursion): it moves nothing
LR = Setting("lr", least=-ROUNDED)
SWITCHES = {"capturable": False, "skip_nonfinite": False}  # of every group, also of one saved before there were any


class PrecisionOptimizer(Guarded):
    """What all optimizers here share. A subclass names its rules and its settings."""

    foreign: ClassVar[tuple[str, ...]] = ("foreach", "fused", "differentiable")  # torch's, which are not kept here

    def __init__(
        self, params: Any, defaults: dict[str, Any], backend: str, cast: bool, dropped: dict[str, Any]
    ) -> None:
        unknown = without_foreign(dropped, type(self).__name__, self.foreign)
        if unknown:
            raise TypeError(f"{type(self).__name__}: cannot take {', '.join(sorted(unknown))}; it is unknown")
        self.backend = backend
        self._cast = False
        self.monitors = []
        self._forget()
        backends.require(backend)
        super().__init__(params, {**SWITCHES, **defaults})
        if cast:
            admission.cast(self.rule_of, admission.to_be_cast(list(self.parameters())), self.state)
            self._cast = True
        admission.require_converted(list(self.parameters()))
        self._begin()
        self._count_float32(admission.require_low_precision(list(self.parameters()), before=None))
        self._warn_of_fallback()

    def _begin(self) -> None:
        """Make the states of a model with e4m3 weights at once, where others' are made at their first step.

        torch.distributed.checkpoint would make them by a step with gradients of the weights' own dtype.
        """
        own = list(self.parameters())
        for parameter in own if any(parameter.tensor.dtype == torch.float8_e4m3fn for parameter in own) else ():
            if parameter.tensor.requires_grad and has_memory(local(parameter.tensor)):
                self.planes(parameter)

    def _warn_of_fallback(self) -> None:
        if self.backend == "auto":
            admission.warn_of_fallback({parameter.tensor.device for parameter in self.parameters()})

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, in order, with its name (or position) and group."""
        first = 0
        for index, group in enumerate(self.param_groups):
            yield from named(index, first, group)
            first += len(group["params"])

    def __repr__(self) -> str:
        """torch's, and where some parameters have other formats: which, and how many these are."""
        lines = [super().__repr__()]
        for index, group in enumerate(self.param_groups):
            strategy = Strategy.parse(group["strategy"])
            others = sum(strategy.excepts(param.dtype, param.shape) for param in group["params"])
            if strategy.exception:
                kept = f"{', '.join(strategy.formats())}; {strategy.exception}"
                lines.append(f"group {index}: {kept}; so do {others} of its {len(group['params'])}")
        return "\n".join(lines)

    def shadow(self, stride: int, strategies: Sequence[Strategy]) -> Follower:
        """What a monitor has follow the steps, on one element in ``stride``."""
        return Shadow(stride, strategies)

    def strategy_of(self, parameter: Parameter) -> Strategy:
        """The group's strategy, as its shape has it; float32 ones step in float32. TypeError for any other dtype."""
        return admission.strategy_of(parameter)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may have a strategy of its own. Raises before anything is added."""
        for key in {"backend", "cast"} & param_group.keys():
            raise ValueError(f"{key}: one for the whole optimizer; give it to the constructor, not to a group")
        super().add_param_group(without_foreign(param_group, type(self).__name__, self.foreign))
        group = self.param_groups[-1]
        try:
            group["strategy"] = str(Strategy.parse(group["strategy"]))
            self._validate(group)
            admission.warn_of_underflow(self.rule_of(group), Strategy.parse(group["strategy"]))
            for parameter in self._those_of(group, group["params"]):
                if parameter.tensor.requires_grad:  # of a frozen one nothing is asked until it has a gradient
                    require_whole_blocks(self.rule_of(group), self.strategy_of(parameter), parameter)
            admission.warn_of_flat_shards(Strategy.parse(group["strategy"]), self._those_of(group, group["params"]))
            require_unique(parameter.name for parameter in self.parameters())
            wide = admission.to_be_cast(list(self.parameters())) if self._cast else []
            wide = [parameter for parameter in wide if parameter.group is group]
        except BaseException:
            self.param_groups.pop()
            self._named.pop(id(group), None)
            raise
        admission.cast(self.rule_of, wide, self.state)

    def _validate(self, group: Group) -> None:
        """Raise, naming the setting, for one out of range; numbers of other kinds (NumPy's) become Python's."""
        super()._validate(group)
        rule = self.rule_of(group)
        for setting in (LR, *rule.settings):
            group[setting.name] = setting.checked(group[setting.name])
        group["seed"] = checked_seed(group["seed"])
        for name in ("maximize", "capturable"):
            if not isinstance(group[name], bool):
                raise TypeError(f"{name}: needs True or False, got {group[name]!r}")
        settings = [group["lr"], *rule.hyper(group)]
        if not any(isinstance(x, Tensor) and x.device.type != "cpu" for x in settings):  # reading it would wait
            lr, *hyper = map(float, settings)
            folded(rule, lr, tuple(hyper), 1, Strategy.parse(group["strategy"]).register)  # raises where one becomes 0

    def planes(self, parameter: Parameter, strategy: Strategy | None = None) -> tuple[Planes, ...]:
        """The local planes of every slot of one parameter, theta first; created at first use."""
        self._take_remainders([parameter])
        strategy = strategy or self.strategy_of(parameter)
        rule, tensor = self.rule_of(parameter.group), parameter.tensor
        if not self.state[tensor]:
            planes.initialise(rule, strategy, tensor, self.state[tensor], parameter.group["capturable"])
        planes.complete(rule, strategy, tensor, self.state[tensor])
        own, values = planes.kept(rule, strategy), self.state[tensor]
        for key, plane in zip(own.keys, own.planes[1:], strict=True):
            checking.require_shape(key, values[key], tensor, parameter.name, plane)
        return cut(own.formats, planes.planes_of(rule, strategy, tensor, values))

    def theta(self, parameter: Parameter) -> Planes:
        """The local planes of one parameter's weights."""
        return self.planes(parameter)[0]

    @torch.no_grad()
    def resync(self) -> None:
        """Take every weight as it is now, and drop all its other components (lo, master, compensation).

        Nobody has to call it after an edit: a step, a monitor and an export see weights that others changed, and derive
        anew what no longer fits. It is for writes that no version counter sees (``p.data.mul_()``, a replayed CUDA
        graph), and for dropping every low component on purpose. A monitor counts them as ``edited``.
        """
        edits.require_own((parameter.tensor for parameter in self.parameters()), "resync()")
        held = [p for p in self.parameters() if self.state.get(p.tensor) and self.planes(p)]
        changed = {
            p.name: planes.resync(self.rule_of(p.group), self.strategy_of(p), p.tensor, self.state[p.tensor])
            for p in held
        }
        for monitor in self.monitors:
            monitor.edited(held, changed)

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Start every moment and step counter anew (warm restarts, ReLoRA); the weights keep all their components.

        ``opt.state.clear()`` would take the low components of the weights with it.
        """
        for parameter in self.parameters():
            for key, value in self.state.get(parameter.tensor, {}).items():
                if not key.startswith("param"):
                    value.zero_()
        for monitor in self.monitors:
            monitor.meet_anew()

    @torch.no_grad()
    def load_state_dict(  # type: ignore[override]  # torch's has nothing to return
        self, state_dict: dict[str, Any], convert: bool = False
    ) -> Conversion | None:
        """Restore every plane byte for byte. Also takes the state of the torch.optim optimizer with the same rule.

        Parameters are matched by name where both sides have names, else by position. The model may be loaded before or
        after: the next step takes weights that do not belong to the state as they are, and says so.

        Args:
            state_dict: of this class, or of torch's.
            convert: take a state of another strategy too: every number is decoded as it was kept and encoded as it is
                kept here, weights with their low components. The model has to be loaded before: it has the components
                that a forward pass sees.

        Returns:
            With ``convert`` what was rounded, slot by slot, which is logged too; else None.

        Raises:
            ValueError: a state of another strategy (without ``convert``), or of other names or shapes. Nothing is
                changed then.
        """
        edits.require_own((parameter.tensor for parameter in self.parameters()), "load_state_dict()")
        self._take_remainders(self.parameters())  # of weights that were loaded before; the state has its own
        adopted: dict[str, Any] = {}
        # A state of torch's knows no components: those of parameters that have made no step, here or there, stay.
        unused: dict[Tensor, Any] = {}
        converting = Converting() if convert else None

        def adopt(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            own = list(self.parameters())
            if loading.is_foreign(saved):
                unused.update((p, values) for p, values in self.state.items() if values and int(values["step"]) == 0)
            asked = self.param_groups, own, saved, self.rule_of, self.strategy_of, self.state, converting
            with together([p.tensor for p in own] if convert else [], "state_dict: this rank's part of the state"):
                adopted.update(loading.adopt(*asked))
            return adopted

        hook = self.register_load_state_dict_pre_hook(adopt)  # runs last: what it returns is what is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for parameter, saved_id, _ in loading.paired(self.parameters(), adopted):
            if saved_id in adopted["state"]:  # torch has cast the planes to the parameter's dtype: take the originals
                device, own = parameter.tensor.device, parameter.group["capturable"]
                state = {
                    key: placed(
                        value.detach().to(device if own or key != "step" else "cpu", copy=True), parameter.tensor
                    )
                    for key, value in adopted["state"][saved_id].items()
                }
                under = self.rule_of(parameter.group), self.strategy_of(parameter)
                self.state[parameter.tensor] = planes.in_words(*under, state)
                taken_remainder(parameter.tensor)
            elif parameter.tensor in unused:
                self.state[parameter.tensor] = unused[parameter.tensor]
        if converting:
            converting.finish()
        self._forget()
        for monitor in self.monitors:
            monitor.meet_anew()
        return converting.report if converting else None

    def state_dict(self) -> dict[str, Any]:
        """torch's; remainders of 16 bits are bytes [..., 2] in it, in the same memory, which collectives can gather."""
        self._take_remainders(self.parameters())
        saved = super().state_dict()
        states = {k: {key: as_bytes(x) for key, x in own.items()} for k, own in saved["state"].items()}
        return {**saved, "state": states}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend, "_cast": self._cast}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_cast", False)  # saved before there was one
        self.__dict__.setdefault("monitors", [])  # torch calls this in load_state_dict too
        self._forget()
        for group in self.param_groups:
            for name, value in SWITCHES.items():
                group.setdefault(name, value)
        backends.require(self.backend)
        self._warn_of_fallback()
