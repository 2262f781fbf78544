"""What a rank has measured of its parts of parameters, until it is added up over the ranks that hold the others."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from collage.collectives import Spread, spreads_of, totals
from collage.monitor.books import Measured
from collage.monitor.quality import Tally
from collage.monitor.scaling import NONE
from collage.monitor.shadow import Beside, Placed, Sampled

Of = TypeVar("Of")  # what it is the share of: a parameter, or the name of a strategy beside the run


class Share(Generic[Of]):
    """This rank's part of the sums of one parameter, or of a strategy beside the run.

    EDQ divides by a norm, so it does not add up over ranks: dot and norm2 of each step are kept. All else does.
    """

    def __init__(self, of: Of) -> None:
        self.of = of
        self.steps, self._pairs = array("q"), array("d")
        self._tally = Tally()
        self._told = 0  # steps

    @property
    def edited(self) -> int:
        return self._tally.edited

    def add_edited(self, count: int) -> None:
        self._tally.edited += count

    def add(self, sums: Sequence[float], step: int, sample: Sampled) -> None:
        """Add what is SUMMED of a step, and its sample, or those of a further part of it."""
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
            self._pairs.extend((0.0, 0.0))
        self._pairs[-2] += sums[0]
        self._pairs[-1] += sums[2]
        self._tally.add(sums, step, sample)

    def numbers(self) -> Tensor:
        """All that adds up, float64."""
        t = self._tally
        sums = (t.visible, t.nonzero, t.lost, t.edited, *t.scaled, *astuple(t.sampled))
        return torch.tensor([*self._pairs, *sums], dtype=torch.float64, device="cpu")

    def take(self, numbers: Tensor) -> None:
        """From now on, the share of the whole: the sum of what `numbers` gave on every rank."""
        t, values = self._tally, numbers.tolist()
        self._pairs = array("d", values[: len(self._pairs)])
        t.visible, *others = values[len(self._pairs) :]
        counts = 3 + len(NONE)
        t.nonzero, t.lost, t.edited, *t.scaled = map(int, others[:counts])
        t.sampled = Sampled(*others[counts:])

    def told(self, step: int) -> tuple[list[float], Sampled] | None:
        """(SUMMED, sample) of the next step, if it is this one. What has no steps of its own comes with the last."""
        if self._told == len(self.steps) or self.steps[self._told] != step:
            return None
        dot, norm2 = self._pairs[2 * self._told : 2 * self._told + 2]
        self._told += 1
        if self._told < len(self.steps):
            return [dot, 0.0, norm2, 0, 0, *NONE], Sampled()
        t = self._tally
        return [dot, t.visible, norm2, t.nonzero, t.lost, *t.scaled], t.sampled


class Shares:
    """Those of all parameters, and of the strategies beside. The same keys on all ranks that share a parameter."""

    def __init__(self) -> None:
        self._parameters: dict[tuple[str, Spread | None], Share[Placed]] = {}
        self._beside: dict[tuple[str, Spread | None], Share[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._parameters)

    def of(self, parameter: Placed, spread: Spread | None) -> Share[Placed]:
        """That of a parameter."""
        key = parameter.name, spread
        return self._parameters.get(key) or self._parameters.setdefault(key, Share(parameter))

    def add(self, measured: Measured, beside: Beside) -> None:
        """Add this rank's part of a step."""
        spreads = spreads_of([parameter.tensor for parameter, _ in measured.rows])
        for (parameter, sums), spread in zip(measured.rows, spreads, strict=True):
            sample = measured.sampled.get(parameter.name, Sampled())
            self.of(parameter, spread).add(sums, measured.step, sample)
        for (name, spread), (sums, sample) in beside.items():
            self._beside.setdefault((name, spread), Share(name)).add(sums, measured.step, sample)

    def gather(self) -> None:
        """Add them up over ranks, at once for all parameters that lie alike. A collective, if any is sharded."""
        parameters, beside = self._in_order(), sorted(self._beside.items(), key=lambda own: own[0][0])
        shares: list[Share[Any]] = [*(share for _, share in parameters), *(share for _, share in beside)]
        spreads = [spread for (_, spread), _ in (*parameters, *beside)]
        for share, numbers in zip(shares, totals([share.numbers() for share in shares], spreads), strict=True):
            share.take(numbers)

    def _in_order(self) -> list[tuple[tuple[str, Spread | None], Share[Placed]]]:
        return sorted(self._parameters.items(), key=lambda own: own[1].of.position)

    def edited(self) -> Iterator[tuple[Placed, int]]:
        """How many elements of each parameter others have changed."""
        return ((share.of, share.edited) for _, share in self._in_order())

    def measured(self) -> Iterator[Measured]:
        """Step after step."""
        parameters, beside = [share for _, share in self._in_order()], list(self._beside.values())
        for step in _steps(parameters):
            told = [(share.of, *own) for share in parameters if (own := share.told(step))]
            rows = [(parameter, sums) for parameter, sums, _ in told]
            sampled = {parameter.name: sample for parameter, _, sample in told}
            yield Measured(step, rows, sampled, [(one.of, *own) for one in beside if (own := one.told(step))])


def _steps(shares: Iterable[Share[Placed]]) -> list[int]:
    return sorted({step for share in shares for step in share.steps})
