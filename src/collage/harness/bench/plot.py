"""The picture of `collage bench`: how long a step takes, and how much of that is moving its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from collage.harness.report import plotting
from collage.harness.report.plotting import LIGHT, look
from collage.harness.text import fixed

CROP = 4.0  # bars are cut at so many times the slowest of ours


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of ns per parameter, ours in their colours, with the limit of the same planes as a mark."""
    lines = [line for line in result["rows"] if not line["name"].startswith("limit")]
    own = [line["ns_per_param"] for line in lines if line["name"].partition(",")[0] in plotting.LOOKS]
    about = result["machine"]
    subtitle = f"{result['parameters']:,} parameters, {about['cpu']}, {about['threads']} threads, {about['kernels']}"
    with plotting.style(LIGHT):
        fig = plotting.figure("A step of the optimizer, ns per parameter", subtitle, LIGHT, 0.5 + 0.32 * len(lines))
        ax = fig.subplots()
        ax.grid(visible=True, axis="x")
        ax.grid(visible=False, axis="y")
        edge = CROP * max(own or [line["ns_per_param"] for line in lines])
        for place, line in enumerate(lines):
            _bar(ax, place, line, edge)
        ax.set_yticks(range(len(lines)), [line["name"] for line in lines])
        ax.invert_yaxis()
        ax.set_xlim(0, min(edge, 1.15 * max(line["ns_per_param"] for line in lines)))
        ax.set_xlabel("ns per parameter (|: moving the same bytes without arithmetic)")
        plotting.save(fig, path)


def _bar(ax: Axes, place: int, line: dict[str, Any], edge: float) -> None:
    name, time = line["name"].partition(",")[0], line["ns_per_param"]
    colour = look([], name, LIGHT)[0] if name in plotting.LOOKS else "#c9ced4"
    ax.barh(place, min(time, edge), color=colour, height=0.65)
    ax.text(min(time, edge * 0.97), place, f" {fixed(time, 2)}", va="center", fontsize=8.5, color=LIGHT.ink)
    if line["of_limit"]:
        ax.plot([time * line["of_limit"]] * 2, [place - 0.4, place + 0.4], color=LIGHT.ink, lw=1.4)
