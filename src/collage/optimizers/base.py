"""The torch.optim.Optimizer shell: groups, planes, step, state_dict. The numerics are below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from collage import backends
from collage.backends import Batch, operator
from collage.backends.batch import cut
from collage.formats import Planes
from collage.monitor import Monitor
from collage.optimizers import admission, compiled, edits, loading, planes
from collage.optimizers.memory import accept
from collage.optimizers.parameters import Group, Named, Parameter, named, require_unique
from collage.optimizers.plan import Columns, Plan, check, chosen, gather, renewed, strategy_for
from collage.optimizers.settings import checked_seed, without_foreign
from collage.rng import signed
from collage.rules import Rule, Setting
from collage.saying import warn_once
from collage.sharding import local_gradients, placed
from collage.strategies import Strategy

ROUNDED = 1e-12  # what a schedule may end below 0 (LinearLR to end_factor=0, by its recursion): it moves nothing
LR = Setting("lr", least=-ROUNDED)


class PrecisionOptimizer(torch.optim.Optimizer):
    """What all optimizers here share. A subclass names its rules and its settings."""

    foreign: ClassVar[tuple[str, ...]] = ("foreach", "fused", "differentiable")  # torch's, which are not kept here
    _in_float32: int | None = None  # how many parameters were, when they were last looked at
    _step_supports_amp_scaling = True  # torch.amp.GradScaler sets grad_scale and found_inf, and calls step()

    def __init__(
        self, params: Any, defaults: dict[str, Any], backend: str, cast: bool, dropped: dict[str, Any]
    ) -> None:
        unknown = without_foreign(dropped, type(self).__name__, self.foreign)
        if unknown:
            raise TypeError(f"{type(self).__name__}: cannot take {', '.join(sorted(unknown))}; it is unknown")
        self.backend = backend
        self._cast = False
        self.monitors: list[Monitor] = []
        self._forget()
        backends.require(backend)
        super().__init__(params, defaults)
        if cast:
            admission.cast(self.rule_of, admission.to_be_cast(list(self.parameters())), self.state)
            self._cast = True
        self._count_float32(admission.require_low_precision(list(self.parameters()), before=None))
        self._warn_of_fallback()

    def rule_of(self, group: Group) -> Rule:
        """The rule that a group's settings ask for."""
        raise NotImplementedError

    def _count_float32(self, count: int) -> None:
        admission.tell_of_float32(count, self._in_float32)
        self._in_float32 = count

    def _warn_of_fallback(self) -> None:
        if self.backend == "auto":
            admission.warn_of_fallback({parameter.tensor.device for parameter in self.parameters()})

    def _forget(self) -> None:
        """Check every tensor anew at the next step."""
        self._fresh: list[Tensor] = []  # whose states the step under way has made
        self._columns: dict[tuple[int, bool], Columns] = {}
        self._plans: dict[int, Plan] = {}
        self._named: dict[int, Named] = {}
        self._told: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()  # of which an edit was, but for those planned

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, in order, with its name (or position) and group."""
        first = 0
        for index, group in enumerate(self.param_groups):
            yield from named(index, first, group)
            first += len(group["params"])

    def _those_of(self, group: Group, params: Sequence[Tensor]) -> Iterator[Parameter]:
        index = next(i for i, other in enumerate(self.param_groups) if other is group)
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:index])
        found = self._named.get(id(group))
        if found is None or not found.holds(index, first, group):
            found = self._named[id(group)] = Named(index, first, group)
        return map(found.by_id.__getitem__, map(id, params))

    @staticmethod
    def strategy_of(parameter: Parameter) -> Strategy:
        """The group's strategy; float32 parameters are updated in float32. Raises TypeError for any other dtype."""
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
            for parameter in self._those_of(group, group["params"]):
                if parameter.tensor.requires_grad:  # of a frozen one nothing is asked until it has a gradient
                    self.strategy_of(parameter)
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
        rule = self.rule_of(group)
        for setting in (LR, *rule.settings):
            group[setting.name] = setting.checked(group[setting.name])
        group["seed"] = checked_seed(group["seed"])
        elsewhere = (x for x in (group["lr"], *rule.hyper(group)) if isinstance(x, Tensor) and x.device.type != "cpu")
        if next(elsewhere, None) is None:  # reading it would wait
            register = Strategy.parse(group["strategy"]).register
            rule.fold(float(group["lr"]), list(map(float, rule.hyper(group))), 1, register)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Under a ``torch.amp.GradScaler`` gradients are divided by its scale, and a step whose gradients are not all
        finite changes and counts nothing.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError, ValueError: a gradient or a parameter that cannot be updated, before any is.
        """
        if torch.compiler.is_compiling():
            return self._traced(closure)
        compiled.require_capturable(self.param_groups)
        edits.require_own((param for group in self.param_groups for param in group["params"]), "step()")
        admission.warn_of_shared_bits(self, self.param_groups, first=not self._columns)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._is_skipped():
            self._advance()
        return loss

    def _is_skipped(self) -> bool:
        """Whether a GradScaler has found a gradient that is not finite. On a GPU the step itself looks."""
        found_inf: Tensor | int | None = getattr(self, "found_inf", None)  # 0 where it found no gradient at all
        if isinstance(found_inf, Tensor) and found_inf.device.type != "cpu":
            for group in self.param_groups:
                group["capturable"] = True  # a skipped step is not counted, so the counters must be where that is known
            for param, values in self.state.items():
                values["step"] = values["step"].to(param.device)
            return False
        return found_inf is not None and bool(found_inf)

    def _advance(self) -> None:
        """Check everything, then make the step."""
        todo: list[tuple[Columns, Batch]] = []
        self._fresh, first = [], 0
        self._drop_the_gone()
        if self.backend not in backends.BACKENDS:  # "auto", or another since it was made
            backends.require(self.backend)
        for group in self.param_groups:
            self._validate(group)
        for group in self.param_groups:
            for in_float32 in (False, True):
                strategy = strategy_for(group, in_float32)
                params = chosen(group, in_float32) if strategy else []
                if strategy and params:
                    columns, grads = self._look(group, first, in_float32, strategy, params)
                    todo.append((columns, self._batch(group, columns, grads)))
            first += len(group["params"])
        if not todo:
            warn_once("step(): no parameter has a gradient, so nothing was updated; call backward() first")
        if self.monitors:
            self._step_measured(todo)
        else:
            for columns, batch in todo:
                self._adopt(columns)
                self._step(columns, batch)

    def _drop_the_gone(self) -> None:
        """Keep nothing of groups that were taken away."""
        present = set(map(id, self.param_groups))
        if present.issuperset(self._named) and present.issuperset(key for key, _ in self._columns):
            return
        self._named = {key: found for key, found in self._named.items() if key in present}
        self._columns = {key: columns for key, columns in self._columns.items() if key[0] in present}
        params = {id(param) for group in self.param_groups for param in group["params"]}
        self._plans = {key: plan for key, plan in self._plans.items() if key in params}

    def _batch(self, group: Group, columns: Columns, grads: Sequence[Tensor]) -> Batch:
        """The step of these parameters, but for its step numbers."""
        scale = getattr(self, "grad_scale", None)
        return Batch(
            columns.rule, columns.formats, columns.strategy.register, group["lr"],
            list(map(float, columns.rule.hyper(group))), group["maximize"], group["seed"], columns.planes, grads, (),
            columns.keys, columns.places, (), columns.steps, 1.0 if scale is None else scale,
            getattr(self, "found_inf", None),
        )  # fmt: skip

    def _adopt(self, columns: Columns, every: bool = False) -> dict[int, int]:
        """Take the weights that others have changed as they are now."""
        strategy = columns.strategy
        return edits.adopt(columns.planes, columns.seen, columns.names, strategy.param, self.backend, every)

    def _step(self, columns: Columns, batch: Batch) -> None:
        operator.carry_out(batch, self.backend, capturable=columns.plans[0].parameter.group["capturable"])
        edits.advance(columns.seen)

    def _step_measured(self, todo: Sequence[tuple[Columns, Batch]]) -> None:
        """The same step, between what the monitors look at before it and after it."""
        names = [name for columns, _ in todo for name in columns.names]
        due = sum(monitor.begin(names) for monitor in self.monitors) > 0  # every monitor counts
        changed: dict[str, int] = {}
        watched = []
        for columns, batch in todo:
            watched.append(([plan.parameter for plan in columns.plans], batch.counted(measured=due)))
            changed |= {columns.names[k]: count for k, count in self._adopt(columns, every=due).items()}
        for monitor in self.monitors:
            monitor.before(watched, changed)
        for (columns, _), (_, batch) in zip(todo, watched, strict=True):
            self._step(columns, batch)
        for monitor in self.monitors:
            monitor.after(watched)

    def _look(
        self, group: Group, first: int, in_float32: bool, strategy: Strategy, params: list[Tensor]
    ) -> tuple[Columns, list[Tensor]]:
        """(parameters that step together as columns, their gradients). Raises before anything is changed."""
        rule = self.rule_of(group)
        grads = local_gradients(params, [param.grad for param in params])
        held, fresh = gather(rule, strategy, params, self.state, group["capturable"])
        self._fresh += fresh
        columns = self._columns.get((id(group), in_float32))
        if not (
            columns and columns.holds(rule, strategy, first, held) and accept(columns.thetas, grads, strategy.dtype)
        ):
            columns = self._renew(group, first, in_float32, (rule, strategy), held, grads)
        return columns, grads

    def _renew(
        self,
        group: Group,
        first: int,
        in_float32: bool,
        under: tuple[Rule, Strategy],
        held: list[Any],
        grads: list[Tensor],
    ) -> Columns:
        """Look at a group's parameters anew. Raises what is wrong with them, and then leaves no state behind."""
        before = self._columns.pop((id(group), in_float32), None)
        if before:
            before.settle()
        params = held[:: len(held) // len(grads)]
        wide: list[int] = []

        def look(parameter: Parameter, grad: Tensor) -> None:
            if in_float32 and not wide:
                wide.append(admission.require_low_precision(list(self.parameters()), self._in_float32))
            self.strategy_of(parameter)
            check(*under, parameter, grad, self.state[parameter.tensor])

        try:
            plans = renewed(self._those_of(group, params), *under, held, grads, self._plans, look)
        except BaseException:
            for param in self._fresh:
                self.state.pop(param, None)
            raise
        self._keep(plans)
        columns = self._columns[id(group), in_float32] = Columns(first, plans)
        if wide:
            self._count_float32(wide[0])
        fresh = set(map(id, self._fresh))
        lost = [p.parameter.name for p in plans if p.stayed and id(p.parameter.tensor) in fresh]
        admission.warn_of_cleared(under[1], lost)
        return columns

    def _keep(self, plans: Sequence[Plan]) -> None:
        """Remember them, and forget those of parameters that are gone."""
        self._plans.update((id(plan.parameter.tensor), plan) for plan in plans)
        for plan in plans if self._told else ():
            plan.told |= plan.parameter.tensor in self._told
        if len(self._plans) > sum(len(group["params"]) for group in self.param_groups):
            present = {id(param) for group in self.param_groups for param in group["params"]}
            self._plans = {key: plan for key, plan in self._plans.items() if key in present}

    def _traced(self, closure: Callable[[], Any] | None) -> Any:
        """The step as torch.compile traces it: two operators per group and strategy."""
        scaled = hasattr(self, "grad_scale") or hasattr(self, "found_inf")  # looked at here, so it is at every call
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for group in self.param_groups:
            for in_float32 in (False, True):
                tensors: list[Tensor] = []
                grads: list[Tensor] = []
                steps: list[Tensor] = []
                keys: list[int] = []
                regions: list[int] = []
                seen: list[Tensor] = []
                names: list[str] = []
                strategy, rule = self._init_group(
                    group, first, in_float32, tensors, grads, steps, keys, regions, seen, names, scaled
                )
                if len(grads) > 0:
                    torch.ops.collage.adopt_(tensors, seen[0], names, rule, strategy, self.backend)
                    lr = group["lr"]
                    torch.ops.collage.step_(
                        tensors, grads, steps, torch.empty(0, 5, dtype=torch.float64, device="cpu"),
                        lr if isinstance(lr, Tensor) else compiled.numbers([lr])[0],
                        compiled.numbers(self.rule_of(group).hyper(group)), rule, strategy, self.backend, keys, regions,
                        signed(group["seed"]), group["maximize"], group["capturable"],
                    )  # fmt: skip
                    edits.advance(seen[0])
            first += len(group["params"])
        return loss

    def _init_group(
        self,
        group: Group,
        first: int,
        in_float32: bool,
        tensors: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        keys: list[int],
        regions: list[int],
        seen: list[Tensor],
        names: list[str],
        scaled: bool,
    ) -> tuple[str, str]:
        """Append what the operators need of a group's parameters. Raises before anything is changed.

        torch.compile knows this method's name: it runs it where it would trace another, and guards what it returned.
        """
        if not first and not in_float32:  # the first call of a step
            self._fresh = []
        strategy = strategy_for(group, in_float32)
        params = chosen(group, in_float32) if strategy else []
        if strategy is None or not params:
            return "", ""
        columns, own = self._look(group, first, in_float32, strategy, params)
        compiled.require_compilable(columns.held, len(self.monitors) > 0, scaled)
        edits.traced(columns.thetas, columns.seen)
        tensors += columns.planes
        grads += own
        steps += columns.steps
        keys += map(signed, columns.keys)
        regions += columns.regions
        seen.append(columns.seen)
        names += columns.names
        return str(strategy), columns.rule.name

    def planes(self, parameter: Parameter, strategy: Strategy | None = None) -> tuple[Planes, ...]:
        """The local planes of every slot of one parameter, theta first; created at first use."""
        strategy = strategy or self.strategy_of(parameter)
        rule, tensor = self.rule_of(parameter.group), parameter.tensor
        if not self.state[tensor]:
            planes.initialise(rule, strategy, tensor, self.state[tensor], parameter.group["capturable"])
        own, values = planes.kept(rule, strategy), self.state[tensor]
        for key, plane in zip(own.keys, own.planes[1:], strict=True):
            planes.require_shape(key, values[key], tensor, parameter.name, plane)
        return cut(own.formats, planes.planes_of(rule, strategy, tensor, values))

    def theta(self, parameter: Parameter) -> Planes:
        """The local planes of one parameter's weights."""
        return self.planes(parameter)[0]

    def tell(self, found: Iterable[tuple[Parameter, int, int]]) -> None:
        """Say of which parameters others changed (so many elements of so many); of each once, steps included."""
        for columns in self._columns.values():
            columns.settle()
        new = []
        for parameter, count, numel in found:
            own = self._plans.get(id(parameter.tensor))
            if parameter.tensor not in self._told and not (own and own.told):
                new.append((parameter.name, count, numel))
            self._told[parameter.tensor] = True
            if own is not None:
                own.told = 1
        for columns in self._columns.values():
            columns.seen[edits.TOLD] = torch.tensor(
                [own.told for own in columns.plans], dtype=torch.int64, device="cpu"
            )
        edits.tell(new)

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
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every plane byte for byte. Also takes the state of the torch.optim optimizer with the same rule.

        Raises:
            ValueError: a state of another strategy, or of other names or shapes. Nothing is changed then.

        Parameters are matched by name where both sides have names, else by position. The model may be loaded before or
        after: the next step takes weights that do not belong to the state as they are, and says so.
        """
        edits.require_own((parameter.tensor for parameter in self.parameters()), "load_state_dict()")
        adopted: dict[str, Any] = {}
        # A state of torch's knows no components: those of parameters that have made no step, here or there, stay.
        unused: dict[Tensor, Any] = {}

        def adopt(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            own = list(self.parameters())
            if loading.is_foreign(saved):
                unused.update((p, values) for p, values in self.state.items() if values and int(values["step"]) == 0)
            adopted.update(loading.adopt(self.param_groups, own, saved, self.rule_of, self.strategy_of, self.state))
            return adopted

        hook = self.register_load_state_dict_pre_hook(adopt)  # runs last: what it returns is what is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for parameter, saved_id, _ in loading.paired(self.parameters(), adopted):
            if saved_id in adopted["state"]:  # torch has cast the planes to the parameter's dtype: take the originals
                device, own = parameter.tensor.device, parameter.group["capturable"]
                self.state[parameter.tensor] = {
                    key: placed(
                        value.detach().to(device if own or key != "step" else "cpu", copy=True), parameter.tensor
                    )
                    for key, value in adopted["state"][saved_id].items()
                }
            elif parameter.tensor in unused:
                self.state[parameter.tensor] = unused[parameter.tensor]
        self._forget()
        for monitor in self.monitors:
            monitor.meet_anew()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend, "_cast": self._cast}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_cast", False)  # saved before there was one
        self.__dict__.setdefault("monitors", [])  # torch calls this in load_state_dict too
        self._forget()
        for group in self.param_groups:
            group.setdefault("capturable", False)  # saved before there was one
        backends.require(self.backend)
        self._warn_of_fallback()
