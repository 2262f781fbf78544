"""Learning rates that were tuned while updates were lost: by how much a step grows once all of it arrives."""

from __future__ import annotations

from dataclasses import dataclass

from collage.advised.words import WHOLE
from collage.numerals import fixed, percent, short


@dataclass(frozen=True)
class Tuned:
    """A learning rate that was found under a strategy that loses updates.

    arrived: the share of the updates that arrived under it. source: who says so.
    """

    under: str
    lr: float
    arrived: float
    source: str

    @property
    def growth(self) -> float:
        """How many times larger the steps are once nothing is lost, at the same learning rate."""
        return 1.0 if self.whole else 1 / self.arrived

    @property
    def start(self) -> float:
        """The learning rate whose whole updates go as far as the lossy ones did."""
        return self.lr if self.whole else float(f"{self.lr * self.arrived:.2g}")

    @property
    def whole(self) -> bool:
        """Whether all arrived, so that nothing changes."""
        return self.arrived >= WHOLE

    def __str__(self) -> str:
        share = percent(round(self.arrived, 3))
        if self.whole:
            return f"Under {self.under} {share} of the updates arrived ({self.source}): lr {short(self.lr)} can stay."
        grow = f"at lr {short(self.lr)} steps grow {fixed(self.growth, 1)}-fold when nothing is lost"
        return (
            f"Under {self.under} {share} of the updates arrived ({self.source}): {grow}; start from lr "
            f"{short(self.start)}."
        )
