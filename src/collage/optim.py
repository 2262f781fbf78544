"""The torch.optim.Optimizer shell: groups, planes, step, state_dict. The numerics are below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from collage import admission, backends, calls, edits, loading, state
from collage.backends import operator
from collage.calls import Call, Roster, Seen
from collage.monitor import Monitor
from collage.rng import signed
from collage.rules import Rule
from collage.saying import warn_once
from collage.settings import without_foreign
from collage.shadow import Item
from collage.sharding import local_gradients, placed
from collage.state import Entry, Group
from collage.strategies import Strategy


class PrecisionOptimizer(torch.optim.Optimizer):
    """What all optimizers here share. A subclass names its rule and its hyper-parameters."""

    rule: ClassVar[Rule]
    _in_float32: int | None = None  # how many parameters were, when they were last looked at

    def __init__(self, params: Any, defaults: dict[str, Any], backend: str, cast: bool) -> None:
        self.backend = backend
        self._cast = False
        self.monitors: list[Monitor] = []
        self._forget()
        backends.require(backend)
        super().__init__(params, defaults)
        if cast:
            admission.cast(self.rule, admission.to_be_cast(list(self.entries())), self.state)
            self._cast = True
        self._count_float32(admission.require_low_precision(list(self.entries()), before=None))
        self._warn_of_fallback()

    def _count_float32(self, count: int) -> None:
        admission.tell_of_float32(count, self._in_float32)
        self._in_float32 = count

    def _warn_of_fallback(self) -> None:
        if self.backend == "auto":
            admission.warn_of_fallback({entry.param.device for entry in self.entries()})

    def _forget(self) -> None:
        """Check every tensor anew at the next step."""
        self._fresh: list[Tensor] = []  # whose states the step under way has made
        self._rosters: dict[tuple[int, bool], Roster] = {}
        self._seen: MutableMapping[Tensor, Seen] = WeakIdKeyDictionary()

    def entries(self) -> Iterator[Entry]:
        """Every parameter, in order, with its name (or position) and group."""
        first = 0
        for index, group in enumerate(self.param_groups):
            yield from state.named(index, first, group)
            first += len(group["params"])

    def _entries_of(self, group: Group) -> Iterator[Entry]:
        index = next(i for i, other in enumerate(self.param_groups) if other is group)
        return state.named(index, sum(len(earlier["params"]) for earlier in self.param_groups[:index]), group)

    @staticmethod
    def strategy_of(entry: Entry) -> Strategy:
        """The group's strategy; float32 parameters are updated in float32. Raises TypeError for any other dtype."""
        return admission.strategy_of(entry)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may have a strategy of its own. Raises before anything is added."""
        for key in {"backend", "cast"} & param_group.keys():
            raise ValueError(f"{key}: one for the whole optimizer; give it to the constructor, not to a group")
        super().add_param_group(without_foreign(param_group, type(self).__name__))
        group = self.param_groups[-1]
        try:
            group["strategy"] = str(Strategy.parse(group["strategy"]))
            self._validate(group)
            for entry in self._entries_of(group):
                if entry.param.requires_grad:  # of a frozen one nothing is asked until it has a gradient
                    self.strategy_of(entry)
            state.require_unique(entry.name for entry in self.entries())
            wide = admission.to_be_cast(list(self.entries())) if self._cast else []
            wide = [entry for entry in wide if entry.group is group]
        except BaseException:
            self.param_groups.pop()
            raise
        admission.cast(self.rule, wide, self.state)

    def _validate(self, group: Group) -> None:
        """Raise, naming the setting, for one out of range; numbers of other kinds (NumPy's) become Python's."""
        seed = group["seed"]
        if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= int(seed) < 2**64:
            raise ValueError(f"seed: needs an integer in [0, 2**64), got {seed!r}")
        group["seed"] = int(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError, ValueError: a gradient or a parameter that cannot be updated, before any is.
        """
        if not torch.compiler.is_compiling():
            calls.require_capturable(self.param_groups)
            edits.require_own((param for group in self.param_groups for param in group["params"]), "step()")
            admission.warn_of_shared_bits(self, self.param_groups, first=not self._rosters)
            present = set(map(id, self.param_groups))
            for gone in [key for key in self._rosters if key[0] not in present]:
                del self._rosters[gone]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo: list[Call] = []
        first = 0
        for group in self.param_groups:
            if not torch.compiler.is_compiling():
                self._validate(group)  # it may have been changed
            for in_float32 in (False, True):
                planes: list[Tensor] = []
                grads: list[Tensor] = []
                steps: list[Tensor] = []
                keys: list[int] = []
                regions: list[int] = []
                seen: list[Tensor] = []
                names: list[str] = []
                strategy = self._init_group(
                    group, first, in_float32, torch.compiler.is_compiling(), planes, grads, steps, keys, regions, seen,
                    names,
                )  # fmt: skip
                if len(grads) > 0:
                    todo.append(Call(group, in_float32, strategy, planes, grads, steps, keys, regions, seen, names))
            first += len(group["params"])
        if len(todo) == 0 and not torch.compiler.is_compiling():
            warn_once("step(): no parameter has a gradient, so nothing was updated; call backward() first")
        if len(self.monitors) > 0:
            self._step_measured(todo)
        else:
            for call in todo:
                self._adopt(call)
                self._step(call, torch.empty(0, 5, dtype=torch.float64, device="cpu"))
        return loss

    def _adopt(self, call: Call, every: bool = False) -> dict[int, int]:
        """Take the weights that others have changed as they are now."""
        if torch.compiler.is_compiling():
            torch.ops.collage.adopt_(call.planes, call.seen[0], call.names, call.strategy, self.backend)
            return {}
        return edits.adopt(call.planes, call.seen[0], call.names, call.strategy, self.backend, every)

    def _step(self, call: Call, sums: Tensor) -> None:
        lr = call.group["lr"]
        # The dispatcher converts lists of thousands of tensors, and only a compiler has to see an operator.
        step = torch.ops.collage.step_ if torch.compiler.is_compiling() else operator.step_
        step(
            call.planes, call.grads, call.steps, sums,
            lr if isinstance(lr, Tensor) else calls.numbers([lr])[0], calls.numbers(self._hyper(call.group)),
            self.rule.name, call.strategy, self.backend, call.keys, call.regions, signed(call.group["seed"]),
            call.group["maximize"], call.group["capturable"],
        )  # fmt: skip
        edits.advance(call.seen[0])

    def _step_measured(self, todo: list[Call]) -> None:
        """The same step, between what the monitors look at before it and after it."""
        due = any(monitor.due for monitor in self.monitors)
        sums = [torch.zeros(len(call.grads) if due else 0, 5, dtype=torch.float64, device="cpu") for call in todo]
        items: list[Item] = []
        changed: dict[str, int] = {}
        for call, rows in zip(todo, sums, strict=True):
            roster = self._rosters[id(call.group), call.in_float32]
            items += calls.items(call, roster, list(map(float, self._hyper(call.group))), list(rows))
            changed |= {call.names[k]: count for k, count in self._adopt(call, every=due).items()}
        for monitor in self.monitors:
            monitor.before(items, changed)
        for call, rows in zip(todo, sums, strict=True):
            self._step(call, rows)
        for monitor in self.monitors:
            monitor.after(items)

    def _init_group(
        self,
        group: Group,
        first: int,
        in_float32: bool,
        compiling: bool,
        planes: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        keys: list[int],
        regions: list[int],
        seen: list[Tensor],
        names: list[str],
    ) -> str:
        """Append what the operator needs of a group's parameters. Raises before anything is changed.

        torch.compile knows this method's name: it runs it where it would trace another, and guards what it returned.
        """
        if not first and not in_float32:  # the first call of a step
            self._fresh = []
        strategy = calls.strategy_of(group, in_float32)
        params = calls.chosen(group, in_float32) if strategy else []
        if strategy is None or not params:
            return ""
        own_grads = local_gradients(params, [param.grad for param in params])
        gathered, fresh = calls.gather(self.rule, strategy, params, self.state, group["capturable"])
        self._fresh += fresh
        roster = self._rosters.get((id(group), in_float32))
        if not (
            roster
            and roster.holds(strategy, first, params, gathered)
            and state.accept(roster.thetas, own_grads, strategy.dtype)
        ):
            roster = self._renew(group, first, in_float32, strategy, gathered, own_grads, roster)
        if compiling:
            calls.require_compilable(gathered, len(self.monitors) > 0)
            edits.traced(roster.thetas, roster.seen)
        planes += roster.planes
        grads += own_grads
        steps += roster.steps
        keys += roster.keys
        regions += roster.regions
        seen.append(roster.seen)
        names += roster.names
        return str(strategy)

    def _renew(
        self,
        group: Group,
        first: int,
        in_float32: bool,
        strategy: Strategy,
        gathered: list[Any],
        grads: list[Tensor],
        before: Roster | None,
    ) -> Roster:
        """Look at a group's parameters anew. Raises what is wrong with them, and then leaves no state behind."""
        params = gathered[:: len(gathered) // len(grads)]
        try:
            wide = admission.require_low_precision(list(self.entries()), self._in_float32) if in_float32 else 0
            entries = self._check(group, strategy, params, grads)
            self._seen.update(before.known() if before else {})
            roster = self._rosters[id(group), in_float32] = Roster(strategy, first, gathered, entries, self._seen)
        except BaseException:
            for param in self._fresh:
                self.state.pop(param, None)
            raise
        self._count_float32(wide if in_float32 else self._in_float32 or 0)
        lost = roster.stayed & set(map(id, self._fresh))
        admission.warn_of_cleared(strategy, [entry.name for entry in entries if id(entry.param) in lost])
        return roster

    def _check(self, group: Group, strategy: Strategy, params: list[Tensor], grads: list[Tensor]) -> list[Entry]:
        """Raise what is wrong with a parameter, its gradient or its state, before anything is changed."""
        stepping = set(map(id, params))
        entries = [entry for entry in self._entries_of(group) if id(entry.param) in stepping]
        for entry, grad in zip(entries, grads, strict=True):
            self.strategy_of(entry)
            calls.check(self.rule, strategy, entry, grad, self.state[entry.param])
        return entries

    def _hyper(self, group: Group) -> list[float | Tensor]:
        """The rule's hyper-parameters but lr, in the order that its `fold` takes them."""
        raise NotImplementedError

    def planes(self, entry: Entry, strategy: Strategy | None = None) -> tuple[Any, ...]:
        """The local planes of every slot of one parameter, theta first; created at first use."""
        strategy = strategy or self.strategy_of(entry)
        if not self.state[entry.param]:
            state.initialise(self.rule, strategy, entry.param, self.state[entry.param], entry.group["capturable"])
        for key, plane in self.state[entry.param].items():
            if key != "step":
                state.require_shape(key, plane, entry.param, entry.name)
        return state.slots(self.rule, strategy, entry.param, self.state[entry.param])

    def tell(self, found: Iterable[tuple[Entry, int, int]]) -> None:
        """Say of which parameters others changed (so many elements of so many); of each once, steps included."""
        rows = {e.param: row for r in self._rosters.values() for e, row in zip(r.entries, r.seen.T, strict=True)}
        new = []
        for entry, count, numel in found:
            last, row = self._seen.get(entry.param, Seen()), rows.get(entry.param)
            if not (last.told if row is None else row[edits.TOLD]):
                new.append((entry.name, count, numel))
            if row is not None:
                row[edits.TOLD] = 1
            self._seen[entry.param] = last._replace(told=1)
        edits.tell(new)

    @torch.no_grad()
    def resync(self) -> None:
        """Take every weight as it is now, and drop all its other components (lo, master, compensation).

        Nobody has to call it after an edit: a step, a monitor and an export see weights that others changed, and derive
        anew what no longer fits. It is for writes that no version counter sees (``p.data.mul_()``, a replayed CUDA
        graph), and for dropping every low component on purpose. A monitor counts them as ``edited``.
        """
        edits.require_own((entry.param for entry in self.entries()), "resync()")
        entries = [entry for entry in self.entries() if self.state.get(entry.param) and self.planes(entry)]
        changed = {
            entry.name: state.resync(self.rule, self.strategy_of(entry), entry.param, self.state[entry.param])
            for entry in entries
        }
        for monitor in self.monitors:
            monitor.edited(entries, changed)

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Start every moment and step counter anew (warm restarts, ReLoRA); the weights keep all their components.

        ``opt.state.clear()`` would take the low components of the weights with it.
        """
        for entry in self.entries():
            for key, value in self.state.get(entry.param, {}).items():
                if not key.startswith("param"):
                    value.zero_()
        for monitor in self.monitors:
            monitor.meet_anew()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every plane byte for byte. Also takes the state of a torch.optim optimizer with the same moments.

        Raises:
            ValueError: a state of another strategy, or of other names or shapes. Nothing is changed then.

        Parameters are matched by name where both sides have names, else by position. The model may be loaded before or
        after: the next step takes weights that do not belong to the state as they are, and says so.
        """
        edits.require_own((entry.param for entry in self.entries()), "load_state_dict()")
        adopted: dict[str, Any] = {}
        # A state of torch's knows no components: those of parameters that have made no step, here or there, stay.
        unused: dict[Tensor, Any] = {}

        def adopt(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            entries = list(self.entries())
            if loading.is_foreign(saved):
                unused.update((p, values) for p, values in self.state.items() if values and int(values["step"]) == 0)
            adopted.update(loading.adopt(self.rule, self.param_groups, entries, saved, self.strategy_of, self.state))
            return adopted

        hook = self.register_load_state_dict_pre_hook(adopt)  # runs last: what it returns is what is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for entry, saved_id, _ in loading.paired(self.entries(), adopted):
            if saved_id in adopted["state"]:  # torch has cast the planes to the parameter's dtype: take the originals
                device, own = entry.param.device, entry.group["capturable"]
                self.state[entry.param] = {
                    key: placed(value.detach().to(device if own or key != "step" else "cpu", copy=True), entry.param)
                    for key, value in adopted["state"][saved_id].items()
                }
            elif entry.param in unused:
                self.state[entry.param] = unused[entry.param]
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
