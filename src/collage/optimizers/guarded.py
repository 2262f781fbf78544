"""Steps whose gradients are not all finite: skipped as a whole, on all ranks, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

import torch
from torch import Tensor

from collage.backends import Batch
from collage.backends.operator import squares
from collage.collectives import on_any_rank, summed
from collage.optimizers.parameters import Group
from collage.optimizers.parts import InParts
from collage.optimizers.plan import Columns

REFUSED = 2  # what a rank tells the others that raises; 1: NaN or Inf


class Guarded(InParts):
    """What ``skip_nonfinite`` asks of a step."""

    _skipped: Tensor | int = 0
    _answered = False  # whether the step under way has told the other ranks what it found

    @property
    def skips_nonfinite(self) -> bool:
        """Whether any group asks for it."""
        return any(group["skip_nonfinite"] for group in self.param_groups)

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` has skipped since this optimizer was made. Waits for the device."""
        return int(self._skipped)

    def _validate(self, group: Group) -> None:
        if not isinstance(group["skip_nonfinite"], bool):
            raise TypeError(f"skip_nonfinite: needs True or False, got {group['skip_nonfinite']!r}")

    def _prepare(self) -> None:
        super()._prepare()
        if self.skips_nonfinite and self._device().type != "cpu":
            self._count_on_device()
            self._skipped = torch.as_tensor(self._skipped, dtype=torch.int64, device=self._device())

    def _whole(self) -> None:
        self._answered = False
        try:
            super()._whole()
        except Exception:
            if self.skips_nonfinite and not self._answered:
                on_any_rank(torch.full((), REFUSED, dtype=torch.uint8, device=self._device()))  # others wait for this
            raise

    def _make(self, todo: Sequence[tuple[Columns, Batch]]) -> None:
        if not self.skips_nonfinite:
            super()._make(todo)
            return
        looked = [(columns, batch) for columns, batch in todo if columns.group["skip_nonfinite"]]
        broken = [~squares(batch.grads).isfinite() for _, batch in looked]
        self._answered = True
        found = on_any_rank(_any(broken, self._device()))
        if self._looks_in_the_step(found):
            self._skipped += found > 0  # in place: a captured graph counts at every replay
            super()._make([(columns, replace(batch, skip=_either(batch.skip, found))) for columns, batch in todo])
        elif int(found) == REFUSED:
            self._drop_fresh()
            raise RuntimeError("skip_nonfinite: another rank cannot make this step, and says why; nothing is changed")
        elif bool(found):
            self._drop_fresh()
            self.count_skipped([columns.params for columns, _ in looked], broken)
        else:
            super()._make(todo)

    def skips(self, params: Sequence[Tensor], squares: Tensor) -> bool:
        """Whether a step of these gradients is to be skipped; it is counted then. squares: of each as a whole.

        A collective where it is asked for.
        """
        if not self.skips_nonfinite:
            return False
        asked = {id(p) for group in self.param_groups if group["skip_nonfinite"] for p in group["params"]}
        looked = torch.tensor([id(p) in asked for p in params], dtype=torch.bool, device=squares.device)
        broken = looked & ~squares.isfinite()
        if not bool(on_any_rank(broken.any().to(self._device(), torch.uint8))):
            return False
        self.count_skipped([params], [broken])
        return True

    def count_skipped(self, params: Sequence[Sequence[Tensor]], broken: Sequence[Tensor]) -> None:
        """Count a step as skipped, and tell the monitors because of whose gradients.

        A collective where parameters are sharded, since another rank may have seen it.
        """
        self._skipped += 1
        if not self.monitors:
            return
        ids = set[int]()
        for own, flags in zip(params, broken, strict=True):
            ids.update(map(id, compress(own, (summed(flags.double(), own) > 0).tolist())))
        for monitor in self.monitors:
            monitor.skipped([parameter for parameter in self.parameters() if id(parameter.tensor) in ids])

    def _looks_in_the_step(self, found: Tensor) -> bool:
        """Whether the step reads the finding where it is, so that nothing waits for the device."""
        return not found.is_cpu and not self.monitors

    def _device(self) -> torch.device:
        return next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))


def _any(flags: Sequence[Tensor], device: torch.device) -> Tensor:
    """0-d uint8: whether one is set."""
    each = [own.any().to(device, torch.uint8) for own in flags]
    return torch.stack(each).amax() if each else torch.zeros((), dtype=torch.uint8, device=device)


def _either(skip: Tensor | None, found: Tensor) -> Tensor:
    return found if skip is None else torch.maximum(skip.to(found.dtype), found)
