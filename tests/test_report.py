"""The report of a comparison, from files made up here."""

from __future__ import annotations

import base64
import json
import math
import random
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from rich.console import Console

from collage.harness.compare.shown import print_comparison
from collage.harness.report import page as pages
from collage.harness.report.columns import columns
from collage.harness.report.page import write_report
from collage.harness.report.plots_inside import below, by_family, edges
from collage.harness.report.plotting import DARK, LIGHT, LOOKS, balanced, look, spread
from collage.harness.report.results import mean, smooth
from collage.harness.text import MISSING, percent, present

COLUMNS = columns({})
PLOTS = [plot for plot in pages.PLOTS if not plot.scored]  # of a task that has a loss alone

DEFAULT = ("bf16", "collage-light", "collage-plus", "fp32-master")
KEEPS = {"bf16": 0.07, "collage-light": 0.9931, "collage-plus": 0.9982, "fp32-master": 1.0}  # of the improvement
BYTES = {"bf16": 8, "collage-light": 10, "collage-plus": 12, "fp32-master": 16}
V_RATIO = {"bf16": 4.0, "collage-light": 4.0}
LAYERS = ("embedding", *(f"block {i} {part}" for i in range(4) for part in ("attention", "mlp", "norm")), "final norm")


def train_record(strategy: str, seed: int, step: int, steps: int, layers: tuple[str, ...]) -> dict[str, Any]:
    noise = random.Random(f"{strategy} {seed} {step}").gauss
    lost = 0.93 * (1 - KEEPS.get(strategy, 0.9)) * (1 - 0.4 * step / steps)
    return {
        "kind": "train",
        "strategy": strategy,
        "seed": seed,
        "step": step,
        "grad_norm": 1.0,
        "edq": 1e-3,
        "lr": 1e-5 * min(1.0, 10 * step / steps) * (1 - 0.9 * step / steps),
        "loss": 2.9 - 0.6 * KEEPS.get(strategy, 0.5) * (1 - math.exp(-3 * step / steps)) + noise(0, 0.05),
        "edq_ratio": 1 - lost * 0.8,
        "edq_visible": 0.4,
        "lost": lost,
        "v_ratio": V_RATIO.get(strategy, 1.0005) ** (step / steps),
        "m_error": 1e-3,
        "edq_shadow": 1 - lost,
        "lost_by_layer": {layer: min(1.0, lost * (0.3 + 2.2 * ("norm" in layer))) for layer in layers},
    }


def run(strategy: str, seed: int, frozen: list[str]) -> dict[str, Any]:
    share, size = KEEPS.get(strategy, 0.9), BYTES.get(strategy, 12)
    slots = {"gradient": 2.0, "param": 2.0, "param_lo": 2.0 * (size >= 10), "exp_avg": 2.0, "exp_avg_sq": 2.0}
    slots |= {"exp_avg_sq_lo": 2.0} if size == 12 else {}
    slots |= {"param_lo": 0.0, "param_master": 4.0, "exp_avg": 4.0, "exp_avg_sq": 4.0} if size == 16 else {}
    return {
        "strategy": strategy,
        "seed": seed,
        "initial_loss": 2.9,
        "val_loss": 2.9 - 0.6 * share + 0.01 * seed,
        "edq_ratio": share,
        "lost": 1 - share,
        "frozen": frozen,
        "v_ratio": V_RATIO.get(strategy, 1.0005),
        "bytes_by_slot": {slot: n * 800_000 for slot, n in slots.items() if n},
        "bytes_per_param": float(size),
    }


def table_row(strategy: str, seeds: int) -> dict[str, Any]:
    share = KEEPS.get(strategy, 0.9)
    return {
        "strategy": strategy,
        "val_loss": 2.9 - 0.6 * share,
        "difference": 0.6 * (1 - share),
        "kept": share,
        "difference_spread": 0.0012 if seeds > 1 else None,
        "edq_ratio": share,
        "lost": 1 - share,
        "frozen": 14 if strategy == "bf16" else 0,
        "v_ratio": V_RATIO.get(strategy, 1.0001),
        "bytes_per_param": float(BYTES.get(strategy, 12)),
        "peak_memory_bytes": 1_234_567_890,
        "optimizer_ms": 12.34,
        "tokens_per_s": 5432.1,
    }


def comparison(
    strategies: tuple[str, ...] = DEFAULT,
    seeds: int = 1,
    points: int = 60,
    regime: str = "finetune",
    layers: tuple[str, ...] = LAYERS,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A summary and its metrics."""
    steps, every = 300, max(1, 300 // points)
    frozen = [f"transformer.h.{i}.ln_{k}.{part}" for i in range(3) for k in (1, 2) for part in ("weight", "bias")]
    summary = {
        "title": "Fine-tuning a tiny GPT",
        "command": "collage compare --finetune --lr 1e-5",
        "version": "0.1.0",
        "machine": {"cpu": "Some CPU, 2 cores", "torch": "2.9.0"},
        "created": "2026-01-02 03:04",
        "regime": regime,
        "model": "gpt tiny",
        "parameters": 800_000,
        "steps": steps,
        "tokens_per_step": 1024,
        "lr": 1e-5,
        "seeds": list(range(seeds)),
        "strategies": list(strategies),
        "initial_loss": 2.9,
        "runs": [run(s, seed, frozen if s == "bf16" else []) for s in strategies for seed in range(seeds)],
        "table": [table_row(s, seeds) for s in strategies],
        "floors": {
            "bf16": {"up": 2**-8, "down": 2**-9},
            "bf16x2": {"up": 2**-17, "down": 2**-18},
            "bf16x2:sr": {"up": 2**-32, "down": 2**-33},
            "bf16+fp32": {"up": 2**-24, "down": 2**-25},
            "fp32": {"up": 2**-24, "down": 2**-25},
            "bf16+kahan": {"up": 2**-16, "down": 2**-17},
            "bf16:sr": {"up": None, "down": 0.0},
        },
        "advice": "Use collage-plus: 12 bytes per parameter, EDQ ratio 0.9982, nothing to see against <fp32-master>.",
        "update_histogram": {
            "edges": [k / 2 for k in range(-60, 13)],
            "counts": [round(1e5 * math.exp(-(((k + 20) / 10) ** 2))) for k in range(-60, 12)],
        },
        "caveats": ["Byte-level tokens, one text."],
    }
    metrics = [
        train_record(s, seed, step, steps, layers)
        for s in strategies
        for seed in range(seeds)
        for step in range(1, steps + 1, every)
    ]
    for s in strategies:
        for seed in range(seeds):
            for step in range(every, steps + 1, every):
                learnt = 0.6 * KEEPS.get(s, 0.8) * (1 - math.exp(-3 * step / steps)) / (1 - math.exp(-3))
                metrics.append(
                    {"kind": "eval", "strategy": s, "seed": seed, "step": step, "loss": 2.9 - learnt + 0.01 * seed}
                )
    return summary, metrics


def write(out: Path, summary: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """The page of these files."""
    (out / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (out / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics), encoding="utf-8")
    page = write_report(out)
    assert page == out / "report.html"
    return page.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Images and tables of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.tables: list[list[list[str]]] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.links += [values[name] or "" for name in ("src", "srcset", "href") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self._cell = True
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data

    def row(self, strategy: str) -> dict[str, str]:
        """heading -> cell of the first table."""
        header, *rows = self.tables[0]
        (row,) = [row for row in rows if row[0] == strategy]
        return dict(zip(header, row, strict=True))


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("default")
    return out, write(out, *comparison())


def images(page: str) -> list[dict[str, str | None]]:
    return Page(page).images


def test_every_plot_is_in_the_page_and_beside_it(default: tuple[Path, str]) -> None:
    out, page = default
    files = {path.name for path in (out / "plots").iterdir()}
    assert files == {f"{plot.name}.png" for plot in PLOTS} | {"headline-dark.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (out / "plots").iterdir())
    assert len(images(page)) == len(PLOTS)
    for image in images(page):
        svg = base64.b64decode((image["src"] or "").removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in svg
        assert len(image["alt"] or "") > 40


def test_page_needs_no_network_and_no_script(default: tuple[Path, str]) -> None:
    _, html = default
    page = Page(html)
    assert "http" not in html
    assert "url(" not in html
    assert not page.tags & {"script", "link", "iframe"}
    assert page.links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)


def test_page_says_what_was_run_and_what_it_does_not_show(default: tuple[Path, str]) -> None:
    _, page = default
    assert page.count("What this run does not show") == len(PLOTS)
    assert page.count("collage compare --finetune --lr 1e-5") == len(PLOTS) + 1
    assert "nothing to see against &lt;fp32-master&gt;." in page, "text is escaped"
    assert "Byte-level tokens, one text." in page
    assert "they say nothing about a GPU" in page
    assert "transformer.h.2.ln_2.bias" in page, "every frozen parameter is named"
    titles = [image["alt"] or "" for image in images(page)]
    assert "collage-plus keeps 99.8 % of fp32-master's gain, bf16 keeps 7 %" in titles[0]
    assert any("bf16 loses 93 % of its updates, and 12 of its parameters never move" in title for title in titles)


def test_numbers_come_from_the_summary(default: tuple[Path, str], tmp_path: Path) -> None:
    summary, metrics = comparison(points=3)
    row = next(row for row in summary["table"] if row["strategy"] == "collage-plus")
    row |= {"val_loss": 1.23456, "difference": -0.04567, "difference_spread": 0.0089, "kept": 0.875, "lost": 0.0004}
    row |= {"edq_ratio": 0.99991, "frozen": 7, "bytes_per_param": 13.5, "peak_memory_bytes": 3 * 2**20}
    row |= {"optimizer_ms": 98.76, "tokens_per_s": 1234.5}
    before, after = Page(default[1]), Page(write(tmp_path, summary, metrics))
    assert list(after.row("collage-plus").values()) == [
        *("collage-plus", "1.2346", "−0.0457 ± 0.0089", "88 %", "0.9999", "0.04 %", "7", "1.000", "13.5"),
        *("3 MiB", "98.8", "1,234"),
    ]
    assert after.tables[0][0] == ["Strategy", *(c.heading + c.unit for c in present(COLUMNS, summary["table"]))]
    for strategy in ("bf16", "collage-light", "fp32-master"):
        assert after.row(strategy) == before.row(strategy)
    assert "collage-light keeps 99 % of fp32-master's gain" in (after.images[0]["alt"] or "")


@pytest.mark.parametrize(
    "shape",
    [
        {"seeds": 3, "regime": "scratch"},
        {"strategies": tuple(LOOKS), "layers": tuple(f"transformer.h.{i}.attn.c_attn.weight" for i in range(90))},
        {"strategies": ("bf16", "kahan", "param=bf16x2"), "regime": "scratch", "layers": ("all",)},
        {"strategies": ("fp32-master",)},
    ],
    ids=["seeds", "many", "unknown", "reference"],
)
def test_any_shape(shape: dict[str, Any], tmp_path: Path) -> None:
    page = Page(write(tmp_path, *comparison(points=2, **shape)))
    assert len(page.images) == len(PLOTS)
    assert [row[0] for row in page.tables[0][1:]] == list(shape.get("strategies", DEFAULT))


def without_numbers(value: Any) -> Any:
    """Every number in it is null."""
    if isinstance(value, dict):
        return {key: value[key] if key in ("step", "seed") else without_numbers(value[key]) for key in value}
    if isinstance(value, list):
        return [without_numbers(item) for item in value]
    return None if isinstance(value, int | float) else value


def test_nulls_survive(tmp_path: Path) -> None:
    summary, metrics = comparison(points=3)
    summary |= {"table": without_numbers(summary["table"]), "runs": without_numbers(summary["runs"])}
    summary |= {"update_histogram": None, "advice": None, "floors": {"bf16": None}}
    html = write(tmp_path, summary, without_numbers(metrics))
    page = Page(html)
    assert list(page.row("bf16").values()) == ["bf16", *[MISSING] * sum(not column.optional for column in COLUMNS)]
    assert len(page.images) == 1, "the headline alone"
    assert html.count("Not measured in this run.") == len(PLOTS) - 1
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"headline.png", "headline-dark.png"}


def test_some_nulls_survive(tmp_path: Path) -> None:
    summary, metrics = comparison(points=4)
    for i, record in enumerate(metrics):
        for j, key in enumerate(sorted(record.keys() - {"kind", "strategy", "seed", "step"})):
            if (i + j) % 3 == 0 or record["strategy"] == "bf16":
                record[key] = None
    summary["table"][0] |= {"kept": None, "difference": float("nan")}
    summary["runs"][1]["v_ratio"] = None
    assert len(images(write(tmp_path, summary, metrics))) == len(PLOTS)


def test_settings_of_the_surrounding_program_come_back(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    write(tmp_path, *comparison(points=2, strategies=("bf16",)))
    assert dict(matplotlib.rcParams) == before


def test_looks_are_distinct() -> None:
    names = [*LOOKS, *(f"other {i}" for i in range(4))]
    for theme in (LIGHT, DARK):
        assert len({look(names, name, theme) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1.0, "100 %"),
        (0.9982, "99.8 %"),
        (0.99994, "99.99 %"),
        (0.999999, ">99.99 %"),
        (0.07, "7 %"),
        (0.004, "0.4 %"),
        (0.00001, "<0.01 %"),
        (0.0, "0 %"),
        (-0.31, "−31 %"),
        (1.27, "127 %"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize("width", [200, 150, 100, 90])
def test_the_terminal_shows_the_same_numbers_whole(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    summary, _ = comparison()
    print_comparison(Console(width=width), summary)
    told = capsys.readouterr().out
    for row in summary["table"]:
        assert all(column.cell(row) in told for column in present(COLUMNS, [row]))
    assert "…" not in told
    assert max(map(len, told.splitlines()[:15])) <= width


def test_labels_keep_their_distance() -> None:
    wanted = [0.5, 0.5, 0.1, 0.52, 1.0]
    places = spread(wanted, gap=0.1)
    ordered = sorted(places)
    assert all(b - a >= 0.1 - 1e-12 for a, b in pairwise(ordered))
    assert (min(places), max(places)) == (0.1, 1.0)
    assert places[0] < places[1] < places[3], "a stable order"
    assert spread([], gap=0.1) == []
    assert spread([0.0, 0.0], gap=0.1) == pytest.approx([0.0, 0.1])


def test_arithmetic_of_the_plots() -> None:
    assert mean({0: [(1, 2.0), (2, 4.0)], 1: [(1, 4.0)]}) == [(1, 3.0), (2, 4.0)]
    assert smooth([(1, 0.0), (2, 3.0), (3, 6.0)], 3) == [(1, 1.5), (2, 3.0), (3, 4.5)]
    assert edges([1.0, 11.0, 41.0]) == [-4.0, 6.0, 26.0, 56.0]
    assert edges([7.0]) == [6.5, 7.5]
    assert below([-2.0, 0.0, 2.0], [3.0, 1.0], floor=-1.0) == 1.5 / 4
    assert below([-2.0, 0.0, 2.0], [3.0, 1.0], floor=5.0) == 1.0
    slots = ["param", "exp_avg", "exp_avg_sq", "param_lo", "exp_avg_sq_lo"]
    assert by_family(slots) == ["param", "param_lo", "exp_avg", "exp_avg_sq", "exp_avg_sq_lo"]
    assert balanced("one two three four", 12) == ["one two", "three four"]
