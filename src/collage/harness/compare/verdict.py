"""What a comparison's runs say together: the table, paired by seed, and one sentence of advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from collage.harness.machine import PLAIN
from collage.harness.report.pairs import Run, by_seed, deviation, difference, diverged, mean, pairs
from collage.harness.report.results import REFERENCE
from collage.harness.text import fixed, short
from collage.saying import several
from collage.strategies import Strategy

Row = dict[str, Any]

WHOLE = 0.999  # EDQ ratio
V_TOLERANCE = 0.01  # of v over its shadow
_MEANS = (
    "val_loss", "initial_loss", "score", "initial_score", "edq_ratio", "edq_visible", "edq", "lost", "v_ratio",
    "m_error", "edq_shadow", "rescaled", "saturated", "bytes_per_param", "state_bytes", "optimizer_ms", "tokens_per_s",
    "mismatch",
)  # fmt: skip


def table(strategies: Sequence[str], runs: Sequence[Run]) -> list[Row]:
    """A row per strategy: means over seeds, and the differences to fp32-master on the same seed and batches."""
    return [_row(strategy, runs) for strategy in strategies]


def _row(strategy: str, runs: Sequence[Run]) -> Row:
    mine = by_seed(strategy, runs).values()
    loss, score = (difference(strategy, runs, key) for key in ("val_loss", "score"))
    return {
        "strategy": strategy,
        **{key: mean(run[key] for run in mine) for key in _MEANS},
        "difference": loss.mean,
        "difference_spread": loss.spread,
        "score_difference": score.mean,
        "score_spread": score.spread,
        "kept": _kept(pairs(strategy, runs)),
        "frozen": len({name for run in mine for name in run["frozen"]}),
        "peak_memory_bytes": mean(run["peak_device_bytes"] or run["peak_rss_bytes"] for run in mine),
    }


def _kept(both: Sequence[tuple[Run, Run]]) -> float | None:
    """Share of fp32-master's improvement; None if it has not improved."""
    gains = [tuple(run["initial_loss"] - run["val_loss"] for run in pair) for pair in both]
    whole = sum(reference for _, reference in gains)
    return sum(gain for gain, _ in gains) / whole if whole > 0 else None


def seeds_noise(runs: Sequence[Run]) -> float | None:
    """Standard deviation of fp32-master's validation loss over seeds: what another seed alone changes."""
    return deviation(run["val_loss"] for run in by_seed(REFERENCE, runs).values() if not diverged(run))


def advice(rows: Sequence[Row], runs: Sequence[Run], steps: int, beta2: float | None) -> str:
    """The cheapest strategy that loses nothing that could be seen here, or why there is none; and what was not seen.

    beta2: None where the optimizer has no second moment.
    """
    gone = [row["strategy"] for row in rows if diverged(row)]
    if len(gone) == len(rows):
        return "All of these strategies diverged (no finite validation loss): nothing to recommend; lower --lr."
    noise = seeds_noise(runs)
    followed = any(row["v_ratio"] is not None for row in rows)
    fit = [row for row in rows if not diverged(row) and _whole(row, followed) and _within(row, noise)]
    parts = [
        _recommended(fit, rows, noise, beta2 is not None) if fit else _none_fits(followed, beta2 is not None),
        f"Diverged (validation loss not finite): {', '.join(gone)}." if gone else "",
        _too_short(steps, beta2) if followed and beta2 is not None else "",
        _unknown(rows, noise),
        _ties(rows, noise),
    ]
    return " ".join(filter(None, parts))


def _recommended(fit: Sequence[Row], rows: Sequence[Row], noise: float | None, second: bool) -> str:
    best = min(fit, key=lambda row: (row["bytes_per_param"], row["optimizer_ms"] or 0.0))
    least = min(row["bytes_per_param"] for row in rows)
    cheapest = "compared here" if best["bytes_per_param"] == least else "that loses nothing seen here"
    v = "not measured" if best["v_ratio"] is None else f"{fixed(best['v_ratio'], 3)}× its shadow's"
    moment = f", second moment {v}" if second else ""
    sentence = (
        f"Use {best['strategy']}: the cheapest {cheapest}, {short(best['bytes_per_param'])} bytes per parameter, "
        f"EDQ ratio {fixed(best['edq_ratio'], 4)}{moment}"
    )
    if noise is not None and best["difference"] is not None and best["strategy"] != REFERENCE:
        sentence += (
            f", loss within {fixed(abs(best['difference']), 4)} of {REFERENCE}'s (the seeds' noise: {fixed(noise, 4)})"
        )
    return f"{sentence}."


def _none_fits(followed: bool, second: bool) -> str:
    v = " with a second moment within 1 % of its shadow" if followed else "; the second moment was not measured"
    return f"None of these strategies delivers its updates whole{v if second else ''}."


def _whole(row: Mapping[str, Any], followed: bool) -> bool:
    """Whether all of its updates arrived and, if shadows were followed at all, v is that of its own."""
    edq, v = row["edq_ratio"], row["v_ratio"]
    v_kept = not followed or (v is not None and abs(v - 1.0) <= V_TOLERANCE)
    return edq is not None and edq >= WHOLE and v_kept


def _within(row: Mapping[str, Any], noise: float | None) -> bool:
    return noise is None or row["difference"] is None or abs(row["difference"]) <= noise


def _too_short(steps: int, beta2: float) -> str:
    window = round(1 / (1 - beta2))
    if steps >= window:
        return ""
    return f"{steps} steps are too few to judge the second moment at β₂ = {short(beta2)}, an average over {window:,}."


def _unknown(rows: Sequence[Row], noise: float | None) -> str:
    """What was not compared, and how to."""
    reference = next((row for row in rows if row["strategy"] == REFERENCE), None)
    if reference is None:
        return f"Losses were not judged: add {REFERENCE} to --strategies, the reference of all others."
    if noise is None and not diverged(reference):
        return "One seed cannot show which differences in loss are noise: add --seeds 3."
    return ""


def _ties(rows: Sequence[Row], noise: float | None) -> str:
    """That e4m3 weights ended lower than float32 masters, which is no merit of theirs."""
    codes = [row for row in rows if Strategy.parse(row["strategy"]).dtype.itemsize == 1]
    below = [row["strategy"] for row in codes if (row["difference"] or 0.0) < -(noise or 0.0)]
    if not below:
        return ""
    return (
        f"Below {REFERENCE}, which is no merit: {', '.join(below)}; e4m3 weights cut from bfloat16 ones begin with "
        'ties that the first updates break (docs/fp8.md, "Ties").'
    )


def caveats(
    config: Any, strategies: Sequence[str], seeds: int, kernels: str, unfollowed: Sequence[str] = ()
) -> list[str]:
    """What these runs do not show. unfollowed: parameters that no shadow follows."""
    slow = "for want of compiled kernels (`collage info` says why): they rank no strategy"
    small = "at this model's size, where what surrounds a kernel counts too: `collage bench` tells what a step costs"
    found = [
        f"{config.model} for {config.steps} steps: another model, text or length may behave otherwise.",
        f"Optimizer times are of {kernels} on this machine, {slow if kernels == PLAIN else small}.",
        "Peak memory is of the whole process during a run, or of torch's allocator on a GPU: activations, and on a CPU "
        "Python and its libraries, dominate a small model.",
    ]
    exceptions = ((name, Strategy.parse(name).exception) for name in strategies)
    found += [f"Under {name} {text}; the bytes are counted with them." for name, text in exceptions if text]
    if unfollowed:
        found.append(
            f"No shadow follows {several(unfollowed)}, which step as whole matrices: of these there is what arrived, "
            "and not what their moments lost."
        )
    if seeds == 1:
        found.append("One seed: small differences in loss may be noise.")
    if REFERENCE not in strategies:
        found.append(f"Without {REFERENCE}, no paired difference and no share of its improvement.")
    return found
