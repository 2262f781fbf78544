"""The timings of `collage bench`: all rows round after round, their medians, and what each is of the limit."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console

from collage.harness.bench import sharded
from collage.harness.bench.contestants import Contestant, Row, Shapes, count
from collage.harness.bench.muon import ALONE, shares
from collage.harness.bench.rows import arrived
from collage.harness.console import bar, progress
from collage.harness.machine import machine

LR = 1e-5
MINIMUM = 2e-3  # seconds that one timing takes at least: several steps of a small optimizer are timed together


def measure(
    optimizer: str, lines: Sequence[Row], shapes: Shapes, rounds: int, device: torch.device, screen: Console
) -> dict[str, Any]:
    """Time all rows round after round, so that what disturbs the machine disturbs all of them."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    contestants: dict[str, tuple[Row, Contestant, int]] = {}
    failed: dict[str, str] = {}
    with progress(screen) as bars:
        tick = bar(bars, "building", len(lines))
        for k, row in enumerate(lines):
            try:
                contestant = row.build(shapes, LR, device)
                contestant.step()
                contestants[row.name] = row, contestant, repeats(contestant)
            except Exception as error:  # another package's: say so in its row, go on with the others
                failed[row.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            tick(k + 1)
        times = timed({name: own[1:] for name, own in contestants.items()}, rounds, bar(bars, "timing", rounds))
    table = [entry(row, times[name], shapes) for name, (row, _, _) in contestants.items()]
    contestants.clear()
    for line, row in zip(table, (row for row in lines if row.name in times), strict=True):
        without = row.name.startswith("limit") or row.name == ALONE
        line["edq_ratio"] = None if without else arrived(optimizer, row, device)
    compare(table)
    return {
        "optimizer": optimizer,
        "machine": machine(torch.float32, device.type == "cuda"),
        "parameters": count(shapes),
        "tensors": len(shapes),
        "rounds": rounds,
        "load_before": load,
        "rows": table,
        "ranks": sharded.count(),
        "per_dtensor": per_dtensor(table, len(shapes)),
        "orthogonalisation": shares(table),
        "failed": failed,
    }


def timed(
    contestants: Mapping[str, tuple[Contestant, int]], rounds: int, tick: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds of a step of each, in every round; contestants come with how many calls one timing takes."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.disable()
    try:
        for k in range(rounds):
            for name, (contestant, calls) in contestants.items():
                times[name].append(seconds(contestant.step, calls) / contestant.steps)
            tick(k + 1)
    finally:
        gc.enable()
    return times


def seconds(call: Callable[[], Any], calls: int) -> float:
    """Of one call, on average."""
    wait()
    sharded.gather()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - start) / calls


def wait() -> None:
    """Until a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def repeats(contestant: Contestant) -> int:
    """How many calls one timing takes."""
    return max(1, math.ceil(MINIMUM / max(seconds(contestant.step, 1), 1e-9)))


def entry(row: Row, times: list[float], shapes: Shapes) -> dict[str, Any]:
    """One line of the result."""
    numel, moved = count(shapes), row.moved(shapes)
    middle = median(times)
    low, _, high = quantiles(times, n=4) if len(times) > 1 else (middle,) * 3
    return {
        "name": row.name,
        "ns_per_param": middle / numel * 1e9,
        "spread": (high - low) / middle,
        "bytes_moved": moved / numel,
        "bytes_kept": row.kept(shapes) / numel,
        "gb_per_s": moved / middle / 1e9,
        "ms": middle * 1e3,
        "times_ms": [t * 1e3 for t in times],
    }


def compare(table: list[dict[str, Any]]) -> None:
    """Add the ratios of one run: to the limit of the same planes (or of as many bytes), to options D and A."""
    by_name = {line["name"]: line["ns_per_param"] for line in table}
    fastest = max((line["gb_per_s"] for line in table if line["name"].startswith("limit")), default=None)
    for line in table:
        planes = by_name.get(f"limit of {line['name'].partition(',')[0]}")
        bound = planes * sharded.share(line, table) if planes else line["bytes_moved"] / fastest if fastest else None
        line["of_limit"] = bound / line["ns_per_param"] if bound else None
        for letter in "da":
            other = next((ns for name, ns in by_name.items() if name.startswith(f"{letter.upper()}: ")), None)
            line[f"to_{letter}"] = line["ns_per_param"] / other if other else None


def per_dtensor(table: list[dict[str, Any]], tensors: int) -> dict[str, dict[str, float]]:
    """Of each sharded row: its time over that of the same plain tensors, and the microseconds more for each of them."""
    by_name = {line["name"]: line["ms"] for line in table}
    pairs = {name.removesuffix(sharded.SUFFIX): ms for name, ms in by_name.items() if name.endswith(sharded.SUFFIX)}
    return {
        name: {"times": ms / by_name[name], "us": (ms - by_name[name]) / tensors * 1e3} for name, ms in pairs.items()
    }
