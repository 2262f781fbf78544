"""The plots of a comparison. Each takes its numbers from the run's files and says in its title what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from collage.harness.report.plotting import Theme, figure, label_ends, legible, look
from collage.harness.report.results import REFERENCE, Comparison, Points, mean, smooth
from collage.harness.text import fixed, percent, short

Ends = dict[str, tuple[float, str]]  # name -> last value, colour


STEPS = [1, 2, 2.5, 5, 10]  # of the ticks
FEW = 12  # a curve of no more points than this shows them


def signed(c: Comparison, value: float | None) -> str:
    """A difference of losses."""
    return fixed(value, c.loss.digits, "+")


def setting(c: Comparison) -> str:
    """What was trained, in one line."""
    s = c.summary
    parts = [
        f"{str(s['title']).partition(':')[0]}: {s.get('model')}",
        f"{s['parameters']:,} parameters" if s.get("parameters") else "",
        f"{s['steps']:,} steps" if s.get("steps") else "",
        s.get("optimizer") or "",
        f"lr {short(s['lr'])}" if s.get("lr") else "",
        f"mean of {len(c.summary['seeds'])} seeds" if len(c.summary["seeds"]) > 1 else "one seed",
    ]
    return " · ".join(filter(None, parts))


def best_and_worst(values: Mapping[str, float | None], badness: Callable[[float], float]) -> list[tuple[str, float]]:
    """Two (strategy, value), one if there is only one, none if nothing was measured; the reference only if alone."""
    known = {name: value for name, value in values.items() if value is not None}
    rated = sorted(
        ((n, v) for n, v in known.items() if n != REFERENCE or len(known) == 1), key=lambda nv: badness(nv[1])
    )
    return [rated[0], rated[-1]] if len(rated) > 1 else rated


def takeaway(c: Comparison) -> str:
    """The run in one sentence."""
    kept = c.column("kept")
    rated = best_and_worst(kept, lambda share: -share)
    if c.finetune and rated and REFERENCE in c.strategies:
        (best, most), (worst, least) = rated[0], rated[-1]
        first = f"{best} keeps {percent(most)} of {REFERENCE}'s gain"
        return first if best == worst else f"{first}, {worst} keeps {percent(least)}"
    return loss_title(c)


def loss_title(c: Comparison) -> str:
    rated = best_and_worst({k: v for k, v in c.column("difference").items() if k != REFERENCE}, abs)
    if rated:
        told = ", ".join(f"{name} {signed(c, value)}" for name, value in rated)
        return f"Loss against {REFERENCE}: {told} {c.loss.unit}"
    losses = sorted((v, k) for k, v in c.column("val_loss").items() if v is not None)
    return (
        f"Lowest validation loss: {fixed(losses[0][0], c.loss.digits)}, with {losses[0][1]}"
        if losses
        else "Validation loss"
    )


def draw_curves(
    ax: Axes, c: Comparison, theme: Theme, curves_of: Callable[[str], Mapping[int, Points]], moving: bool = False
) -> Ends:
    """Mean over seeds, thin lines for each; the reference lies beneath as a broad pale one. Returns the right ends."""
    ends: Ends = {}
    last, few = 1.0, False
    order = sorted(c.strategies, key=lambda name: name != REFERENCE)
    for i, strategy in enumerate(order):
        colour, dash = look(c.strategies, strategy, theme)
        curves = curves_of(strategy)
        middle = mean(curves)
        if not middle:
            continue
        window = smoothing(middle) if moving else 0
        if len(curves) > 1 or window > 1:
            for points in curves.values():
                ax.plot(*zip(*points, strict=True), color=colour, lw=0.6, alpha=0.35)
        if window > 1:
            middle = smooth(middle, window)
        wide, alpha = (5.0, 0.55) if strategy == REFERENCE else (3.6 - 2.0 * i / len(order), 1.0)
        last, few = max(last, middle[-1][0]), few or len(middle) <= FEW
        marker = "o" if len(middle) <= FEW else ""
        ax.plot(*zip(*middle, strict=True), color=colour, ls=dash, lw=wide, alpha=alpha, marker=marker, ms=wide + 1.6)
        ends[strategy] = (middle[-1][1], colour)
    ax.set_xlim(-0.02 * last * few, last * (1 + 0.02 * few))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=STEPS))
    return {name: ends[name] for name in c.strategies if name in ends}


def smoothing(points: Points) -> int:
    """How many points of a training loss are averaged: none in a short curve."""
    return len(points) // 20 if len(points) >= 40 else 0


def fit(ax: Axes, points: Points, spare: float = 0.06) -> None:
    """Limits that hold the points, also if they are all the same."""
    values = [value for _, value in points]
    low, high = min(values), max(values)
    pad = spare * (high - low) or 0.01 * abs(high) or 0.01
    ax.set_ylim(low - pad, high + pad)


def settled(curves: Mapping[int, Points], steps: float) -> Points:
    """The points that matter for the limits of a loss: without the fall of the first tenth."""
    points = [point for seed in curves.values() for point in seed]
    return [point for point in points if point[0] >= 0.1 * steps] or points


def loss_panel(ax: Axes, c: Comparison, theme: Theme, *, train: bool = False) -> None:
    """Loss over the steps: of the training batches, or of the validation text with the strategies' names."""
    curves = {s: c.curves("train", "loss", s) if train else c.validation(s) for s in c.strategies}
    ends = draw_curves(ax, c, theme, curves.__getitem__, moving=train)
    points = [p for per_seed in curves.values() for p in settled(per_seed, 0 if c.finetune else c.summary["steps"])]
    moving = train and any(smoothing(mean(per_seed)) for per_seed in curves.values())
    kind, unit = ("Training", c.loss.training) if train else ("Validation", c.loss.unit)
    title = f"{kind} loss [{unit}]{', moving average' if moving else ''}"
    ax.set(title=title, xlabel="step")
    if points:
        fit(ax, points)
    if not train:
        label_ends(ax, ends, theme)


def score_panel(ax: Axes, c: Comparison, theme: Theme, key: str, title: str) -> None:
    """One thin bar per strategy, its name and number above it."""
    values = c.column(key)
    share = key == "kept"
    known = [v for v in values.values() if v is not None]
    low, high = min(0.0, *known), max(1.0 if share else 0.0, *known)
    low, high = (max(low, -0.25), min(high, 1.25)) if share else (low, high if high > low else low + 1e-3)
    for y, (strategy, value) in enumerate(values.items()):
        colour, _ = look(c.strategies, strategy, theme)
        if share:
            ax.barh(y, 1.0, height=0.24, color=theme.grid)
        if value is not None:
            noise = None if share or strategy == REFERENCE else c.column("difference_spread")[strategy]
            ax.barh(y, max(low, min(high, value)), height=0.24, color=colour, xerr=noise, ecolor=theme.ink)
        row: dict[str, Any] = {"y": y - 0.22, "va": "baseline", "transform": ax.get_yaxis_transform()}
        ax.text(0, s=strategy, fontweight="bold", color=legible(colour, theme), **row)
        size = c.column("bytes_per_param")[strategy]
        if size is not None:
            ax.text(0.76, s=f"{short(size, 3)} bytes/param", ha="right", fontsize=8.5, color=theme.muted, **row)
        text = percent(value) if share else signed(c, value)
        ax.text(1, s="0" if strategy == REFERENCE and not share else text, ha="right", fontweight="bold", **row)
    if low < 0:
        ax.axvline(0, color=theme.muted, lw=0.8)
    ax.set(title=title, xlim=(low, high), ylim=(max(4, len(values)) - 0.6, -0.75), xticks=[], yticks=[])
    ax.spines["bottom"].set_visible(False)
    ax.grid(False)


def headline(c: Comparison, theme: Theme) -> Figure:
    """Validation loss beside what each strategy kept of it: the picture for a first screen."""
    fig = figure(takeaway(c), setting(c), theme, height=max(3.1, 0.5 * len(c.strategies) + 0.5))
    key = "kept" if c.finetune and any(v is not None for v in c.column("kept").values()) else "difference"
    if all(v is None for v in c.column(key).values()):
        loss_panel(fig.subplots(), c, theme)
        return fig
    left, right = fig.subplots(1, 2, width_ratios=[1.15, 1])
    loss_panel(left, c, theme)
    title = f"Share of {REFERENCE}'s improvement kept"
    if key != "kept":
        title = f"Final loss minus {REFERENCE}'s [{'nats' if c.loss.unit == 'nats' else 'points'}]"
    score_panel(right, c, theme, key, title)
    return fig


def losses(c: Comparison, theme: Theme) -> Figure | None:
    """Training and validation loss, and the paired difference to the reference."""
    if not any(c.validation(s) or c.curves("train", "loss", s) for s in c.strategies):
        return None
    reference = c.validation(REFERENCE)

    def difference(strategy: str) -> dict[int, Points]:
        pairs = {seed: (points, dict(reference.get(seed, []))) for seed, points in c.validation(strategy).items()}
        return {
            seed: paired
            for seed, (points, ref) in pairs.items()
            if (paired := [(step, value - ref[step]) for step, value in points if step in ref])
        }

    fig = figure(loss_title(c), setting(c), theme, height=6.0 if reference else 3.2)
    axes = fig.subplots(2 if reference else 1, 2, squeeze=False)
    loss_panel(axes[0, 0], c, theme, train=True)
    loss_panel(axes[0, 1], c, theme)
    if reference:
        ax = fig.add_subplot(axes[1, 0].get_gridspec()[1, :])
        for old in axes[1]:
            old.remove()
        ends = draw_curves(ax, c, theme, lambda s: difference(s) if s != REFERENCE else {})
        ax.axhline(0, color=theme.muted, lw=0.8)
        fit(ax, [p for s in c.strategies for points in difference(s).values() for p in points] or [(0, 0)])
        ax.set(title=f"Validation loss minus {REFERENCE}'s on the same seed [{c.loss.unit}]", xlabel="step")
        label_ends(ax, {f"{s} {signed(c, end[0])}": end for s, end in ends.items()}, theme)
    return fig


def scores(c: Comparison, theme: Theme) -> Figure | None:
    """The task's measure beside its loss, accuracy or return, over the steps."""
    curves = {s: c.curves("eval", "score", s) for s in c.strategies}
    if not any(curves.values()):
        return None
    rated = [(name, value) for name, value in c.column("score").items() if value is not None]
    told = ", ".join(f"{name} {short(value)}" for name, value in rated)
    fig = figure(f"{str(c.score).capitalize()}: {told}", setting(c), theme, height=3.2)
    ax = fig.subplots()
    ends = draw_curves(ax, c, theme, curves.__getitem__)
    points = [p for per_seed in curves.values() for seed in per_seed.values() for p in seed]
    fit(ax, points)
    ax.set(title=str(c.score).capitalize(), xlabel="step")
    label_ends(ax, ends, theme)
    return fig


def quality(c: Comparison, theme: Theme) -> Figure | None:
    """EDQ ratio and lost updates over the steps, the learning rate beneath."""
    panels = [("edq_ratio", "EDQ ratio: share of the intended update that arrived"), ("lost", "Lost updates")]
    if not any(c.curves("train", key, s) for key, _ in panels for s in c.strategies):
        return None
    rated = best_and_worst(c.column("edq_ratio"), lambda ratio: abs(1 - ratio))
    title = (
        f"EDQ ratio: {', '.join(f'{name} {fixed(value, 4)}' for name, value in reversed(rated)) or 'over the steps'}"
    )
    fig = figure(title, setting(c), theme, height=7.0)
    axes = fig.subplots(3, 1, sharex=True, height_ratios=[1, 1, 0.35])
    for ax, (key, name) in zip(axes[:2], panels, strict=True):
        ends = draw_curves(ax, c, theme, lambda s, key=key: c.curves("train", key, s))  # type: ignore[misc]
        seen = [value for s in c.strategies for points in c.curves("train", key, s).values() for _, value in points]
        ax.set(title=name, ylim=(min(-0.03, *seen, 0), max(1.04, *seen, 0)))
        label_ends(ax, ends, theme)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    rates = next((p for s in c.strategies for p in c.curves("train", "lr", s).values()), [])
    if rates:
        axes[2].fill_between(*zip(*rates, strict=True), color=theme.muted, alpha=0.25, lw=0)
        axes[2].plot(*zip(*rates, strict=True), color=theme.muted, lw=1.2)
    axes[2].yaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x, 2)))
    axes[2].yaxis.set_major_locator(MaxNLocator(2))
    axes[2].set(title="Learning rate", xlabel="step", ylim=(0, None))
    return fig
