"""What `collage.advise` gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from collage.advised.table import table
from collage.advised.tuned import Tuned


@dataclass(frozen=True)
class Advice:
    """Which strategy to take, and why.

    Attributes:
        strategy: the cheapest one that is safe and fits; None: there is none, and `why` says what to do.
        why: one sentence, with the evidence.
        rows: a dict for each strategy: `strategy`; `bytes_per_param` and `gigabytes` of weights, gradients and state;
            `fits`, None if no memory was given; `cannot_move`, the share of the weights that a step of lr leaves as
            they are; `arrived`, the share of float32's movement that was made in the rehearsal; `decay_arrives`,
            likewise, of its decay; `v_ratio`, its second moment over float32's; `seconds_per_step`; `verdict`
            ("safe", "loses" or "unknown"), `because`, and `evidence`, the nearest run that was measured, or None.
        notes: what was rehearsed, and what was not.
        tuned: the learning rate to start from, if the present one was tuned under another strategy.
    """

    strategy: str | None
    why: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    tuned: Tuned | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        said = [self.why, *([str(self.tuned)] if self.tuned else [])]
        return "\n".join([*said, "", table(self.rows), *(["", *self.notes] if self.notes else [])])
