"""`collage bench`: what a step of the optimizer costs, against others and against moving its bytes, in one run."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from collage.backends import cpu, fastest, missing
from collage.harness import bench_plot
from collage.harness.bench_rows import DEFAULT, A, Contestant, D, Row, Shapes, arrived, rows
from collage.harness.console import bar, progress
from collage.harness.machine import machine
from collage.harness.options import open_folder
from collage.harness.recipes import build
from collage.monitor import jsonable
from collage.strategies import Strategy

SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9}
LR = 1e-5
MODELS = ("gpt-125m", "tiny-llama")
SPREADS = ("even", "small", *MODELS)
MINIMUM = 2e-3  # seconds that one timing takes at least: several steps of a small optimizer are timed together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("--params", type=count, default=64 * 10**6, metavar="N", help="parameters, e.g. 1M or 1B (default: 64M)")
    add(
        "--shapes",
        choices=SPREADS,
        default="even",
        help="four equal tensors, tensors of 1,000 elements, or a real model's (--params is then the model's own)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: also AMD's GPUs (default: %(default)s)")
    add("--plan", action="store_true", help="print what would be measured, the bytes and the floors; measure nothing")
    add("--bandwidth", type=float, metavar="GB/S", help="of --plan (default: 2000, an A100's)")
    add("--threads", type=int, metavar="N", help=f"of torch and of the kernels (default: {torch.get_num_threads()})")
    add("--strategies", default=",".join(DEFAULT), metavar="NAMES", help="comma-separated (default: %(default)s)")
    add("--rounds", type=int, default=9, metavar="N", help="timings of every row, interleaved (default: %(default)s)")
    add("--no-monitor", action="store_true", help="leave out the monitored steps")
    add("--no-others", action="store_true", help="leave out torch's and other packages' optimizers")
    add("--extra", action="store_true", help="also optimi and torchao: pip install '.[bench]'")
    add(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="bench.json, bench.png (default: %(default)s)",
    )


def count(text: str) -> int:
    """64M -> 64000000."""
    scale = SUFFIXES.get(text[-1:].upper(), 1)
    try:
        number = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        number = 0
    if not math.isfinite(number) or number < 1:
        raise argparse.ArgumentTypeError(f"needs a number such as 500K, 64M or 1B, got {text!r}")
    return int(number)


def run(args: argparse.Namespace) -> int:
    """Time every row, print the table, write the JSON and the picture. Returns the exit status."""
    if args.rounds < 1:
        raise ValueError(f"--rounds: needs at least 1, got {args.rounds}")
    most = os.cpu_count() or 1
    if args.threads is not None and not 1 <= args.threads <= most:
        raise ValueError(f"--threads: needs 1 to {most}, the cores of this machine, got {args.threads}")
    names = [name.strip() for name in args.strategies.split(",")]
    for name in names:
        Strategy.parse(name)
    shapes = shapes_of(args.shapes, args.params)
    lines = rows(names, not args.no_monitor, not args.no_others, args.extra)
    numel = sum(math.prod(shape) for shape in shapes)
    if args.bandwidth is not None and not (args.plan and 0 < args.bandwidth < math.inf):
        raise ValueError(f"--bandwidth: needs --plan and a number above 0, got {args.bandwidth:g}")
    if args.plan:
        return show_plan(lines, numel, args)
    device = torch.device(args.device)
    reason = missing(fastest(device))
    if reason or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device: no kernels for {device}: {reason or 'torch sees no GPU'}; --plan needs none")
    require_memory(lines, numel, device)
    open_folder(args.out)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    screen = Console(width=max(100, Console().width))
    try:
        result = measure(lines, shapes, args.rounds, device, screen)
    finally:
        torch.set_num_threads(before)
    result["command"] = (
        f"collage bench --device {args.device} --params {args.params} --shapes {args.shapes} "
        f"--threads {result['machine']['threads']} --strategies {args.strategies} --rounds {args.rounds}"
    )
    (args.out / "bench.json").write_text(json.dumps(jsonable(result), indent=1) + "\n", encoding="utf-8")
    bench_plot.draw(result, args.out / "bench.png")
    show(result, screen)
    screen.print(f"numbers and picture: {args.out}/bench.json, bench.png", highlight=False, soft_wrap=True)
    return 0


def shapes_of(spread: str, params: int) -> Shapes:
    """The shapes of the tensors that hold so many parameters."""
    if spread == "even":
        return [(max(1, params // 4),)] * 4
    if spread == "small":
        return [(1000,)] * max(1, params // 1000)
    model = build(spread, device="meta")
    return [tuple(p.shape) for p in model.parameters()]


def require_memory(lines: Sequence[Row], numel: int, device: torch.device) -> None:
    """Raise ValueError if the rows, all alive at once because they are interleaved, do not fit."""
    needed = sum(row.kept for row in lines) * numel
    if device.type == "cuda":
        free: float = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if needed > 0.9 * free:
        raise ValueError(
            f"--params: all rows together need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; take fewer "
            "parameters, fewer --strategies, --no-monitor or --no-others"
        )


def measure(lines: Sequence[Row], shapes: Shapes, rounds: int, device: torch.device, screen: Console) -> dict[str, Any]:
    """Time all rows round after round, so that what disturbs the machine disturbs all of them."""
    numel = sum(math.prod(shape) for shape in shapes)
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
        times: dict[str, list[float]] = {name: [] for name in contestants}
        gc.collect()
        gc.disable()
        try:
            tick = bar(bars, "timing", rounds)
            for k in range(rounds):
                for name, (_, contestant, calls) in contestants.items():
                    times[name].append(seconds(contestant.step, calls) / contestant.steps)
                tick(k + 1)
        finally:
            gc.enable()
    table = [entry(row, times[name], numel) for name, (row, _, _) in contestants.items()]
    contestants.clear()
    for line, row in zip(table, (row for row in lines if row.name in times), strict=True):
        line["edq_ratio"] = None if row.name.startswith("limit") else arrived(row, device)
    compare(table)
    return {
        "machine": about_machine(device),
        "parameters": numel,
        "tensors": len(shapes),
        "rounds": rounds,
        "load_before": load,
        "rows": table,
        "failed": failed,
    }


def about_machine(device: torch.device) -> dict[str, str]:
    """What the rows ran on."""
    on_gpu = device.type == "cuda"
    return machine(torch.float32, on_gpu) | {"kernels": "triton" if on_gpu else cpu.instruction_set()}


def show_plan(lines: Sequence[Row], numel: int, args: argparse.Namespace) -> int:
    """What would be measured, and below which time no step can be."""
    screen, bandwidth = Console(width=max(100, Console().width)), args.bandwidth or 2000.0
    table = Table(
        header_style="bold", box=SIMPLE, title=f"One step of AdamW, {numel:,} parameters, {args.device}: a plan"
    )
    table.add_column("")
    for header in ("bytes moved\nper parameter", "GB\nper step", f"floor in ms\nat {bandwidth:g} GB/s"):
        table.add_column(header, justify="right")
    for row in (row for row in lines if not row.name.startswith("limit")):
        total = row.moved * numel / 1e9
        table.add_row(row.name, f"{row.moved:g}", f"{total:.2f}", f"{total / bandwidth * 1e3:.3f}")
    screen.print(table)
    screen.print(
        f"Nothing was measured. Without --plan: {args.rounds} interleaved rounds of these rows, their medians, and how "
        f"much of the intended update arrived (EDQ), into {args.out}.", highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def seconds(call: Callable[[], Any], calls: int) -> float:
    """Of one call, on average."""
    wait()
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


def entry(row: Row, times: list[float], numel: int) -> dict[str, Any]:
    """One line of the result."""
    middle = median(times)
    low, _, high = quantiles(times, n=4) if len(times) > 1 else (middle,) * 3
    return {
        "name": row.name,
        "ns_per_param": middle / numel * 1e9,
        "spread": (high - low) / middle,
        "bytes_moved": row.moved,
        "bytes_kept": row.kept,
        "gb_per_s": row.moved * numel / middle / 1e9,
        "ms": middle * 1e3,
        "times_ms": [t * 1e3 for t in times],
    }


def compare(table: list[dict[str, Any]]) -> None:
    """Add the ratios of one run: to the limit of the same planes (or of as many bytes), to options D and A."""
    by_name = {line["name"]: line["ns_per_param"] for line in table}
    fastest = max((line["gb_per_s"] for line in table if line["name"].startswith("limit")), default=None)
    for line in table:
        planes = by_name.get(f"limit of {line['name'].partition(',')[0]}")
        bound = planes or (line["bytes_moved"] / fastest if fastest else None)
        line["of_limit"] = bound / line["ns_per_param"] if bound else None
        for letter, name in (("d", D), ("a", A)):
            line[f"to_{letter}"] = line["ns_per_param"] / by_name[name] if name in by_name else None


def show(result: dict[str, Any], screen: Console) -> None:
    """The table, and how noisy it is."""
    tensors = f"{result['tensors']:,} tensor{'s' * (result['tensors'] > 1)}"
    about = result["machine"]
    table = Table(
        title=f"One step of AdamW, {result['parameters']:,} parameters in {tensors}, threads: {about['threads']}, "
        f"{about['kernels']}",
        header_style="bold",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    headers = ("ns/\nparam", "±", "bytes\nmoved", "GB/s", "of the\nlimit", "time\n÷ D", "time\n÷ A", "EDQ\nratio")
    table.add_column("", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for line in result["rows"]:
        table.add_row(
            line["name"], f"{line['ns_per_param']:.3f}", f"{line['spread']:.0%}", f"{line['bytes_moved']:g}",
            f"{line['gb_per_s']:.1f}", *(_cell(line[key], form) for key, form in
            (("of_limit", ".0%"), ("to_d", ".2f"), ("to_a", ".2f"), ("edq_ratio", ".3f"))),
        )  # fmt: skip
    screen.print(table)
    for name, reason in result["failed"].items():
        screen.print(f"not measured: {name}: {reason}", style="yellow", highlight=False, soft_wrap=True)
    spreads = [line["spread"] for line in result["rows"]]
    load = "" if result["load_before"] is None else f"; load before: {result['load_before']:.2f}"
    screen.print(
        f"Medians of {result['rounds']} interleaved rounds. Noise: the middle half of a row's timings spans "
        f"{median(spreads):.0%} of its median (worst row {max(spreads):.0%}){load}.",
        highlight=False,
        soft_wrap=True,
    )


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
