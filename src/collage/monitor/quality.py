"""Effective descent quality: what a report says, and the running sums it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from collage.advised.advice import Advice
from collage.backends.reference import SUMS
from collage.monitor.advising import advice_of
from collage.monitor.scaling import COUNTS, NONE
from collage.monitor.shadow import Sampled

SUMMED = (*SUMS, *COUNTS)  # of each parameter and step


@dataclass(frozen=True, slots=True)
class Quality:
    """How much of the intended update Delta arrived, over the monitored steps. None where undefined.

    Attributes:
        steps: monitored steps.
        edq: the paper's metric, mean over steps of <Delta / |Delta|, arrived>. In units of the weights.
        edq_ratio: <Delta, arrived> / |Delta|**2. 1.0 means that the whole update arrived.
        edq_visible: the same for the component that the forward pass sees.
        lost: share of the non-zero updates that changed no plane.
        nonzero: how many updates were not zero.
        edited: how many weights lost their low components because others changed them, or to `resync`.
        skipped: steps that ``skip_nonfinite`` skipped because of its gradients. They are in no other number.
        v_ratio: mean of the second moment over its shadow's, at the last monitored step.
        m_error: |m - shadow's m| / |shadow's m|, at the last monitored step.
        edq_shadow: as edq_ratio, against the update that undamaged float32 moments would have made.
        scales: of the rows of e4m3 weights, one for each row and monitored step.
        rescaled: share of them that the step moved: how often a step moves a row's scale.
        saturated: how many weights the steps left larger than their row can show, whose scale is the largest there is.
    """

    steps: int
    edq: float | None
    edq_ratio: float | None
    edq_visible: float | None
    lost: float | None
    nonzero: int
    edited: int = 0
    skipped: int = 0
    v_ratio: float | None = None
    m_error: float | None = None
    edq_shadow: float | None = None
    scales: int = 0
    rescaled: float | None = None
    saturated: int | None = None


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


@dataclass(slots=True)
class Tally:
    """Running sums of one parameter, one group, or all."""

    steps: int = 0
    with_update: int = 0
    edq: float = 0.0
    dot: float = 0.0
    visible: float = 0.0
    norm2: float = 0.0
    nonzero: int = 0
    lost: int = 0
    edited: int = 0
    skipped: int = 0
    sampled: Sampled = field(default_factory=Sampled)
    scaled: list[int] = field(default_factory=NONE.copy)
    step: int = -1  # that was added to last, its dot and norm2 so far, and when it was sampled
    under_way: tuple[float, float] = (0.0, 0.0)
    sampled_at: int = -1

    def add(self, sums: Sequence[float], step: int, sample: Sampled | None = None) -> None:
        """Add what is SUMMED of a step of the optimizer, or of a further part of that which was added to last."""
        dot, visible, norm2, nonzero, lost, *scaled = sums
        if step == self.step:
            self._add_edq(*self.under_way, -1)
            self.under_way = self.under_way[0] + dot, self.under_way[1] + norm2
        else:
            self.steps, self.step, self.under_way = self.steps + 1, step, (dot, norm2)
        self._add_edq(*self.under_way, 1)
        self.dot += dot
        self.visible += visible
        self.norm2 += norm2
        self.nonzero += int(nonzero)
        self.lost += int(lost)
        self.scaled = [a + int(b) for a, b in zip(self.scaled, scaled, strict=True)]
        if sample is not None:
            self.sample(sample, step)

    def _add_edq(self, dot: float, norm2: float, sign: int) -> None:
        if norm2:
            self.with_update += sign
            self.edq += sign * dot / math.sqrt(norm2)

    def sample(self, sample: Sampled, step: int) -> None:
        """Add the shadow's sums, likewise: of v and m those of the last step stay."""
        if step != self.sampled_at:
            self.sampled.v = self.sampled.v_shadow = self.sampled.m_error2 = self.sampled.m_shadow2 = 0.0
            self.sampled_at = step
        self.sampled = self.sampled + sample

    @property
    def frozen(self) -> bool:
        return 0 < self.nonzero == self.lost

    def quality(self) -> Quality:
        s, (scales, rescaled, saturated) = self.sampled, self.scaled
        return Quality(
            steps=self.steps,
            edq=_ratio(self.edq, self.with_update),
            edq_ratio=_ratio(self.dot, self.norm2),
            edq_visible=_ratio(self.visible, self.norm2),
            lost=_ratio(self.lost, self.nonzero),
            nonzero=self.nonzero,
            edited=self.edited,
            skipped=self.skipped,
            v_ratio=_ratio(s.v, s.v_shadow),
            m_error=None if not s.m_shadow2 else math.sqrt(s.m_error2 / s.m_shadow2),
            edq_shadow=_ratio(s.dot, s.norm2),
            scales=scales,
            rescaled=_ratio(rescaled, scales),
            saturated=saturated if scales else None,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """Quality in total, per group (by index) and per parameter (by name).

    Attributes:
        frozen: parameters none of whose updates arrived in any plane.
        beside: strategies run on the shadow's sample, and what they lost on this very run.
        unfollowed: parameters that no shadow follows, nor a strategy beside: an element's step depends on others.
        strategies: of the optimizer's groups, each once.
        lr: the largest that a measured step had; None: none was measured, or has one.
    """

    total: Quality
    by_group: list[Quality]
    by_parameter: dict[str, Quality]
    frozen: list[str]
    beside: dict[str, Quality]
    unfollowed: list[str] = field(default_factory=list)
    strategies: list[str] = field(default_factory=list)
    lr: float | None = None

    def advice(self) -> Advice:
        """Which strategy to take, as far as this run shows: its own, and those that the monitor ran beside it."""
        return advice_of(self.strategies, self.total, self.by_group, self.beside, self.lr)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON; a number that is not finite becomes None."""
        result: dict[str, Any] = jsonable(asdict(self))
        return result


def jsonable(x: Any) -> Any:
    """The same mappings and lists; a number that is not finite, which JSON does not know, becomes None."""
    if isinstance(x, Mapping):
        return {key: jsonable(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [jsonable(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
