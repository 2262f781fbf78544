"""The advice, judged: what `collage.advise` says before runs, beside what became of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from collage.advised.words import LOSES, SAFE
from collage.advised.words import UNKNOWN as UNSURE
from collage.harness.report.pairs import Run, difference
from collage.harness.report.results import REFERENCE
from collage.harness.sweep.losing import KEPT, UNKNOWN, measures, state
from collage.harness.sweep.store import Stored
from collage.harness.tasks.registry import get_task
from collage.harness.text import MISSING, fixed, short, to_json
from collage.harness.train.checkpoints import write_whole

VERDICTS = (SAFE, LOSES, UNSURE)
_SHOWN = ("task", "model", "lr", "betas", "weight_decay", "steps")  # of a cell: what the advice is asked with

Record = dict[str, Any]
Ask = Callable[[Stored], Mapping[str, str]]  # of a run: strategy -> verdict, for runs that start as it does


def judge(stored: Iterable[Stored], ask: Ask) -> list[Record]:
    """A record for each strategy and setting that runs were made of, beside the reference's on the same seeds."""
    cells: dict[str, list[Stored]] = {}
    for one in stored:
        cells.setdefault(_cell(one), []).append(one)
    return [record for runs in cells.values() for record in _judged(runs, ask)]


def _cell(one: Stored) -> str:
    """All that a run was asked for, but for strategy and seed."""
    start = {k: v for k, v in (one.asked.start or {}).items() if k != "seed"}
    settings = {k: v for k, v in one.asked.settings.items() if k not in ("strategy", "seed")}
    return json.dumps([one.asked.task, settings, start], sort_keys=True)


def _judged(stored: Sequence[Stored], ask: Ask) -> list[Record]:
    runs = [one.run for one in stored]
    first = next((one for one in stored if one.run["strategy"] == REFERENCE), None)
    if first is None:
        return []
    verdicts, settings = ask(first), first.asked.settings
    about = {"task": first.asked.task, "seed": settings.get("seed"), **{key: settings.get(key) for key in _SHOWN[1:]}}
    names = dict.fromkeys(run["strategy"] for run in runs if run["strategy"] != REFERENCE)
    found = [(name, _outcome(first.asked.task, name, runs)) for name in names]
    return [
        {**about, "strategy": name, "verdict": verdicts[name], **outcome}
        for name, outcome in found
        if outcome["outcome"] != UNKNOWN
    ]


def _outcome(task: str, strategy: str, runs: Sequence[Run]) -> Record:
    """What became of a strategy, by what its task is judged by."""
    mine, reference = ([run for run in runs if run["strategy"] == name] for name in (strategy, REFERENCE))
    measure = measures(get_task(task))[0]
    found = difference(strategy, runs, measure.key)
    return {"seeds": len(mine), "difference": found.mean, "outcome": state(mine, reference, found, measure)}


def read(path: Path) -> list[Record]:
    """The records of a file; none if it is not there."""
    return list(json.loads(path.read_text(encoding="utf-8"))["cells"]) if path.exists() else []


def write(records: Sequence[Record], path: Path) -> None:
    """A line for each."""
    lines = ",\n".join(to_json(record).strip() for record in records)
    write_whole(path, f'{{"cells": [\n{lines}\n]}}\n')


def confusion(records: Iterable[Record]) -> dict[str, Counter[bool]]:
    """Verdict -> how many of its strategies lost, and how many did not."""
    counts: dict[str, Counter[bool]] = {verdict: Counter() for verdict in VERDICTS}
    for record in records:
        counts[record["verdict"]][record["outcome"] != KEPT] += 1
    return counts


def text(records: Sequence[Record]) -> str:
    """The section of the page."""
    head = "## The advice, judged\n\n"
    if not records:
        return f"{head}Not judged yet.\n"
    counts = confusion(records)
    rows = [f"| {verdict} | {found[False]} | {found[True]} |" for verdict, found in counts.items()]
    table = "\n".join(["| `collage advise` says | lost nothing | lost, or diverged |", "|---|---:|---:|", *rows])
    told = (
        f"{len(records)} runs that the advice does not rest on, each beside `{REFERENCE}` on the same seed, asked of\n"
        f"the weights they began with. Called safe: {counts[SAFE].total()}, of which {counts[SAFE][True]} lost. "
        f"Said to lose: {counts[LOSES].total()},\nof which {counts[LOSES][False]} did not. Not known: "
        f"{counts[UNSURE].total()}."
    )
    wrong = [f"* Called safe, and lost: {_named(r)}." for r in records if r["verdict"] == SAFE and r["outcome"] != KEPT]
    listed = "".join(f"{line}\n" for line in ["", *wrong] if wrong)
    return f"{head}{told}\n\n{table}\n{listed}\n{_settings(records)}"


def _settings(records: Sequence[Record]) -> str:
    """A line for each setting: the worst of what was called safe there, and what was said to lose."""
    cells: dict[str, list[Record]] = {}
    for record in records:
        asked = (record["task"], record["model"], *(_word(record[key]) for key in _SHOWN[2:]), str(record["seed"]))
        cells.setdefault(" | ".join(asked), []).append(record)
    head = "| task | model | lr | β₁ β₂ | decay | steps | seed | safe, at worst | said to lose |"
    rows = [f"| {asked} | {_worst(own)} | {_losers(own)} |" for asked, own in cells.items()]
    return "\n".join([head, "|---|---|---:|---|---:|---:|---:|---|---|", *rows, ""])


def _worst(records: Sequence[Record]) -> str:
    safe = [record for record in records if record["verdict"] == SAFE]
    if not safe:
        return MISSING
    worst = max(safe, key=lambda record: abs(record["difference"] or 0.0))
    return f"{len(safe)}: {worst['strategy']} {fixed(worst['difference'], 4, '+')}"


def _losers(records: Sequence[Record]) -> str:
    found = [f"{r['strategy']} {fixed(r['difference'], 4, '+')}" for r in records if r["verdict"] == LOSES]
    return ", ".join(found) or MISSING


def _named(record: Record) -> str:
    asked = ", ".join(f"{key} {_word(record[key])}" for key in _SHOWN[2:] if record[key] is not None)
    return f"{record['strategy']} on {record['task']} ({record['model']}) at {asked}"


def _word(value: Any) -> str:
    return " ".join(map(_word, value)) if isinstance(value, list) else short(value, 6)
