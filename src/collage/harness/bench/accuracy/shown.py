"""What `collage bench --accuracy` prints: a table for each number that a format may lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console

from collage.harness.bench.accuracy.entries import MOMENTS
from collage.harness.bench.accuracy.moments import BETAS, OUTLIERS
from collage.harness.bench.accuracy.weights import CONSTANT, INCREMENTS, LRS, NOISY, STARTS, constant, noisy
from collage.harness.console import print_table, say
from collage.harness.text import Column, fixed, scientific, short


class Share(Column):
    """A share that is kept, with its spread over weights where there is some."""

    def cell(self, row: Mapping[str, Any]) -> str:
        mean, spread = row.get(self.key), row.get(self.spread) or 0.0
        return self.text(mean) if spread < 0.005 else f"{fixed(mean, 2)}±{fixed(spread, 2).removeprefix('0')}"


def ratio(value: float | None) -> str:
    """Stored / true.

    >>> ratio(0.996), ratio(100.38)
    ('1.00', '100')
    """
    return fixed(value, 2 if value is None or value < 10 else 0)


def lost(value: float | None) -> str:
    """An error, or an update, of any magnitude.

    >>> lost(0.00551), lost(0.000181), lost(1.034), lost(42469.2)
    ('0.0055', '1.8e-4', '1.0', '42,469')
    """
    if value is None or value >= 1:
        return fixed(value, 0 if value is None or value >= 10 else 1)
    return f"{value:#.2g}" if value >= 1e-3 else scientific(value)


def increments(start: float, sizes: Sequence[float]) -> tuple[Column, ...]:
    """Columns of the shares kept of increments away from zero and towards it."""
    return tuple(
        Share(
            key := constant(start, sign * size),
            f"{start:g} {'+' if sign > 0 else '−'}",
            short(size),
            partial(fixed, digits=3),
            spread=f"{key} sd",
        )
        for size in sizes
        for sign in (1, -1)
    )


LAST = f"{BETAS[-1][1]:g}"
MATES = tuple((f"mates {k:g}", f"{k:,.0f}×") for k in OUTLIERS)
BYTES, MOMENTUM_BYTES, VARIANCE_BYTES = (
    Column(key, "bytes", "", short) for key in ("bytes", "momentum bytes", "variance bytes")
)
WEIGHTS = (
    BYTES,
    *(Column(noisy(lr), "error", scientific(lr).replace(".0", ""), lost) for lr in LRS),
    *increments(STARTS[0], INCREMENTS[:2]),
)
SMALL = (BYTES, *increments(STARTS[1], INCREMENTS))
VARIANCE = (
    VARIANCE_BYTES,
    *(Column(f"v dense {beta:g}", f"{beta:g}"[1:], "", ratio) for _, beta in BETAS),
    *(Column(f"v dense {beta:g} dropped", f"{beta:g}"[1:], "÷10", ratio) for _, beta in BETAS[3:]),
)
SPARSE = (
    VARIANCE_BYTES,
    *(
        Column(f"v {scenario} {LAST}{' dropped' if unit else ''}", heading, unit, ratio)
        for scenario, heading in (("sparse rows", "rows"), ("sparse", "some"), ("mixed", "mixed"), MATES[0])
        for unit in ("", "÷10")
    ),
)
MOMENTUM = (
    MOMENTUM_BYTES,
    *(Column(f"m constant {b2:g}", f"{b1:g}"[1:], "", partial(fixed, digits=3)) for b1, b2 in BETAS[:3]),
    Column(f"m error dense {LAST}", "error", "", lost),
    *(Column(f"m error {scenario} {LAST}", "error", size, lost) for scenario, size in MATES),
)
CASES = (("dense", "dense"), ("sparse rows", "rows"), ("mixed", "mixed"), *MATES)
UPDATES = (
    BYTES,
    *(Column(f"error dense {beta}", "dense", beta[1:], lost) for beta in ("0.95", LAST)),
    *(Column(f"error {scenario} {LAST}", heading, "", lost) for scenario, heading in CASES[1:]),
)
LARGEST = (BYTES, *(Column(f"largest {scenario} {LAST}", heading, "", lost) for scenario, heading in CASES))


def show(result: Mapping[str, Any], screen: Console) -> None:
    """All tables, and how to get what is missing."""
    for title, columns, rows in tables(result):
        print_table(screen, title, columns, rows)
    for name, reason in result["missing"].items():
        say(screen, f"{name}: {reason}", "yellow")


def tables(result: Mapping[str, Any]) -> list[tuple[str, Sequence[Column], dict[str, Mapping[str, Any]]]]:
    """(title, columns, rows) of each."""
    weights, pairs = _named(result, "weights"), _named(result, "moments")
    m, v = (_named(result, "moments", role) for role in MOMENTS)
    updates, kept = f"{NOISY:,} noisy updates", f"share kept of {CONSTANT:,} increments"
    return [
        (f"Weights: error / movement of {updates}; {kept} at 1", WEIGHTS, weights),
        (f"Weights at 0.02: {kept}", SMALL, weights),
        ("v: stored / true by β₂, steady, and after gradients became a tenth (÷10)", VARIANCE, v),
        (f"v at β₂ {LAST}: 9 of 10 gradients 0 (rows, some elements), mixed sizes, beside larger ones", SPARSE, v),
        ("m: stored / true of constant gradients by β₁; rms error / rms at β₁ 0.9, beside larger ones", MOMENTUM, m),
        (f"Updates m/√v: rms error / rms; all but the first at β₂ {LAST}, as above", UPDATES, pairs),
        (f"The largest of the updates at β₂ {LAST} (times lr; float32's are true)", LARGEST, pairs),
    ]


def _named(result: Mapping[str, Any], rows: str, role: str = "") -> dict[str, Mapping[str, Any]]:
    """By name; by format of a role: one row of each, by its bytes, other packages' at the end."""
    found = result[rows]
    if role:
        found = sorted(found, key=lambda row: (not row["ours"], row[f"{role} bytes"]))
    missing = result["missing"]
    return {row[role or "name"] + ": not measured" * (row["name"] in missing): row for row in found}
