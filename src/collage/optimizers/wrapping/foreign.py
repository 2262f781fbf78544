"""Another optimizer's step as a function: on float32 tensors that it is given, a few at a time, and counted once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from collage.sharding import local

Values = dict[str, Any]  # the states of one parameter, by name
_NUMBERS = (bool, int, float, str, type(None))
_OF_TORCH = ("defaults", "state", "param_groups", "step", "_optimizer_", "_zero_grad_", "_warned_")  # attributes
OWN = ("strategy", "seed", "skip_nonfinite", "capturable")  # ours in a group, unless the optimizer asks for it


class Foreign:
    """An optimizer that is run on a bucket of parameters as if it had no others.

    What a step changes in a group, or in a number that is an attribute, every bucket sees as it was before the step; it
    moves when the step is over.

    Args:
        base: the optimizer. Its own parameters and states stay where they are; it is changed by `settle` alone.
        arguments: what it was made with, beside its parameters; by default its own defaults.
    """

    def __init__(self, base: torch.optim.Optimizer, arguments: Mapping[str, Any] | None = None) -> None:
        self.base = base
        self.name = type(base).__name__
        given = base.defaults if arguments is None else arguments
        self.arguments = given if arguments is not None else {k: v for k, v in given.items() if k in _taken(type(base))}
        self._groups: dict[int, tuple[dict[str, Any], Values]] = {}  # by id: the group, and what moves in it
        self._attributes: Values = {}
        self.makes_states = False  # in its constructor, as Adagrad does
        self.is_trial = False  # what attributes hold is copied too

    @staticmethod
    def of(base: torch.optim.Optimizer, facts: Mapping[str, Any]) -> Foreign:
        """As it was, out of what `facts` said of it."""
        vars(base).update(facts["attributes"])
        found = Foreign(base, facts["arguments"])
        found.makes_states = facts["makes_states"]
        return found

    def facts(self) -> Values:
        """What a pickle has of it: torch's own leaves out all attributes."""
        return {"arguments": self.arguments, "makes_states": self.makes_states, "attributes": self._own()}

    def _own(self) -> Values:
        """The attributes that its author gave it."""
        return {k: v for k, v in vars(self.base).items() if not k.startswith(_OF_TORCH)}

    def require_apart(self) -> None:
        """Raise TypeError where it keeps parameters, or another optimizer, beside its groups: a twin would step them.

        (Sharpness-aware and look-ahead ones do, and LBFGS.)
        """
        params = {id(p) for group in self.base.param_groups for p in group["params"]}
        for name, value in self._own().items():
            if isinstance(value, torch.optim.Optimizer):
                raise TypeError(f"its attribute {name!r} is an optimizer; wrap that one")
            if any(id(x) in params for x in (value if isinstance(value, list | tuple) else [value])):
                raise TypeError(f"its attribute {name!r} has parameters beside those of its groups")

    def has(self, method: str) -> bool:
        """Whether it has a method, beside those of every optimizer."""
        return callable(getattr(type(self.base), method, None))

    def look(self) -> None:
        """Find out whether the states that are there come from the constructor."""
        param = next((p for group in self.base.param_groups for p in group["params"] if self.base.state.get(p)), None)
        if param is not None:
            group = next(g for g in self.base.param_groups if any(p is param for p in g["params"]))
            try:
                one = torch.zeros((1,) * param.dim(), dtype=torch.float32, device=local(param).device)
                (made,) = self.born(group, [nn.Parameter(one)])
            except Exception:  # its arguments are not known; then what is there is all that is known
                return
            self.makes_states = bool(made)

    def has_stepped(self, state: Mapping[str, Any]) -> bool:
        """Whether a state is more than what the constructor makes."""
        return not self.makes_states or ("step" in state and float(state["step"]) > 0)

    def born(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> list[Values]:
        """The states that the constructor makes of these parameters."""
        made = self.itself(group, params)
        return [dict(made.state.get(param, {})) for param in params]

    def itself(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> torch.optim.Optimizer:
        """A new one of its kind, which has these parameters. Raises what its constructor does."""
        made = type(self.base)([{**self._settings(group), "params": list(params)}], **self.arguments)
        vars(made).update((k, v) for k, v in self._own().items() if isinstance(v, _NUMBERS))
        return made

    def run(
        self,
        group: dict[str, Any],
        params: Sequence[nn.Parameter],  # float32; changed in place
        states: Sequence[Values | None],  # of each; None: it has none yet
        method: str = "step",
        noted: bool = True,  # False: nothing that changes in the group is to be kept
    ) -> list[Values]:
        """Run a method of the optimizer on these parameters, from the gradients they have. Returns their new states.

        Raises RuntimeError where the optimizer's group, after it, depends on which parameters it was given.
        """
        if self.makes_states and not all(states):
            states = [own or new for own, new in zip(states, self.born(group, params), strict=True)]
        twin = self._twin(group, params, states)
        held = [local(param.detach()) for param in params]
        unhooked(type(twin), method)(twin)
        for param, numbers in zip(params, held, strict=True):
            if local(param.detach()).data_ptr() != numbers.data_ptr():  # it has other memory now: p.data = ...
                numbers.copy_(local(param.detach()))
        if noted:
            self._note(group, twin)
        return [twin.state.get(param, {}) for param in params]

    def moved(self, group: Mapping[str, Any]) -> Values:
        """What the step under way has changed in a group."""
        return self._groups[id(group)][1] if id(group) in self._groups else {}

    def settle(self, groups: Sequence[dict[str, Any]] = ()) -> None:
        """The step is over: what it changed is so from now on, and in groups without a gradient what it changes there.

        groups: all that the optimizer has, after a step.
        """
        for group in groups if self._groups else ():
            if id(group) not in self._groups:
                self.run(group, [nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))], [{}])
        for group, moved in self._groups.values():
            group.update(moved)
        vars(self.base).update(self._attributes)
        self._groups, self._attributes = {}, {}

    def forget(self) -> None:
        """The step was not made, or only tried."""
        self._groups, self._attributes = {}, {}

    def _settings(self, group: Mapping[str, Any]) -> Values:
        """A group's, as the optimizer has them; what a step might write to is copied."""
        ours = {"params", "param_names", *OWN} - self.base.defaults.keys()
        return {k: copied(v) for k, v in group.items() if k not in ours}

    def _twin(self, group: Mapping[str, Any], params: Sequence[Tensor], states: Sequence[Values | None]) -> Any:
        """The optimizer with these parameters alone, and no hooks: those are of the step as a whole."""
        twin: Any = object.__new__(type(self.base))
        vars(twin).update(vars(self.base))
        if self.is_trial:
            vars(twin).update((k, copied(v)) for k, v in self._own().items() if isinstance(v, list | dict | set))
        twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = {}, {}
        twin.param_groups = [{**self._settings(group), "params": list(params)}]
        twin.state = defaultdict(dict, {p: own for p, own in zip(params, states, strict=True) if own})
        return twin

    def _note(self, group: dict[str, Any], twin: Any) -> None:
        (after,) = twin.param_groups
        moved = {k: v for k, v in after.items() if k != "params" and (k not in group or not same(v, group[k]))}
        known = self._groups.setdefault(id(group), (group, moved))[1]
        if moved.keys() != known.keys() or not all(same(moved[k], known[k]) for k in moved):
            differing = sorted(k for k in moved.keys() | known.keys() if not same(moved.get(k), known.get(k)))
            raise RuntimeError(
                f"{needs_all(self.name, differing)}. Some parameters have made this step; go on from a saved state"
            )
        own = vars(self.base)
        numbers = {k: v for k, v in vars(twin).items() if isinstance(v, _NUMBERS)}
        self._attributes |= {k: v for k, v in numbers.items() if k not in own or own[k] != v}


def needs_all(name: str, settings: Sequence[str] = ()) -> str:
    """What to say of an optimizer whose update of one parameter depends on the others."""
    because = f" (of its group {', '.join(map(repr, settings))} depend on them)" if settings else ""
    return (
        f"wrap: {name} needs all of its parameters at once{because}, or draws random numbers, and a step gives it a "
        "bucket at a time; use one that updates each by itself, such as collage.AdamW, or leave it on float32 weights"
    )


def copied(value: Any) -> Any:
    """A copy of what may be written to."""
    if isinstance(value, Tensor):
        return value.clone()
    return value if isinstance(value, _NUMBERS) else deepcopy(value)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b) or (a != a and b != b)


def given_by_name(kind: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Values:
    """What a class is given beside its parameters."""
    names = list(signature(kind).parameters)
    return {**dict(zip(names[1:], args[1:], strict=False)), **{k: v for k, v in kwargs.items() if k != names[0]}}


def _taken(kind: type) -> set[str]:
    """The names of a constructor's arguments."""
    return set(signature(kind).parameters)


def unhooked(kind: type, method: str) -> Any:
    """A method, without torch's wrapper of `step`, which calls the hooks of all optimizers."""
    found = getattr(kind, method)
    return found.__wrapped__ if getattr(found, "hooked", False) else found
