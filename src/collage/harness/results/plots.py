"""The plots of the page: every seed's difference to the reference, or heat maps along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from collage.harness.report.pairs import Run, gaps
from collage.harness.report.plotting import LIGHT, Theme, figure, look, name_rows, save, style
from collage.harness.report.results import REFERENCE
from collage.harness.results.page import Section
from collage.harness.sweep.heat import write_heat_maps
from collage.harness.sweep.losing import Measure


def write_plots(section: Section, folder: Path) -> None:
    """As PNG files, if the section's runs are there."""
    if section.runs is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    grid, setting = section.grid(), section.evidence.study().setting()
    if grid.axis:
        write_heat_maps(grid, setting, folder)
        return
    with style(LIGHT):
        drawn = differences(section.runs, grid.strategies, grid.measures[0], setting, LIGHT)
        save(drawn, folder / "differences.png")


def differences(runs: Sequence[Run], strategies: Sequence[str], measure: Measure, setting: str, theme: Theme) -> Figure:
    """A line for each strategy, a dot for each seed; straight within the tolerance, which is shaded, decades beyond."""
    others = [name for name in strategies if name != REFERENCE]
    subtitle = f"{setting} · a dot for each seed · shaded: within {measure.allowed}"
    fig = figure(f"{measure.title} minus {REFERENCE}'s on the same seed", subtitle, theme, 0.4 * len(others) + 0.6)
    ax = fig.subplots()
    ax.axvspan(-measure.tolerance, measure.tolerance, color=theme.grid, lw=0)
    ax.axvline(0, color=theme.muted, lw=0.8)
    found = {name: gaps(name, runs, measure.key) for name in others}
    for y, name in enumerate(others):
        ax.plot(found[name], [y] * len(found[name]), "o", color=look(strategies, name, theme)[0], ms=7, alpha=0.75)
    reach = 1.5 * max(2 * measure.tolerance, *(abs(gap) for mine in found.values() for gap in mine))
    ax.set_xscale("symlog", linthresh=measure.tolerance)
    ax.set(xlim=(-reach, reach), ylim=(len(others) - 0.5, -0.5))
    name_rows(ax, strategies, dict(zip(others, range(len(others)), strict=True)), theme)
    ax.grid(False)
    return fig
