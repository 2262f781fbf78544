"""One step: look at every parameter, take what others changed, carry it out, between what monitors see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from collage.backends import BACKENDS, Batch, operator, require
from collage.monitor import Monitor
from collage.optimizers import admission, compiled, edits
from collage.optimizers.memory import accept
from collage.optimizers.parameters import Group, Named, Parameter
from collage.optimizers.plan import WIDE, Columns, Plan, check, chosen, renewed, started, strategies_for
from collage.rules import Rule
from collage.saying import warn_once
from collage.sharding import any_dtensor, local_gradients
from collage.strategies import Strategy


class Stepping(compiled.Traced):
    """What a step needs of an optimizer, and keeps from one to the next."""

    backend: str
    monitors: list[Monitor]
    _in_float32: int | None = None  # how many parameters were, when they were last looked at
    _step_supports_amp_scaling = True  # torch.amp.GradScaler sets grad_scale and found_inf, and calls step()

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, in order, with its name (or position) and group."""
        raise NotImplementedError

    def strategy_of(self, parameter: Parameter) -> Strategy:
        """The strategy that a parameter is updated under."""
        raise NotImplementedError

    def _validate(self, group: Group) -> None:
        """Raise, naming the setting, for one out of range."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Check every tensor anew at the next step."""
        self._fresh: list[Tensor] = []  # whose states the step under way has made
        self._columns: dict[tuple[int, int, int], Columns] = {}  # by group, kind and first parameter: all others apart
        self._plans: dict[int, Plan] = {}
        self._named: dict[int, Named] = {}
        self._told: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()  # of which an edit was, but for those planned

    def _those_of(self, group: Group, params: Sequence[Tensor]) -> Iterator[Parameter]:
        index = next(i for i, other in enumerate(self.param_groups) if other is group)
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:index])
        found = self._named.get(id(group))
        if found is None or not found.holds(index, first, group):
            found = self._named[id(group)] = Named(index, first, group)
        return map(found.by_id.__getitem__, map(id, params))

    def _count_float32(self, count: int) -> None:
        admission.tell_of_float32(count, self._in_float32)
        self._in_float32 = count

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
        loss = None if closure is None else self._evaluated(closure)
        if not self._is_skipped():
            self._advance()
        return loss

    def _evaluated(self, closure: Callable[[], Any]) -> Any:
        """The closure's loss. No scaler is at work: Lightning clips within a closure, and asks whether one may be."""
        if getattr(self, "found_inf", None) is not None:
            raise RuntimeError("closure: a GradScaler has looked at the gradients already; call scaler.step(opt) alone")
        self._step_supports_amp_scaling = False
        try:
            with torch.enable_grad():
                return closure()
        finally:
            del self._step_supports_amp_scaling  # the class's is seen again

    def _is_skipped(self) -> bool:
        """Whether a GradScaler has found a gradient that is not finite. On a GPU the step itself looks."""
        found_inf: Tensor | int | None = getattr(self, "found_inf", None)  # 0 where it found no gradient at all
        if isinstance(found_inf, Tensor) and found_inf.device.type != "cpu":
            self._count_on_device()
            return False
        return found_inf is not None and bool(found_inf)

    def _count_on_device(self) -> None:
        """Have the step counters where it is known whether a step is skipped, which is not counted."""
        for group in self.param_groups:
            group["capturable"] = True
        for param, values in self.state.items():
            values.update((key, x.to(param.device)) for key, x in values.items() if key == "step")

    def _advance(self) -> None:
        """Check everything, then make the step."""
        self._prepare()
        todo = self._looked(dict.fromkeys(range(len(self.param_groups))))
        if not todo:
            warn_once("step(): no parameter has a gradient, so nothing was updated; call backward() first")
        self._make(todo)

    def _prepare(self) -> None:
        """Check what a step, or all parts of one, go by."""
        self._drop_the_gone()
        if self.backend not in BACKENDS:  # "auto", or another since it was made
            require(self.backend)
        for group in self.param_groups:
            self._validate(group)

    def _looked(self, of_groups: Mapping[int, Sequence[Tensor] | None]) -> list[tuple[Columns, Batch]]:
        """What is to be done for these parameters of each group that have a gradient; None: for all of the group."""
        todo: list[tuple[Columns, Batch]] = []
        self._fresh = []
        for group, first, kind, params, grads in list(self._chosen(of_groups)):
            columns = self._look(group, first, kind, params, grads)
            todo.append((columns, self._batch(group, columns, grads)))
        return todo

    def _chosen(
        self, of_groups: Mapping[int, Sequence[Tensor] | None]
    ) -> Iterator[tuple[Group, int, int, list[Tensor], list[Tensor]]]:
        """What steps together: group, position of its first parameter, kind, parameters, their local gradients.

        All that ranks do together to bring gradients to their parameters is done when this ends.
        """
        first = 0
        for index, group in enumerate(self.param_groups):
            for kind, (params, grads) in enumerate(chosen(group, of_groups[index]) if index in of_groups else ()):
                if params:
                    yield group, first, kind, params, local_gradients(params, grads)
            first += len(group["params"])

    def _make(self, todo: Sequence[tuple[Columns, Batch]]) -> None:
        if self.monitors:
            self._step_measured(todo)
        else:
            for columns, batch in todo:
                self._adopt(columns)
                self._step(columns, batch)

    def _drop_the_gone(self) -> None:
        """Keep nothing of groups that were taken away."""
        present = set(map(id, self.param_groups))
        if present.issuperset(self._named) and present.issuperset(at[0] for at in self._columns):
            return
        self._named = {key: found for key, found in self._named.items() if key in present}
        self._columns = {at: columns for at, columns in self._columns.items() if at[0] in present}
        params = {id(param) for group in self.param_groups for param in group["params"]}
        self._plans = {key: plan for key, plan in self._plans.items() if key in params}

    def _batch(self, group: Group, columns: Columns, grads: Sequence[Tensor]) -> Batch:
        """The step of these parameters, but for its step numbers."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return Batch(
            columns.rule, columns.formats, columns.strategy.register, group["lr"],
            list(map(float, columns.rule.hyper(group))), group["maximize"], group["seed"], columns.planes, grads, (),
            columns.keys, columns.places, (), columns.steps, 1.0 if scale is None else scale,
            found_inf if isinstance(found_inf, Tensor) else None, columns.kept,
        )  # fmt: skip

    def _adopt(self, columns: Columns, every: bool = False) -> dict[int, int]:
        """Take the weights that others have changed as they are now."""
        theta = columns.strategy.param
        return edits.adopt(columns.planes, columns.seen, columns.names, theta, self.backend, every, columns.sharded)

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

    def _look(self, group: Group, first: int, kind: int, params: list[Tensor], grads: list[Tensor]) -> Columns:
        """Parameters that step together as columns, of local gradients. Raises before anything is changed."""
        rule, strategy = self.rule_of(group), strategies_for(group)[kind]
        columns = self._columns.get((id(group), kind, id(params[0])))
        if not (
            columns
            and columns.holds(rule, strategy, first, params, self.state)
            and accept(columns.thetas, grads, strategy.dtype)
        ):
            columns = self._renew(group, first, kind, (rule, strategy), params, grads)
        return columns

    def _renew(
        self,
        group: Group,
        first: int,
        kind: int,
        under: tuple[Rule, Strategy],
        params: list[Tensor],
        grads: list[Tensor],
    ) -> Columns:
        """Look at a group's parameters anew. Raises what is wrong with them, and then leaves no state behind."""
        self._let_go(params)
        wide: list[int] = []

        def look(parameter: Parameter, grad: Tensor) -> None:
            if kind == WIDE and not wide:
                wide.append(admission.require_low_precision(list(self.parameters()), self._in_float32))
            self.strategy_of(parameter)
            check(*under, parameter, grad, self.state[parameter.tensor])

        try:
            self._fresh += started(*under, params, self.state, group["capturable"])
            plans = renewed(self._those_of(group, params), *under, grads, self.state, self._plans, look)
        except BaseException:
            self._drop_fresh()
            raise
        self._keep(plans)
        columns = self._columns[id(group), kind, id(params[0])] = Columns(first, plans)
        if wide:
            self._count_float32(wide[0])
        fresh = set(map(id, self._fresh))
        lost = [p.parameter.name for p in plans if p.stayed and id(p.parameter.tensor) in fresh]
        admission.warn_of_cleared(under[1], lost)
        return columns

    def _drop_fresh(self) -> None:
        """Leave no state behind of a step that is not made."""
        for param in self._fresh:
            self.state.pop(param, None)

    def _let_go(self, params: Sequence[Tensor]) -> None:
        """Drop all columns that any of these parameters is in; what was seen of them stays in their plans."""
        own = set(map(id, params))
        for at, columns in list(self._columns.items()):
            if not own.isdisjoint(map(id, columns.params)):
                columns.settle()
                del self._columns[at]

    def _keep(self, plans: Sequence[Plan]) -> None:
        """Remember them, and forget those of parameters that are gone."""
        self._plans.update((id(plan.parameter.tensor), plan) for plan in plans)
        for plan in plans if self._told else ():
            plan.told |= plan.parameter.tensor in self._told
        if len(self._plans) > sum(len(group["params"]) for group in self.param_groups):
            present = {id(param) for group in self.param_groups for param in group["params"]}
            self._plans = {key: plan for key, plan in self._plans.items() if key in present}

    def tell(self, found: Iterable[tuple[Parameter, int, int]]) -> None:
        """Say of which parameters others changed (so many elements of so many); of each once, steps included."""
        for columns in self._columns.values():
            columns.settle()
        new = []
        for parameter, count, numel in found:
            own = self._plans.get(id(parameter.tensor))
            if parameter.tensor not in self._told and not (own and own.told):
                new.append(edits.Edit(parameter.name, count, numel, any_dtensor([parameter.tensor])))
            self._told[parameter.tensor] = True
            if own is not None:
                own.told = 1
        for columns in self._columns.values():
            columns.seen[edits.TOLD] = torch.tensor(
                [own.told for own in columns.plans], dtype=torch.int64, device="cpu"
            )
        edits.tell(new)
