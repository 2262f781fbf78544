"""The update in backward: each gradient is used as it arrives and freed, so that all of them never exist at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import ref

import torch
from torch import Tensor, nn

from collage.collectives import summed
from collage.gradients.accumulate import is_summed
from collage.gradients.clip import RELEASED, checked, coefficient, scale_, squares_of, total
from collage.gradients.replicas import replicated
from collage.gradients.together import Together, on_arrival
from collage.optimizers.base import PrecisionOptimizer
from collage.owners import owners
from collage.randomness import Randomness
from collage.unwrapping import unwrapped

OUTSIDE, MEASURING, UPDATING, SKIPPED = range(4)  # where an exact clip is between two steps
NORM = "released_norm"  # key of the first group: the norm by which the next step is clipped


class Release:
    """Uses a model's gradients as they arrive. Made by `release_gradients`."""

    one_pass = True  # parameters are updated before all gradients are known

    def __init__(self, model: nn.Module, optimizer: PrecisionOptimizer) -> None:
        self._optimizer = optimizer
        self._together, self._paused = Together(self._use), False
        self._require_settings()
        held = replicated(model)  # DDP has all gradients in its buckets until the last one has arrived
        own = [p for p in owners(model, optimizer) if p.requires_grad and p not in held]
        self._handles = [on_arrival(param, self._arrived) for param in own]
        RELEASED.update((param, ref(self)) for param in own)
        optimizer.in_backward = self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, gradients stay and accumulate: for all micro-batches of a step but the last."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def passes(self) -> Iterator[int]:
        """What to loop over with forward and backward inside: one pass, or two where clipping is exact."""
        yield 0

    def finish(self) -> None:
        """Called by the optimizer's `step`: use the gradients that are there."""
        there = self._there()
        if there:
            self._use(there)

    def remove(self) -> None:
        """Leave gradients to `step` again."""
        for handle in self._handles:
            handle.remove()
        for param in [param for param, release in RELEASED.items() if release() is self]:
            del RELEASED[param]
        if self._optimizer.in_backward is self:
            self._optimizer.in_backward = None

    @property
    def has_begun(self) -> bool:
        """Whether gradients of this step have been used, or are about to be."""
        return bool(self._together) or self._optimizer.is_under_way

    def _require_settings(self) -> None:
        if self.one_pass and self._optimizer.skips_nonfinite:
            raise ValueError(
                "skip_nonfinite: in one pass a parameter is updated before the gradients of others are known; say "
                "clip='exact' (two passes; max_norm may stay None), or skip_nonfinite=False"
            )

    def _arrived(self, param: Tensor) -> None:
        """The hook: a gradient is complete."""
        if self._paused or param.grad is None or is_summed(param):
            return
        self._optimizer.require_first([param], again=param in self._together)
        self._together.add(param)

    def _there(self) -> list[Tensor]:
        """All parameters that have a gradient, those that wait among them."""
        self._together.drop()
        return [p for p in self._params() if p.grad is not None]

    def _params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _use(self, params: Sequence[Tensor]) -> None:
        """Step, then free."""
        self._require_settings()
        self._optimizer.step_now(params)
        _free(params)


class _Clipping(Release):
    """With the norm of all gradients, added up as they come."""

    def __init__(self, model: nn.Module, optimizer: PrecisionOptimizer, max_norm: float) -> None:
        super().__init__(model, optimizer)
        self.max_norm = max_norm
        self.norm: Tensor | None = None  # of the last step's gradients, 0-d float64, before clipping
        self._squares: dict[int, Tensor] = {}  # by id of the parameter: of this rank's part of its gradient

    def _measure(self, params: Sequence[Tensor]) -> None:
        self._squares |= zip(map(id, params), squares_of(params).unbind(), strict=True)

    def _scale(self, params: Sequence[Tensor], norm: Tensor) -> None:
        if not math.isinf(self.max_norm):
            scale_([p.grad for p in params], coefficient(norm, self.max_norm))

    def _measured(self) -> tuple[list[Tensor], Tensor]:
        """All that was measured since the last call: parameters, and [parameters] squares of whole gradients.

        A collective where parameters are sharded.
        """
        own = [p for p in self._params() if id(p) in self._squares]
        squares = (
            torch.stack([self._squares[id(p)] for p in own])
            if own
            else torch.zeros(0, dtype=torch.float64, device="cpu")
        )
        self._squares = {}
        return own, summed(squares, own)


class ByPrevious(_Clipping):
    """Clips by the norm of the step before; the first step not at all. The norm is in the optimizer's first group."""

    def __init__(self, model: nn.Module, optimizer: PrecisionOptimizer, max_norm: float) -> None:
        super().__init__(model, optimizer, max_norm)
        optimizer.param_groups[0].setdefault(NORM, torch.zeros((), dtype=torch.float64, device="cpu"))

    def remove(self) -> None:
        super().remove()
        self._optimizer.param_groups[0].pop(NORM, None)

    def finish(self) -> None:
        super().finish()
        if self._squares:
            self.norm, group = total(self._measured()[1]), self._optimizer.param_groups[0]
            group[NORM] = torch.where(self.norm.isfinite(), self.norm, group[NORM].to(self.norm.device))

    def _use(self, params: Sequence[Tensor]) -> None:
        self._measure(params)
        self._scale(params, self._optimizer.param_groups[0][NORM].to(params[0].device))
        super()._use(params)


class Exactly(_Clipping):
    """Clips by the norm of the step's own gradients, which a first pass measures and a second computes again."""

    one_pass = False
    _pass = OUTSIDE

    def passes(self) -> Iterator[int]:
        random = Randomness(self._params())
        self._squares, self._pass = {}, MEASURING
        self._together.drop()
        yield 0
        self._use(self._there())
        if self._decide() == UPDATING:
            random.restore()
            yield 1

    def finish(self) -> None:
        if self._pass == MEASURING:
            raise RuntimeError("released.passes(): opt.step() came after one pass of two; loop over it to its end")
        if self._pass == OUTSIDE:  # no gradient was used up: they were kept by DDP, by `paused`, or set by hand
            self._measure(self._there())
            self._decide()
        if self._pass == UPDATING:
            super().finish()
        _free(self._there())
        self._pass = OUTSIDE

    def _decide(self) -> int:
        """Whether to update, by what was measured: on any rank, where a step is to be skipped as a whole."""
        params, squares = self._measured()
        self.norm = total(squares)
        self._pass = SKIPPED if self._optimizer.skips(params, squares) else UPDATING
        return self._pass

    def _arrived(self, param: Tensor) -> None:
        if self._pass == OUTSIDE and not self._paused:
            raise RuntimeError(
                "release_gradients: clip='exact' needs two passes; forward and backward belong into "
                "`for _ in released.passes():`"
            )
        super()._arrived(param)

    def _use(self, params: Sequence[Tensor]) -> None:
        if self._pass == MEASURING:
            self._measure(params)
            _free(params)
            return
        if self.norm is not None:
            self._scale(params, self.norm)
        super()._use(params)


def _free(params: Sequence[Tensor]) -> None:
    for param in params:
        param.grad = None


def release_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None = None, clip: str = "previous"
) -> Release:
    """Update in backward: each gradient is used as it arrives and freed, so that all of them never exist at once.

    The bits are those of ``opt.step()`` after backward. Everything else stays in the loop: ``opt.step()`` finishes the
    step (and counts it for schedules), ``opt.zero_grad()`` has nothing left to do. Gradients below a megabyte wait for
    one another. A weight must not be used again in the same backward once its gradient is complete, which is so unless
    somebody reads it in a hook; torch raises where an operation needs what was changed.

    Args:
        model: plain, or sharded by fully_shard. In DistributedDataParallel the update comes in ``opt.step()``, because
            its buckets hold all gradients anyway until the last one is averaged.
        optimizer: of this package, which trains it; also as Accelerate, Lightning or Fabric wrapped it.
        max_norm: clip by the norm of all gradients, as `clip_grad_norm_` does, which cannot be known while they arrive.
        clip: "previous": by the norm of the step before (the first step is not clipped); it is saved with the
            optimizer. "exact": by its own, in two passes; forward and backward then belong into
            ``for _ in released.passes():``, which takes twice as long, and skips steps that are not finite where the
            optimizer has ``skip_nonfinite``.

    Returns:
        A Release, with ``paused()`` (a context: gradients stay and accumulate), ``passes()`` and ``remove()``; where it
        clips ``norm``, that of the last step.

    Raises:
        TypeError: an optimizer of somewhere else.
        ValueError: one of another model, an unknown ``clip``, a max_norm below 0, or ``skip_nonfinite`` in one pass.
        RuntimeError: it has been released already.

    >>> import collage
    >>> model = torch.nn.Linear(4, 2).bfloat16()
    >>> opt = collage.AdamW(model.named_parameters())
    >>> released = release_gradients(model, opt)
    >>> model(torch.ones(1, 4).bfloat16()).sum().backward()
    >>> opt.step()
    >>> model.weight.grad is None, int(opt.state[model.weight]["step"])
    (True, 1)
    """
    if isinstance(optimizer, list | tuple):
        raise TypeError("optimizer: needs one; call release_gradients once for each")
    inner = unwrapped(optimizer, PrecisionOptimizer)
    if clip not in ("previous", "exact"):
        raise ValueError(f"clip: unknown {clip!r}; known: previous, exact")
    if max_norm is not None:
        max_norm = checked("max_norm", max_norm)
    if inner.in_backward is not None:
        raise RuntimeError("optimizer: its gradients are released already; opt.in_backward.remove() ends that")
    if clip == "exact":
        return Exactly(model, inner, math.inf if max_norm is None else max_norm)
    return Release(model, inner) if max_norm is None else ByPrevious(model, inner, max_norm)
