"""Heat maps of a grid: strategies down, values across; the darker, the more is lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, SymLogNorm
from matplotlib.figure import Figure

from collage.harness.report.plotting import LIGHT, Theme, figure, name_rows, save, style
from collage.harness.report.results import REFERENCE
from collage.harness.sweep.grid import Cell, Grid
from collage.harness.sweep.losing import DIVERGED, Measure
from collage.harness.text import fixed, number, short

PALE_FROM = 0.55  # of the colours: from here on words on them are pale
DECADES = 2  # of losses beyond the tolerance that colours tell apart

Shown = Callable[[Cell], tuple[float | None, str]]  # how dark, from 0 to 1, and what stands there


def write_heat_maps(grid: Grid, setting: str, out: Path) -> list[Path]:
    """A PNG of the differences for each measure, and one of EDQ ratios. Returns their paths.

    Args:
        grid: with an axis.
        setting: what was trained, in a line.
        out: their folder.
    """
    maps = {measure.key: (f"{measure.title} minus {REFERENCE}'s", _loss(measure)) for measure in grid.measures}
    maps["edq_ratio"] = ("EDQ ratio: the share of the update that arrived", _edq)
    paths = [out / f"heat-{name}.png" for name in maps]
    for path, (title, shown) in zip(paths, maps.values(), strict=True):
        with style(LIGHT):
            save(heat_map(grid, title, setting, shown, LIGHT), path)
    return paths


def heat_map(grid: Grid, title: str, setting: str, shown: Shown, theme: Theme) -> Figure:
    """One map, with what was measured in every cell."""
    fig = figure(title, setting, theme, height=0.42 * len(grid.strategies) + 0.6)
    ax = fig.subplots()
    rows = [[shown(cells[name]) for cells in grid.cells.values()] for name in grid.strategies]
    colours = LinearSegmentedColormap.from_list("lost", theme.heat)
    table = [[math.nan if dark is None else dark for dark, _ in row] for row in rows]
    ax.pcolormesh(table, cmap=colours, vmin=0, vmax=1, edgecolors=theme.paper, linewidth=2)
    for y, row in enumerate(rows):
        for x, (dark, words) in enumerate(row):
            ink = theme.paper if (dark or 0.0) > PALE_FROM else theme.ink
            ax.text(x + 0.5, y + 0.5, words, ha="center", va="center", color=ink, fontsize=9)
    _name_sides(ax, grid, theme)
    return fig


def _name_sides(ax: Axes, grid: Grid, theme: Theme) -> None:
    ax.set(ylim=(len(grid.strategies), 0), xlabel=grid.axis)
    ax.set_xticks([x + 0.5 for x in range(len(grid.cells))], [short(value, 6) for value in grid.cells])
    name_rows(ax, grid.strategies, {name: y + 0.5 for y, name in enumerate(grid.strategies)}, theme)
    ax.tick_params(length=0)
    ax.spines["bottom"].set_visible(False)
    ax.grid(False)


def _loss(measure: Measure) -> Shown:
    """Dark by decades, beginning at the tolerance."""
    scale = SymLogNorm(measure.tolerance, vmin=0.0, vmax=10**DECADES * measure.tolerance, clip=True)

    def shown(cell: Cell) -> tuple[float | None, str]:
        if cell.state == DIVERGED:
            return 1.0, DIVERGED
        mean = number(cell.differences[measure.key].mean)
        return (None if mean is None else float(scale(measure.sign * mean))), measure.text(mean, sign="+")

    return shown


def _edq(cell: Cell) -> tuple[float | None, str]:
    ratio = number(cell.means["edq_ratio"])
    return (None if ratio is None else min(1.0, abs(1.0 - ratio))), fixed(ratio, 4)
