"""What was looked at of an optimizer's parameters, kept from one step to the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from collage.fp8.owning import remainder_of
from collage.optimizers import admission, compiled, edits, planes
from collage.optimizers.memory import accept
from collage.optimizers.parameters import Group, Named, Parameter
from collage.optimizers.plan import WIDE, Columns, Plan, check, renewed, started, strategies_for
from collage.rules import Rule
from collage.sharding import any_dtensor
from collage.strategies import Strategy


class Remembering(compiled.Traced):
    """Parameters as columns that step together: each looked at once, and good while no tensor is exchanged or moved."""

    _in_float32: int | None = None  # how many parameters were, when they were last looked at

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, in order, with its name (or position) and group."""
        raise NotImplementedError

    def strategy_of(self, parameter: Parameter) -> Strategy:
        """The strategy that a parameter is updated under."""
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

    def _drop_the_gone(self) -> None:
        """Keep nothing of groups that were taken away."""
        present = set(map(id, self.param_groups))
        if present.issuperset(self._named) and present.issuperset(at[0] for at in self._columns):
            return
        self._named = {key: found for key, found in self._named.items() if key in present}
        self._columns = {at: columns for at, columns in self._columns.items() if at[0] in present}
        params = {id(param) for group in self.param_groups for param in group["params"]}
        self._plans = {key: plan for key, plan in self._plans.items() if key in params}

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

    def _take_remainders(self, parameters: Iterable[Parameter]) -> None:
        """Have weights that modules have loaded go on with what e4m3 cut off of them; the next step looks at these."""
        for parameter in parameters:
            param = parameter.tensor
            if remainder_of(param) is None or not self.state.get(param):
                continue
            if planes.take_remainder(self.strategy_of(parameter), param, self.state[param]):
                for columns in self._columns.values():
                    here = [k for k, own in enumerate(columns.params) if own is param]
                    columns.seen[edits.VERSION, here] = edits.UNSEEN

    def _written(self, params: Sequence[Tensor]) -> None:
        """These weights were written with all that is kept beside them, as by a step: nobody else has changed them."""
        written = set(map(id, params))
        for columns in self._columns.values():
            now = edits.versions_now(columns.thetas, columns.sharded)
            for k, param in enumerate(columns.params):
                if id(param) in written:
                    columns.seen[edits.VERSION, k] = now[k]
