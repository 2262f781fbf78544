"""A step that comes in parts: a few parameters at a time, as their gradients arrive in backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collage.optimizers import compiled, edits
from collage.optimizers.stepping import Stepping


class InParts(Stepping):
    """What gradient release needs of an optimizer. The bits are those of a step as a whole."""

    def _forget(self) -> None:
        super()._forget()
        self._group_of: dict[int, int] = {}  # by id of the parameter, while a step is under way
        self._stepped: set[int] = set()  # ids of those that have made it

    @torch.no_grad()
    def step_now(self, params: Sequence[Tensor]) -> None:
        """Update these parameters now, from the gradients they have: a part of the step that `step` finishes.

        Args:
            params: of this optimizer, each with a gradient.

        Raises:
            RuntimeError: one of them has stepped since the last `step`.
            TypeError, ValueError: what `step` raises, before any of them is updated.
        """
        if not self._group_of:
            compiled.require_capturable(self.param_groups)
            self._prepare()
            self._group_of = {id(p): k for k, group in enumerate(self.param_groups) for p in group["params"]}
        edits.require_own(params, "a step in backward")
        self.require_first(params)
        of_groups: dict[int, list[Tensor]] = {}
        for param in params:
            of_groups.setdefault(self._group_of[id(param)], []).append(param)
        super()._make(self._looked(of_groups))
        self._stepped.update(map(id, params))

    @property
    def is_under_way(self) -> bool:
        """Whether parameters have stepped since the last `step`."""
        return bool(self._stepped)

    def require_first(self, params: Sequence[Tensor], again: bool = False) -> None:
        """Raise RuntimeError, naming it, for a parameter that has stepped since the last `step`, or is to `again`."""
        found = set(map(id, params)) & (set(map(id, params)) if again else self._stepped)
        if found:
            name = next(parameter.name for parameter in self.parameters() if id(parameter.tensor) in found)
            raise RuntimeError(
                f"param '{name}': it has a gradient, and gets another before opt.step(). A second backward, or a "
                "checkpointed part that uses it twice? Inside `with released.paused():` gradients stay and accumulate. "
                "Is it in DistributedDataParallel? Give that to release_gradients"
            )

    def _advance(self) -> None:
        """The rest of a step under way, or a whole one."""
        if self.in_backward is None and not self._stepped:
            self._whole()
            return
        if self.in_backward is not None:
            if getattr(self, "grad_scale", None) is not None:
                raise RuntimeError(
                    "GradScaler: released gradients are used in backward, before it can unscale them; train bfloat16 "
                    "weights without one, or without release_gradients"
                )
            self.in_backward.finish()
        else:
            rest = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            self.step_now(rest)
        self._group_of, self._stepped = {}, set()
