"""What `collage preflight` prints: two tables and a verdict, and the same as a dictionary."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from collage.advice.counting import Tally
from collage.floors import THETA_FORMATS, decay_floor, floor, register_of
from collage.harness.console import say
from collage.harness.preflight.examine import Preflight
from collage.harness.text import listed, percent, scientific, short
from collage.strategies import STRATEGIES

NAMES = {"embedding": "embedding", "attention": "attention", "mlp": "mlp", "norm": "norm weights", "bias": "biases",
         "head": "head", "other": "other"}  # fmt: skip


def show(found: Preflight, console: Console) -> None:
    """Print the tables, then what was left out, then the verdict."""
    say(console, f"Weights of {found.model} that a step of {short(found.lr)} cannot move", "bold")
    console.print(_shares(found))
    say(console, "Floors: what is dropped when it comes again and again", "bold")
    console.print(_floors(found))
    say(console, "A decay lr × wd below the first number moves no weight, above the second it moves every weight.")
    for line in _left_out(found):
        say(console, line)
    say(console, "")
    for line in verdict(found):
        say(console, line, "bold")


def verdict(found: Preflight) -> list[str]:
    """What the counts say, in sentences: the step, the decay, the norm weights that are still exactly 1.0."""
    total, norm = found.total, found.kinds.get("norm", Tally())
    lines = [f"A step of {short(found.lr)} cannot move {share(total.stuck['bf16'], total.weights)} of the weights in "
             f"bf16; bf16x2 loses {share(total.stuck['bf16x2'], total.weights)}."]  # fmt: skip
    if found.weight_decay:
        lines.append(_verdict_on_decay(found, total))
    if norm.exactly_one:
        stays = found.lr <= floor("bf16").down
        lines.append(f"{norm.exactly_one:,} of {norm.weights:,} norm weights are still exactly 1.0, where they began"
                     f"{', and stay there in bf16' if stays else ''}.")  # fmt: skip
    return lines


def _verdict_on_decay(found: Preflight, total: Tally) -> str:
    w = f"A decay of {short(found.lr)} × {short(found.weight_decay)} = {short(found.lr * found.weight_decay)} per step"
    dead = [name for name in THETA_FORMATS if total.undecayed[name] == total.nonzero]
    partly = [name for name in THETA_FORMATS if 0 < total.undecayed[name] < total.nonzero]
    said = [f"comes to nothing in {listed(dead)}"] if dead else []
    said += [f"reaches only a part of the weights in {listed(partly)}"] if partly else []
    return f"{w} {' and '.join(said) or 'reaches every weight in every format'}."


def _left_out(found: Preflight) -> list[str]:
    lines = []
    if found.skipped_tensors:
        lines.append(f"Skipped: {found.skipped_tensors} tensor(s), {found.skipped_values:,} values: integer, "
                     "8-bit or quantised, or buffers; no optimizer updates them.")  # fmt: skip
    if found.not_finite:
        lines.append(f"Left out: {found.not_finite:,} weights that are Inf or NaN.")
    return lines


def _shares(found: Preflight) -> Table:
    """Kinds of layers x formats; formats that agree in every row share a column."""
    rows = {NAMES[kind]: tally for kind, tally in found.kinds.items()}
    if len(rows) > 1:
        rows["all"] = found.total
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("kind of layer")
    table.add_column("weights", justify="right")
    columns: dict[tuple[int, ...], list[str]] = {}
    for name in THETA_FORMATS:
        columns.setdefault(tuple(tally.stuck[name] for tally in rows.values()), []).append(name)
    for names in columns.values():
        table.add_column("\n".join(names), justify="right")
    for i, (kind, tally) in enumerate(rows.items()):
        cells = (_colored(column[i], tally.weights) for column in columns)
        table.add_row(kind, f"{tally.weights:,}", *cells, end_section=i == len(rows) - 2)
    return table


def _floors(found: Preflight) -> Table:
    """Formats x the step at 1.0 and the decay that each drops."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("weights in", no_wrap=True)
    table.add_column("strategies", min_width=max(map(len, STRATEGIES)))
    table.add_column("step at 1.0,\ndown … up", justify="right", no_wrap=True)
    table.add_column("decay lr × wd", justify="right", no_wrap=True)
    if found.weight_decay:
        table.add_column(f"not decayed\nby {short(found.lr * found.weight_decay)}", justify="right", no_wrap=True)
    total = found.total
    for name in THETA_FORMATS:
        step, decay = floor(name), decay_floor(name)
        users = [key for key, s in STRATEGIES.items() if s.param == name and s.register == register_of(name)]
        row = [
            name,
            ", ".join(users),
            f"{scientific(step.down)} … {scientific(step.up)}",
            f"{scientific(decay.every)} … {scientific(decay.some)}",
        ]
        table.add_row(*row, *([_colored(total.undecayed[name], total.nonzero)] if found.weight_decay else []))
    return table


def _colored(count: int, of: int) -> str:
    fraction = count / of if of else 0.0
    color = "green" if fraction < 0.01 else "yellow" if fraction < 0.1 else "red"
    return f"[{color}]{share(count, of)}[/]"


def share(count: int, of: int) -> str:
    """A percentage of the weights."""
    return percent(count / of if of else None, least=1)


def to_dict(found: Preflight) -> dict[str, Any]:
    """Every number, ready for JSON."""

    def counted(tally: Tally) -> dict[str, Any]:
        entry: dict[str, Any] = {"weights": tally.weights, "cannot_move": _fractions(tally.stuck, tally.weights)}
        if found.weight_decay:
            entry["not_decayed"] = _fractions(tally.undecayed, tally.nonzero)
        return entry

    kinds = {kind: counted(tally) for kind, tally in found.kinds.items()}
    if "norm" in kinds:
        kinds["norm"]["exactly_one"] = found.kinds["norm"].exactly_one
    return {
        "model": str(found.model),
        "lr": found.lr,
        "weight_decay": found.weight_decay,
        "total": counted(found.total),
        "kinds": kinds,
        "floors": {name: floor(name)._asdict() for name in THETA_FORMATS},
        "decay_floors": {name: decay_floor(name)._asdict() for name in THETA_FORMATS},
        "skipped": {"tensors": found.skipped_tensors, "values": found.skipped_values},
        "not_finite": found.not_finite,
        "verdict": verdict(found),
    }


def _fractions(counts: dict[str, int], of: int) -> dict[str, float | None]:
    return {name: count / of if of else None for name, count in counts.items()}
