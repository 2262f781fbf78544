"""One step: look at every parameter, take what others changed, carry it out, between what monitors see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from collage.backends import BACKENDS, Batch, operator, require
from collage.monitor import Monitor
from collage.optimizers import admission, compiled, edits
from collage.optimizers.parameters import Group
from collage.optimizers.plan import Columns, chosen
from collage.optimizers.remembering import Remembering
from collage.saying import warn_once
from collage.sharding import local_gradients


class Stepping(Remembering):
    """The step as a whole."""

    monitors: list[Monitor]

    _step_supports_amp_scaling = True  # torch.amp.GradScaler sets grad_scale and found_inf, and calls step()

    def _validate(self, group: Group) -> None:
        """Raise, naming the setting, for one out of range."""
        raise NotImplementedError

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
        """A step, or what is left of one."""
        self._whole()

    def _whole(self) -> None:
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
        if columns.strategy.dtype == torch.float8_e4m3fn:
            self._take_remainders(plan.parameter for plan in columns.plans)
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
