"""The picture of `collage bench --accuracy`: bytes per parameter against what they lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from collage.harness.bench.accuracy.entries import MOMENTS
from collage.harness.bench.accuracy.moments import BETAS, OUTLIERS
from collage.harness.bench.accuracy.weights import LRS, noisy
from collage.harness.report import plotting
from collage.harness.report.plotting import INCH, LIGHT, legible
from collage.harness.text import short
from collage.strategies import STRATEGIES

OURS, UNUSED, OTHERS = "#0072b2", "#8fb6cf", "#d55e00"
HEIGHT, SIZE = 2.9, 8.0  # inches of a panel, points of a name
LEAST, MOST = 1e-6, 1e4  # of the errors that are shown
LAST = f"{BETAS[-1][1]:g}"


class Panel(NamedTuple):
    """One of the plots: which rows, which of their numbers, and what that is."""

    rows: str
    key: str
    title: str


PANELS = (
    Panel("weights", noisy(LRS[1]), f"Weights: error / movement of noisy updates at lr {short(LRS[1])}"),
    Panel("moments", f"error dense {LAST}", f"Moments: rms error of the update m/√v at β₂ {LAST}"),
    Panel("moments", f"error mates {OUTLIERS[1]:g} {LAST}", "Moments: the same beside a gradient 1,000 times as large"),
)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Named points; what a strategy of ours has is dark, other packages' are in another colour."""
    title = "What formats lose, by bytes per parameter"
    subtitle = "dark: in a strategy of ours; orange: other packages'. Lower and further left is better"
    with plotting.style(LIGHT):
        fig = plotting.figure(title, subtitle, LIGHT, HEIGHT * len(PANELS))
        for ax, panel in zip(fig.subplots(len(PANELS)), PANELS, strict=True):
            rows = [row for row in result[panel.rows] if row.get(panel.key) is not None]
            ax.set(xscale="log", yscale="log", title=panel.title, xlabel="bytes" if panel is PANELS[-1] else "")
            _points(ax, rows, panel.key)
        plotting.save(fig, path)


def _points(ax: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    sizes = sorted({round(row["bytes"]) for row in rows})
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_xticks([], minor=True)
    ax.set_xlim(0.93 * sizes[0], 1.5 * sizes[-1])
    seen = [min(max(row[key], LEAST), MOST) for row in rows]
    ax.set_ylim(0.3 * min(seen), 3 * max(seen))
    points = sorted(zip(rows, seen, strict=True), key=lambda point: round(point[0]["bytes"]))
    for _, column in groupby(points, key=lambda point: round(point[0]["bytes"])):
        _column(ax, list(column))


def _column(ax: Axes, points: Sequence[tuple[Mapping[str, Any], float]]) -> None:
    """Points of about as many bytes, their names beside them, one above the other."""
    to_axes = ax.transData + ax.transAxes.inverted()
    wanted = [tuple(to_axes.transform((row["bytes"], y))) for row, y in points]
    places = plotting.spread([y for _, y in wanted], gap=1.25 * SIZE / (HEIGHT * INCH * 0.8))
    right = max(x for x, _ in wanted)
    for (row, y), place in zip(points, places, strict=True):
        colour = colour_of(row)
        ax.plot(row["bytes"], y, "o", color=colour, ms=5)
        ax.annotate(
            row["name"], (row["bytes"], y), xytext=(right + 0.02, place), textcoords="axes fraction", va="center",
            fontsize=SIZE, color=legible(colour, LIGHT),
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def colour_of(row: Mapping[str, Any]) -> str:
    """Of a row of either kind."""
    if "momentum" in row:
        own = (row["momentum"], row["variance"]) in {s.formats(MOMENTS) for s in STRATEGIES.values()}
    else:
        own = row["name"] in {s.param for s in STRATEGIES.values()}
    return OURS if own else UNUSED if row["ours"] else OTHERS
