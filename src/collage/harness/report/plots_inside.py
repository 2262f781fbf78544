"""The plots that look inside the optimizer: layers, sizes of updates, the second moment, bytes."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from collage.harness.report.plots import STEPS, best_and_worst, draw_curves, setting
from collage.harness.report.plotting import Theme, figure, label_ends, legible, look
from collage.harness.report.results import REFERENCE, ULP_AT_ONE, Comparison
from collage.harness.text import number, percent, short

ROW = 0.16  # inches, of one named row of a heat map
FLOOR = "#d55e00"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Cells = dict[str, dict[float, float]]  # layer -> step -> share lost


def lost_cells(c: Comparison, strategy: str) -> Cells:
    """Share of lost updates, mean over seeds; layers in the order of their first record."""
    seen: dict[str, dict[float, list[float]]] = {}
    for record in c.metrics:
        if record["kind"] == "train" and record["strategy"] == strategy:
            for layer, lost in (record.get("lost_by_layer") or {}).items():
                value = number(lost)
                if value is not None:
                    seen.setdefault(layer, {}).setdefault(float(record["step"]), []).append(value)
    return {layer: {step: fmean(values) for step, values in steps.items()} for layer, steps in seen.items()}


def edges(centres: list[float]) -> list[float]:
    """Borders of the cells around these centres."""
    inner = [(a + b) / 2 for a, b in pairwise(centres)]
    half = (centres[1] - centres[0]) / 2 if len(centres) > 1 else 0.5
    return [centres[0] - half, *inner, centres[-1] + (centres[-1] - inner[-1] if inner else half)]


def layers_title(c: Comparison) -> str:
    rated = best_and_worst(c.column("lost"), lambda lost: lost)
    if not rated:
        return "Lost updates, layer by layer"
    worst, lost = rated[-1]
    frozen = len(c.frozen(worst))
    tail = f", and {frozen} of its parameters never move" if frozen else ""
    return f"{worst} loses {percent(lost)} of its updates{tail}"


def frozen_lines(names: list[str]) -> str:
    """The first frozen parameters by name."""
    if not names:
        return "nothing frozen"
    shown = [name if len(name) <= 30 else f"…{name[-29:]}" for name in names[:2]]
    more = [f"and {len(names) - 2} more"] if len(names) > 2 else []
    return "\n".join([f"{len(names)} frozen:", *shown, *more])


def layers(c: Comparison, theme: Theme) -> Figure | None:
    """A heat map of lost updates per strategy, layers down and steps across."""
    cells = {s: found for s in c.strategies if (found := lost_cells(c, s))}
    if not cells:
        return None
    rows = list(dict.fromkeys(layer for found in cells.values() for layer in found))
    columns = min(len(cells), 4 if max(map(len, rows)) <= 24 else 3)
    lines = -(-len(cells) // columns)
    tall = min(ROW * max(6, len(rows)), max(2.5, 7 / lines))
    fig = figure(layers_title(c), setting(c), theme, lines * (tall + 1.35) + 0.3)
    grid = fig.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for ax in grid.flat[len(cells) :]:
        ax.remove()
    cmap = LinearSegmentedColormap.from_list("lost", theme.heat)
    for ax, (strategy, found) in zip(grid.flat, cells.items(), strict=False):
        steps = sorted({step for by_step in found.values() for step in by_step})
        table = [[found.get(row, {}).get(step, math.nan) for step in steps] for row in rows]
        sides = (edges(steps), edges([float(i) for i in range(len(rows))]))
        mesh = ax.pcolormesh(*sides, table, cmap=cmap, vmin=0, vmax=1, rasterized=True)
        ax.set_title(strategy, fontweight="bold", color=legible(look(c.strategies, strategy, theme)[0], theme))
        ax.set_xlabel(f"step\n{frozen_lines(c.frozen(strategy))}", fontsize=8, loc="left")
    every = math.ceil(len(rows) * ROW / tall)
    if every > 1:
        fig.supylabel(f"one row in {every} is named", fontsize=8, color=theme.muted)
    ax.set(ylim=(len(rows) - 0.5, -0.5), yticks=range(0, len(rows), every), yticklabels=rows[::every])
    ax.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=STEPS))
    for ax in grid.flat[: len(cells)]:
        ax.grid(False)
        ax.tick_params(labelsize=8)
    bar = fig.colorbar(
        mesh,
        ax=grid.flat[: len(cells)].tolist(),
        fraction=0.02,
        aspect=30,
        format=PercentFormatter(1.0, decimals=0, symbol=" %"),
    )
    bar.outline.set_visible(False)
    bar.set_label("of the non-zero updates changed no bit", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return fig


def below(bins: list[float], counts: list[float], floor: float) -> float:
    """Share of the counts left of `floor` (log2), straight inside a bin."""
    parts = (n * max(0.0, min(1.0, (floor - a) / (b - a))) for (a, b), n in zip(pairwise(bins), counts, strict=True))
    return sum(parts) / sum(counts)


def floors_in_ulps(c: Comparison) -> dict[tuple[float, float], list[str]]:
    """log2 of (down, up) in bf16 ulps of 1.0 -> the formats with this floor. A format without one is left out."""
    found: dict[tuple[float, float], list[str]] = {}
    for name, floor in (c.summary.get("floors") or {}).items():
        ways = [v for v in (number((floor or {}).get(way)) for way in ("down", "up")) if v]
        if ways:
            low, high = (round(math.log2(v / ULP_AT_ONE), 3) for v in (min(ways), max(ways)))
            found.setdefault((low, high), []).append(name)
    return dict(sorted(found.items()))


def updates(c: Comparison, theme: Theme) -> Figure | None:
    """Sizes of the intended updates against the floors of the formats."""
    histogram = c.summary.get("update_histogram") or {}
    bins, counts = histogram.get("edges") or [], [number(n) or 0.0 for n in histogram.get("counts") or []]
    total = sum(counts)
    if not total:
        return None
    floors = floors_in_ulps(c)
    shares = {name: below(bins, counts, up) for (_, up), names in floors.items() for name in names}
    told = [f"{percent(shares[name])} below {name}'s floor" for name in ("bf16", "bf16x2") if name in shares]
    fig = figure(f"Updates: {', '.join(told) or 'their sizes'}", setting(c), theme, 3.9)
    ax = fig.subplots()
    ax.stairs([n / total for n in counts], bins, fill=True, color=theme.ladder[1], zorder=2)
    seen = [edge for (a, b), n in zip(pairwise(bins), counts, strict=True) if n for edge in (a, b)]
    shown = {pair: names for pair, names in floors.items() if pair[1] > seen[0] - 4}
    marks = [mark for pair in shown for mark in pair]
    ax.set_xlim(min(seen + marks) - 1, max([edge + 1 for edge in seen] + [mark + 6 for mark in marks]))
    ax.set_ylim(0, 1.6 * max(counts) / total)
    mark_floors(ax, shown, shares, theme)
    ax.set(title="Share of the updates", xlabel="|Δ| / ulp(θ)   (bf16's ulp; the floors are those at θ = 1)")
    ax.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "2" + f"{x:.0f}".translate(SUPERSCRIPT)))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    return fig


def mark_floors(ax: Axes, floors: dict[tuple[float, float], list[str]], shares: dict[str, float], theme: Theme) -> None:
    """A line at each floor going up, a band from the floor going down, its formats and what lies below it."""
    last, y = -math.inf, 0.97
    for (down, up), names in floors.items():
        y = y if up - last < 5 else 0.97
        text = "\n".join([*names, f"{percent(shares[names[0]])} below"])
        ax.axvspan(down, up, color=FLOOR, alpha=0.15, lw=0, zorder=1)
        ax.axvline(up, color=FLOOR, lw=1.2, zorder=3)
        ax.annotate(
            text,
            (up, y),
            xytext=(5, 0),
            xycoords=ax.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=8.5,
            va="top",
            zorder=4,
            bbox={"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.85, "pad": 1},
        )
        last, y = up, y - 0.055 * (1 + text.count("\n")) - 0.02


def second_moment(c: Comparison, theme: Theme) -> Figure | None:
    """Stored v over the v of an fp32 shadow fed with the same gradients."""
    curves = {
        s: {k: [(x, y) for x, y in p if y > 0] for k, p in c.curves("train", "v_ratio", s).items()}
        for s in c.strategies
    }
    values = [y for per_seed in curves.values() for points in per_seed.values() for _, y in points]
    if not values:
        return None
    ends = {s: [v for run in c.runs(s) if (v := number(run.get("v_ratio")) or 0) > 0] for s in c.strategies}
    rated = best_and_worst({s: fmean(v) if v else None for s, v in ends.items()}, lambda v: max(v, 1 / v))
    said = [f"{name} {ratio:.{4 if 0.9 < ratio < 1.1 else 2}f}×" for name, ratio in reversed(rated)]
    fig = figure(f"v over its shadow: {', '.join(said) or 'the whole run'}", setting(c), theme, height=3.6)
    ax = fig.subplots()
    ax.set_yscale("log")
    low, high = min(1.0, *values), max(1.0, *values)
    spare = max(1.002, (high / low) ** 0.1)
    ax.set_ylim(low / spare, high * spare)
    ax.axhline(1.0, color=theme.ink, lw=0.9, ls=(0, (4, 3)), zorder=3)
    right = draw_curves(ax, c, theme, lambda s: {k: p for k, p in curves[s].items() if p})
    subs = (1, 1.5, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5)
    ax.yaxis.set_major_locator(LogLocator(subs=subs) if high / low > 1.5 else MaxNLocator(5, steps=STEPS))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(title="mean v / mean v of the fp32 shadow", xlabel="step")
    label_ends(ax, right, theme)
    return fig


def slot_bytes(c: Comparison, strategy: str) -> dict[str, float]:
    """slot -> bytes per parameter, of the first run."""
    found = next((run.get("bytes_by_slot") or {} for run in c.runs(strategy)), {})
    return {slot: value / c.summary["parameters"] for slot, n in found.items() if (value := number(n))}


def memory(c: Comparison, theme: Theme) -> Figure | None:
    """Bytes per parameter, stacked by slot."""
    stacks = {s: stack for s in c.strategies if (stack := slot_bytes(c, s))}
    if not stacks:
        return None
    sums = {s: sum(stack.values()) for s, stack in stacks.items()}
    least = min((s for s in sums if s != REFERENCE), key=lambda s: sums[s], default=REFERENCE)
    told = list(sums) if len(sums) <= 5 else [s for s in (least, REFERENCE) if s in sums]
    said = ", ".join(f"{s}\xa0{short(sums[s], 3)}" for s in told)
    fig = figure(f"Bytes per parameter: {said}", setting(c), theme, height=0.44 * len(stacks) + 1.0)
    ax = fig.subplots()
    slots = by_family(list(dict.fromkeys(slot for stack in stacks.values() for slot in stack)))
    left = dict.fromkeys(stacks, 0.0)
    ladder = LinearSegmentedColormap.from_list("ladder", theme.ladder)
    for i, slot in enumerate(slots):
        colour = to_hex(ladder(i / max(1, len(slots) - 1)))
        stack_slot(ax, {s: stack.get(slot, 0.0) for s, stack in stacks.items()}, left, (slot, colour), theme)
    for y, total in enumerate(sums.values()):
        ax.annotate(short(total), (total, y), (6, 0), textcoords="offset points", va="center", fontweight="bold")
    ax.set_yticks(range(len(stacks)), list(stacks), fontweight="bold")
    for tick, strategy in zip(ax.get_yticklabels(), stacks, strict=True):
        tick.set_color(legible(look(c.strategies, strategy, theme)[0], theme))
    ax.set(ylim=(len(stacks) - 0.4, -0.6), xlabel="bytes per parameter", xlim=(0, 1.06 * max(sums.values())))
    ax.grid(False)
    across = len(slots) if len(slots) <= 7 else -(-len(slots) // 2)
    fig.legend(loc="outside lower left", ncols=across, frameon=False, fontsize=8.5)
    return fig


def by_family(slots: list[str]) -> list[str]:
    """Planes of one number side by side: param, param_lo, exp_avg, ..."""
    return sorted(slots, key=lambda slot: next(i for i, first in enumerate(slots) if slot.startswith(first)))


def stack_slot(ax: Axes, wide: dict[str, float], left: dict[str, float], slot: tuple[str, str], theme: Theme) -> None:
    """One slot (name, colour) of every strategy, put on top of `left`, which moves on."""
    name, colour = slot
    bars: dict[str, Any] = {"color": colour, "label": name, "edgecolor": theme.paper, "linewidth": 1.2}
    ax.barh(range(len(wide)), list(wide.values()), 0.62, list(left.values()), **bars)
    ink = "#ffffff" if sum(to_rgb(colour)) < 1.5 else "#1f2328"
    for y, (strategy, width) in enumerate(wide.items()):
        if width >= 0.5:
            ax.text(left[strategy] + width / 2, y, short(width, 3), ha="center", va="center", fontsize=8.5, color=ink)
        left[strategy] += width
