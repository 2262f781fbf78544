"""A run's report: one HTML page that opens offline, and its plots as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from collage.harness.report import plots, plots_inside
from collage.harness.report.columns import FLOORS, columns, floorless
from collage.harness.report.plotting import DARK, LIGHT, Theme, embedded, look, save, style
from collage.harness.report.results import Comparison
from collage.harness.text import MISSING, Column, number, present

SMALL = 100_000_000  # parameters; below, a model is a toy to those who train language models
GPUS = ("cuda", "rocm", "nvidia", "gpu")


@dataclass(frozen=True)
class Plot:
    """A row of the report.

    Args:
        name: of the PNG file and of the anchor.
        heading: above it.
        lead: what to look for, one or two sentences.
        draw: makes the figure, or None if its numbers were not measured.
        limits: what it does not show, besides what is true of the whole run.
        varies: whether another seed changes it.
        scored: whether it is of tasks alone that have a score.
    """

    name: str
    heading: str
    lead: str
    draw: Callable[[Comparison, Theme], Figure | None]
    limits: tuple[str, ...] = ()
    varies: bool = True
    scored: bool = False


PLOTS = (
    Plot("headline", "At a glance", "", plots.headline),
    Plot(
        "loss",
        "Loss",
        "Where curves lie on each other, the difference on the same seed and batches tells them apart.",
        plots.losses,
        ("What another text, another schedule or a longer run would show.",),
    ),
    Plot("score", "Score", "What the task is about, beside its loss. More is better.", plots.scores, scored=True),
    Plot(
        "edq",
        "Effective descent quality and lost updates",
        "EDQ ratio 1: the whole intended update reached the weights. A lost update changed no bit of its weight.",
        plots.quality,
        (
            "Damage already done to the moments: both start from the stored state. The second moment below shows it.",
            "Steps between two measurements.",
        ),
    ),
    Plot(
        "layers",
        "Lost updates by layer",
        "A row that stays at 100 % is a layer that does not train. Blank: not measured, or no update but zero.",
        plots_inside.layers,
        (
            "Updates that were rounded badly but changed a bit: they count as arrived.",
            "A small frozen vector within a large layer: only the list of frozen parameters names it.",
        ),
    ),
    Plot(
        "updates",
        "Sizes of updates against the floors",
        "Left of its line a format cannot keep an update that repeats. A format without a line keeps all shown here.",
        plots_inside.updates,
        (
            "Floors of other weights: a line is the floor going up at θ = 1, over bf16's ulp there (2⁻⁷); its band "
            "reaches to the floor going down. In ulps of θ another weight's floor is within about a factor of two.",
            "What was lost: an expansion's low part takes an update below its floor as long as it is small itself.",
        ),
    ),
    Plot(
        "second-moment",
        "Second moment over its shadow",
        "The shadow: the same rule in fp32 on a sample of the weights, fed with the run's own gradients. 1 is right.",
        plots_inside.second_moment,
        ("Errors of single elements: it is a ratio of means over the sample.",),
    ),
    Plot(
        "memory",
        "Bytes per parameter",
        "Counted from the live tensors, slot by slot.",
        plots_inside.memory,
        ("Activations, temporaries and allocator overhead; peak memory in the table is that of the whole process.",),
        varies=False,
    ),
)


def limits(c: Comparison, plot: Plot) -> list[str]:
    """What the run cannot show, first what is true of this plot alone."""
    found = list(plot.limits)
    if plot.varies and len(c.summary["seeds"]) < 2:
        found.append("Noise between seeds: with one seed, a small difference may be luck.")
    size = number(c.summary.get("parameters"))
    if size and size < SMALL:
        found.append(f"Large models and long runs: {size:,.0f} parameters, {c.summary['steps']:,} steps.")
    return found


def on_gpu(c: Comparison) -> bool:
    said = " ".join(f"{key} {value}" for key, value in c.summary["machine"].items()).lower()
    return any(word in said for word in GPUS)


def table_note(c: Comparison) -> str:
    """How to read the table."""
    spread = any(number(row.get("difference_spread")) is not None for row in c.summary["table"])
    return " ".join(
        [
            "± is the spread of the paired difference over seeds." if spread else "One seed: no spread is known.",
            f"{MISSING}: not measured.",
            "" if on_gpu(c) else "Times are of this CPU; they say nothing about a GPU.",
        ]
    ).strip()


def drawn(c: Comparison, plot: Plot, folder: Path) -> dict[str, Any]:
    """What the page needs of one plot; writes its PNG."""
    page: dict[str, str] = {}
    title = ""
    for theme in (LIGHT, DARK):
        with style(theme):
            fig = plot.draw(c, theme)
            if fig is None:
                break
            title = fig.get_suptitle().replace("\n", " ")
            page[theme.name] = embedded(fig)
            if theme is LIGHT or plot.name == "headline":
                save(fig, folder / f"{plot.name}{'' if theme is LIGHT else '-dark'}.png")
    return {
        "name": plot.name,
        "heading": plot.heading,
        "lead": plot.lead,
        "light": page.get("light"),
        "dark": page.get("dark"),
        "alt": f"{plot.heading}: {title}. One curve, bar or panel for each of {', '.join(c.strategies)}.",
        "limits": limits(c, plot),
    }


def cells(columns: Sequence[Column], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A table, ready to be laid out."""
    shown = present(columns, list(rows.values()))
    return {"columns": shown, "rows": {name: [c.cell(row) for c in shown] for name, row in rows.items()}}


def context(c: Comparison, folder: Path) -> dict[str, Any]:
    """Everything that the template names."""
    s = c.summary
    seeds = ", ".join(map(str, s["seeds"]))
    machine = ", ".join(f"{key} {value}" for key, value in s["machine"].items())
    return {
        "title": s["title"],
        "setting": plots.setting(c),
        "advice": s.get("advice") or "None: too little was measured.",
        "results": cells(columns(s), {row["strategy"]: row for row in s["table"]}),
        "table_note": table_note(c),
        "colours": {name: [look(c.strategies, name, theme)[0] for theme in (LIGHT, DARK)] for name in c.strategies},
        "plots": [drawn(c, plot, folder) for plot in PLOTS if c.score or not plot.scored],
        "frozen": {name: c.frozen(name) for name in c.strategies},
        "floorless": floorless(s["strategies"]),
        "floors": cells(FLOORS, {name: ways or {} for name, ways in (s.get("floors") or {}).items()}),
        "command": s["command"],
        "source": f"collage {s['version']} · {machine} · seed{'s' if len(s['seeds']) > 1 else ''} {seeds}",
        "caveats": s.get("caveats") or [],
        "facts": [("created", s.get("created")), ("collage", s["version"]), *s["machine"].items(), ("seeds", seeds)],
    }


def write_report(out: Path) -> Path:
    """Make `report.html` and `plots/*.png` of the `summary.json` and `metrics.jsonl` in a run's folder.

    Returns:
        The path of the page. It needs no other file and no network.
    """
    out = Path(out)
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    c = Comparison.read(out)
    source = (resources.files("collage.harness.report") / "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = out / "report.html"
    page.write_text(environment.from_string(source).render(context(c, folder)), encoding="utf-8")
    return page
