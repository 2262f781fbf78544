"""What every plot shares: themes, a look for each strategy, the bones of a figure, and how it is saved."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from collage.harness.report.results import REFERENCE

INCH = 72  # points


@dataclass(frozen=True)
class Theme:
    """Colours of everything that is not a strategy. `heat` and `ladder` run from nothing to all."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    heat: tuple[str, ...]
    ladder: tuple[str, str, str]
    tint: str  # strategies' colours are mixed with it, by `tint_share`
    tint_share: float


LIGHT = Theme(
    *("light", "#ffffff", "#1f2328", "#59636e", "#e3e7eb"),
    heat=("#f1f3f5", "#fbd77f", "#f2b138", "#e58a13", "#d55e00", "#96380a", "#571a00"),
    ladder=("#2f4858", "#6f98a9", "#dbe7ec"),
    tint="#ffffff",
    tint_share=0.0,
)
DARK = Theme(
    *("dark", "#0d1117", "#e6edf3", "#9198a1", "#2a3038"),
    heat=("#1b2129", "#5a2d0c", "#96450a", "#c8650f", "#e58a13", "#f3b95a", "#ffe7a3"),
    ladder=("#d3e4ea", "#6a92a3", "#24363f"),
    tint="#ffffff",
    tint_share=0.3,
)

# Okabe and Ito's colours, told apart under every common colour blindness; a dash tells the paper's letter from ours.
LOOKS: dict[str, tuple[str, str]] = {
    "bf16": ("#d55e00", "-"),
    "collage-light": ("#56b4e9", "-"),
    "collage-plus": ("#0072b2", "-"),
    "collage-plus-sr": ("#009e73", "-"),
    "paper-bf16": ("#d55e00", "--"),
    "paper-light": ("#56b4e9", "--"),
    "paper-plus": ("#0072b2", "--"),
    "fp32-states": ("#8c6bb1", "-"),
    REFERENCE: ("#7d8590", "-"),
    "fp32": ("#7d8590", ":"),
    "kahan": ("#cc79a7", "-"),
    "stochastic": ("#e69f00", "-"),
}
OTHER_LOOKS = [(colour, dash) for dash in ("-.", ":") for colour in ("#009e73", "#cc79a7", "#e69f00", "#8c6bb1")]


def look(strategies: Sequence[str], strategy: str, theme: Theme) -> tuple[str, str]:
    """Colour and dash, the same in every plot of every comparison."""
    others = [name for name in strategies if name not in LOOKS]
    colour, dash = LOOKS.get(strategy) or OTHER_LOOKS[others.index(strategy) % len(OTHER_LOOKS)]
    return mix(colour, theme.tint, theme.tint_share), dash


def mix(colour: str, other: str, share: float) -> str:
    """`colour` with `share` of `other` in it."""
    (r, g, b), (r2, g2, b2) = to_rgb(colour), to_rgb(other)
    return to_hex(((1 - share) * r + share * r2, (1 - share) * g + share * g2, (1 - share) * b + share * b2))


def legible(colour: str, theme: Theme) -> str:
    """The colour for words: nearer to ink."""
    return mix(colour, theme.ink, 0.35)


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    """Draw and save inside this; the settings of the surrounding program come back."""
    rc: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": theme.ink,
        "text.usetex": False,
        "figure.facecolor": theme.paper,
        "axes.facecolor": "none",
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.linewidth": 0.8,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.xmargin": 0,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titlecolor": theme.ink,
        "axes.titlepad": 9,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "savefig.dpi": 200,
        "svg.fonttype": "none",
        "svg.hashsalt": "collage",
    }
    with matplotlib.rc_context(rc):
        yield


def figure(title: str, subtitle: str, theme: Theme, height: float, width: float = 9.0) -> Figure:
    """An empty figure under its takeaway. `height` [inches] is that of the plots alone."""
    lines = balanced(title, 70)
    head = 0.25 + 0.27 * len(lines) + 0.3
    total = height + head
    fig = Figure(figsize=(width, total), layout="constrained")
    engine = fig.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0.008, 0.008, 0.984, height / total - 0.008), w_pad=0.08, h_pad=0.08)  # type: ignore[call-arg]
    at: dict[str, Any] = {"x": 0.014, "ha": "left", "va": "top", "in_layout": False}
    fig.suptitle("\n".join(lines), y=1 - 0.15 / total, fontsize=14, fontweight="bold", linespacing=1.25, **at)
    fig.text(s=subtitle, y=1 - (head - 0.27) / total, fontsize=10, color=theme.muted, **at)
    return fig


def balanced(text: str, width: int) -> list[str]:
    """As few lines as needed, about equally long."""
    count = len(textwrap.wrap(text, width))
    fits = (lines for w in range(width) if len(lines := textwrap.wrap(text, w + 1, break_on_hyphens=False)) <= count)
    return next(fits, textwrap.wrap(text, width)) or [""]


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart in the same order, near the wanted ones, inside [0, 1] if there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[list[float]] = []  # of wanted[i] - rank * gap, which must not decrease: neighbours that do share a mean
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    placed = [fmean(pool) for pool in pools for _ in pool]
    top = 1 - gap * (len(order) - 1)
    clamped = [max(0.0, min(top, place)) + rank * gap for rank, place in enumerate(placed)]
    return [clamped[order.index(i)] for i in range(len(wanted))]


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, str]], theme: Theme, size: float = 9) -> None:
    """Name every curve at its right end: name -> (last value, colour). Limits of `ax` must be final."""
    if not ends:
        return
    box = ax.get_position()
    height = box.height * ax.figure.get_figure(root=True).get_figheight() * INCH
    to_axes = ax.transData + ax.transAxes.inverted()
    wanted = [float(to_axes.transform((0, value))[1]) for value, _ in ends.values()]
    right = float(to_axes.transform((ax.get_xlim()[1], 0))[0])
    places = spread([max(0.0, min(1.0, y)) for y in wanted], gap=1.5 * size / height)
    for (name, (_, colour)), y, place in zip(ends.items(), wanted, places, strict=True):
        ax.annotate(
            name,
            xy=(right + 0.005, max(0.0, min(1.0, y))),
            xytext=(right + 0.04, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            color=legible(colour, theme),
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)},
        )


def name_rows(ax: Axes, strategies: Sequence[str], places: Mapping[str, float], theme: Theme) -> None:
    """Name strategies along the y axis, each in its colour: name -> place. strategies: all that are compared."""
    ax.set_yticks(list(places.values()), list(places))
    for name, words in zip(places, ax.get_yticklabels(), strict=True):
        words.set(color=legible(look(strategies, name, theme)[0], theme), fontweight="bold")


def embedded(fig: Figure) -> str:
    """The figure as SVG in base64, clear, its words in the reader's own font. Call inside `style`."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace(b"'DejaVu Sans'", b"system-ui, 'Segoe UI', 'Liberation Sans', 'DejaVu Sans'")
    return base64.b64encode(svg).decode("ascii")


def save(fig: Figure, path: Path) -> None:
    """The same figure in the same bytes. Call inside `style`."""
    fig.savefig(path, format="png", metadata={"Software": None})
