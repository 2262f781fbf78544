"""`collage bench`: what a step of the optimizer costs, against others and against moving its bytes, in one run."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from collage.backends import fastest, missing
from collage.harness.bench import plot
from collage.harness.bench.measure import measure
from collage.harness.bench.rows import DEFAULT, KINDS, Row, Shapes, rows
from collage.harness.bench.shown import show, show_plan
from collage.harness.console import say
from collage.harness.options import open_folder
from collage.harness.tasks.recipes import build
from collage.harness.text import size, to_json
from collage.strategies import Strategy

SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9}
MODELS = ("gpt-125m", "tiny-llama")
SPREADS = ("even", "small", *MODELS)


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
    add("--optimizer", choices=tuple(KINDS), default="adamw", help="which rule (default: %(default)s)")
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
    lines = rows(args.optimizer, names, not args.no_monitor, not args.no_others, args.extra)
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
        result = measure(args.optimizer, lines, shapes, args.rounds, device, screen)
    finally:
        torch.set_num_threads(before)
    result["command"] = (
        f"collage bench --optimizer {args.optimizer} --device {args.device} --params {args.params} "
        f"--shapes {args.shapes} --threads {result['machine']['threads']} --strategies {args.strategies} "
        f"--rounds {args.rounds}"
    )
    (args.out / "bench.json").write_text(to_json(result, indent=1), encoding="utf-8")
    plot.draw(result, args.out / "bench.png")
    show(result, screen)
    say(screen, f"numbers and picture: {args.out}/bench.json, bench.png")
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
            f"--params: all rows together need {size(needed)}, {size(free)} are free; take fewer "
            "parameters, fewer --strategies, --no-monitor or --no-others"
        )
