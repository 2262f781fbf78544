"""What `collage convert` prints: a row for each slot and pair of formats, and what to do next."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from collage.harness.console import print_table, say
from collage.harness.convert.converting import STATE, Done
from collage.harness.convert.sources import Source
from collage.harness.convert.targets import Target
from collage.harness.text import Column, fixed, percent

COLUMNS = (
    Column("numbers", "numbers", "", partial(fixed, digits=0)),
    Column("rounded", "rounded", "", percent),
    Column("largest", "max", "ulp", partial(fixed, digits=2)),
    Column("rms", "rms", "ulp", partial(fixed, digits=3)),
)


def rows(done: Done) -> dict[str, dict[str, Any]]:
    """A row for each slot and pair of formats."""
    return {
        f"{slot} {source} → {target}": {
            "slot": slot, "from": source, "to": target, "numbers": lost.numbers,
            "rounded": lost.changed / lost.numbers if lost.numbers else 0.0, "largest": lost.largest, "rms": lost.rms,
        }
        for (slot, source, target), lost in done.report.slots.items()
    }  # fmt: skip


def show(done: Done, source: Source, target: Target, out: Path, screen: Console) -> None:
    """The table, what was left as it is, and how to load what was written."""
    found = rows(done)
    print_table(screen, f"Converted to {target.name}, after {done.step} steps", COLUMNS, found, "slot, from → to")
    if not any(row["rounded"] for row in found.values()):
        say(screen, "Nothing was rounded.")
    if done.left:
        rest = f"and {len(done.left) - 1} more, " if done.left[1:] else ""
        say(screen, f"Left as it was: '{done.left[0]}', {rest}which the optimizer does not train")
    for line in next_steps(done, source, target, out):
        say(screen, line)


def next_steps(done: Done, source: Source, target: Target, out: Path) -> list[str]:
    """How to go on with what was written."""
    if source.checkpoint is not None and target.is_ours:
        return [
            f"Go on with: collage train --strategy {target.name} --out {out} --resume (and the run's other options)"
        ]
    if not done.wrote_state:
        return [f"Weights: {out}"]
    return [f"Weights: {out}; opt.load_state_dict(torch.load('{out / STATE}')) after them"]


def to_dict(done: Done, target: Target) -> dict[str, Any]:
    """Every number, ready for JSON."""
    return {"to": target.name, "step": done.step, "slots": list(rows(done).values()), "left": done.left}
