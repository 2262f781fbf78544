"""What `collage plan` prints, and the same as a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console
from torch import nn

from collage.harness.console import print_table, say
from collage.harness.ledger import COPIES
from collage.harness.plan.measure import Beside
from collage.harness.plan.predict import Prediction
from collage.harness.plan.simulation import Work
from collage.harness.text import Column, fixed, percent, size

FITS = {2.0: "yes", 1.0: "released", 0.0: "no"}

PARTS = (
    Column("weights", "weights", "", size),
    Column("states", "states", "", size),
    Column("gradients", "gradients", "", size),
    Column("activations", "activations", "", size, optional=True),
    Column("copies", "gathered", "or cast", size, optional=True),
    Column("peak", "peak", "", size),
    Column("released", "peak if", "released", size),
    Column("fits", "fits", "", lambda value: FITS.get(value or 0.0, "no"), optional=True),
)
MEASURED = (
    Column("predicted", "predicted", "peak", size),
    Column("measured", "measured", "peak", size),
    Column("off", "predicted", "÷ measured", percent),
    Column("lax", "with what", "glibc keeps", size),
    Column("seconds", "seconds", "a step", partial(fixed, digits=2)),
    Column("optimizer", "of it", "optimizer", partial(fixed, digits=2)),
)


@dataclass(frozen=True)
class Plan:
    """All that was predicted."""

    model: str
    optimizer: str
    parameters: int
    work: Work
    memory: int | None
    predictions: Sequence[Prediction]


def count(model: nn.Module) -> int:
    """Its parameters, tied ones once."""
    return sum(param.numel() for param in model.parameters())


def show(plan: Plan, screen: Console) -> None:
    """The table of what was predicted, and how to read it."""
    print_table(screen, _title(plan), PARTS, {p.strategy: _row(p, plan) for p in plan.predictions if not p.released})
    for line in _reading(plan):
        say(screen, line)


def _title(plan: Plan) -> str:
    work = plan.work
    of = f"{work.sequences} sequence{'s' * (work.sequences > 1)} of {work.length:,} tokens, computed in "
    done = f"{of}{str(work.compute).removeprefix('torch.')}" if work.sequences else "no forward pass"
    shared = f", each of {work.ranks} ranks under FSDP2" if work.ranks > 1 else ""
    return f"{plan.model}: {plan.parameters:,} parameters, {plan.optimizer}, {done}{shared}"


def _row(prediction: Prediction, plan: Plan) -> dict[str, Any]:
    released = next(p for p in plan.predictions if p.released and p.strategy == prediction.strategy).peak
    row = {
        "weights": prediction.weights, "states": prediction.states, "gradients": prediction.gradients,
        "peak": prediction.peak, "released": released,
    }  # fmt: skip
    if plan.work.sequences:
        row["activations"] = prediction.activations
    if prediction.at_peak[COPIES]:
        row["copies"] = prediction.at_peak[COPIES]
    if plan.memory is not None:
        row["fits"] = 2 if prediction.peak <= plan.memory else int(released <= plan.memory)
    return row


def _reading(plan: Plan) -> list[str]:
    lines = [
        "peak: the most that is in use at a time. Gradients come while activations go, so it may be less than the sum; "
        "logits and other temporary results are in it.",
        "peak if released: with collage.release_gradients(model, opt), which frees each gradient as backward gives it.",
    ]
    if plan.memory is not None:
        lines.append(f"fits: into {size(plan.memory)}. Python, torch and what allocators keep come on top.")
    if not plan.work.sequences:
        lines.append("Activations are not in it: they need a forward pass.")
    return lines


def show_measured(beside: Sequence[Beside], screen: Console) -> None:
    """The table of what was measured, and what was not."""
    rows = {_label(b.prediction): _measured_row(b) for b in beside if b.strict}
    if rows:
        print_table(screen, "Measured here", MEASURED, rows)
        say(
            screen,
            "measured peak: what the process held beyond its libraries, the allocator returning what is freed. "
            "Seconds: medians, the allocator left alone; so is the last peak.",
        )
    for b in beside:
        if not b.strict:
            say(screen, f"not measured: {_label(b.prediction)}: {b.why}", "yellow")


def _label(prediction: Prediction) -> str:
    return prediction.strategy + ", released" * prediction.released


def _measured_row(beside: Beside) -> dict[str, Any]:
    strict, lax, predicted = beside.strict, beside.lax, beside.prediction.peak
    assert strict is not None
    assert lax is not None
    return {
        "predicted": predicted,
        "measured": strict.peak,
        "off": predicted / strict.peak if strict.peak > 0 else None,
        "lax": lax.peak,
        "seconds": lax.seconds,
        "optimizer": lax.optimizer_seconds,
    }


def to_dict(plan: Plan, beside: Sequence[Beside]) -> dict[str, Any]:
    """Every number, ready for JSON."""
    work = {**asdict(plan.work), "compute": str(plan.work.compute).removeprefix("torch.")}
    return {
        "model": plan.model, "parameters": plan.parameters, "optimizer": plan.optimizer, "memory": plan.memory, **work,
        "predictions": [prediction.to_dict() for prediction in plan.predictions],
        "measured": [
            {"strategy": b.prediction.strategy, "released": b.prediction.released, "why_not": b.why or None,
             "strict": b.strict and asdict(b.strict), "lax": b.lax and asdict(b.lax)}
            for b in beside
        ],
    }  # fmt: skip
