"""`collage bench`: what a step costs, against others and against moving its bytes; or what formats lose."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from collage.backends import fastest, missing
from collage.harness.bench import plot, wrapped
from collage.harness.bench.accuracy import command as accuracy
from collage.harness.bench.contestants import KINDS, Row, Shapes
from collage.harness.bench.gradients import command as gradients
from collage.harness.bench.measure import measure
from collage.harness.bench.rows import DEFAULT, rows
from collage.harness.bench.sharded import ranks
from collage.harness.bench.shown import show, show_plan
from collage.harness.console import say
from collage.harness.options import flag_of, open_folder, split
from collage.harness.tasks.recipes import build
from collage.harness.text import size, to_json
from collage.strategies import Strategy

SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9}
MODELS = ("gpt-125m", "tiny-llama")
SPREADS = ("even", "small", *MODELS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("--params", type=count, metavar="N", help="parameters, e.g. 1M or 1B (default: 64M; of muon 4M)")
    add(
        "--shapes",
        choices=SPREADS,
        help="four equal matrices (even, the default), tensors of 1,000 elements, or a real model's (--params is then "
        "the model's own)",
    )
    add("--device", choices=("cpu", "cuda"), help="cuda: also AMD's GPUs (default: cpu)")
    add("--plan", action="store_true", help="print what would be measured, the bytes and the floors; measure nothing")
    add("--bandwidth", type=float, metavar="GB/S", help="of --plan (default: 2000, an A100's)")
    add("--threads", type=int, metavar="N", help=f"of torch and of the kernels (default: {torch.get_num_threads()})")
    add("--optimizer", choices=tuple(KINDS), help="which rule (default: adamw)")
    add(
        "--strategies",
        metavar="NAMES",
        help=f"comma-separated (default: {','.join(DEFAULT)}; with --accuracy every format)",
    )
    add("--rounds", type=int, metavar="N", help="timings of every row, interleaved (default: 9)")
    add(
        "--sharded",
        action="store_true",
        help="also the strategies' steps on DTensors, of one rank, or under torchrun on all",
    )
    _add_choices_of_rows(parser)


def _add_choices_of_rows(parser: argparse.ArgumentParser) -> None:
    """What is left out, what comes in, and what is measured instead."""
    add = parser.add_argument
    add("--no-monitor", action="store_true", help="leave out the monitored steps")
    add("--no-others", action="store_true", help="leave out torch's and other packages' optimizers")
    add("--extra", action="store_true", help="also optimi and torchao: pip install '.[bench]'")
    add(
        "--accuracy",
        action="store_true",
        help="instead measure what every format loses, and optimi's and torchao's where they are installed (a "
        "minute or two; half a minute with --no-others); takes --strategies, --no-others and --out",
    )
    add(
        "--gradients",
        action="store_true",
        help="instead measure accumulating, clipping and releasing gradients; takes --rounds and --out",
    )
    add(
        "--wrapped",
        action="store_true",
        help="instead measure torch's optimizers wrapped, beside the same on float32 master copies; takes --params "
        "(default: 16M), --rounds and --out",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="bench.json, bench.png; accuracy.json, accuracy.png; gradients.json; wrapped.json (default: %(default)s)",
    )


# Of a timing alone: what they are if they are not given, and why --accuracy takes none of them.
SMALL = "it measures the tensors that its numbers need"
TIMING: dict[str, tuple[Any, str]] = {
    "params": (None, SMALL),
    "shapes": ("even", SMALL),
    "device": ("cpu", "a format has the same bits on every device"),
    "plan": (False, "it has no floor that could be planned with"),
    "bandwidth": (None, "it has no floor that could be planned with"),
    "threads": (None, SMALL),
    "optimizer": ("adamw", "formats lose the same under every rule; it measures AdamW's moments"),
    "rounds": (9, "it has the same numbers every time"),
    "sharded": (False, SMALL),
    "no_monitor": (False, "it monitors nothing"),
    "extra": (False, "it measures the packages that are installed"),
}


INSTEAD: dict[str, tuple[str, ...]] = {"gradients": ("rounds",), "wrapped": ("rounds", "params")}  # and what they take


def settle(args: argparse.Namespace) -> None:
    """Defaults for what was not given.

    Raises ValueError, naming the flag, for one that means nothing to what is measured instead of steps.
    """
    if args.wrapped and args.params is None:
        args.params = wrapped.PARAMS
    for name, (default, why) in TIMING.items():
        given = getattr(args, name)
        if args.accuracy and given is not None and given is not False:
            raise ValueError(f"{flag_of(name)}: means nothing to --accuracy, because {why}; leave it out")
        for mode, taken in INSTEAD.items():
            if getattr(args, mode) and name not in taken and given is not None and given is not False:
                raise ValueError(f"{flag_of(name)}: means nothing to {flag_of(mode)}, which has its own; leave it out")
        setattr(args, name, default if given is None else given)
    args.params = args.params or KINDS[args.optimizer].params
    chosen = [flag_of(mode) for mode in ("accuracy", *INSTEAD) if getattr(args, mode)]
    if chosen[1:]:
        raise ValueError(f"{chosen[0]}, {chosen[1]}: each is measured instead of steps; give one of them")
    if chosen and not args.accuracy and (args.strategies is not None or args.no_others):
        raise ValueError(f"{chosen[0]}: has rows of its own; leave --strategies and --no-others out")
    if args.rounds < 1:
        raise ValueError(f"--rounds: needs at least 1, got {args.rounds}")


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
    """Measure what was asked for, print it, write the JSON and the picture. Returns the exit status."""
    settle(args)
    if args.gradients:
        return gradients.run(args)
    if args.wrapped:
        return wrapped.run(args)
    names = [] if args.strategies is None else split(args.strategies)
    strategies = [Strategy.parse(name) for name in names]
    if args.accuracy:
        return accuracy.run(strategies, args)
    with ranks(args.sharded) as rank:
        return time(names or DEFAULT, args, rank)


def time(names: Sequence[str], args: argparse.Namespace, rank: int) -> int:
    """Time every row; the first rank says and writes what it measured. Returns the exit status."""
    most = os.cpu_count() or 1
    if args.threads is not None and not 1 <= args.threads <= most:
        raise ValueError(f"--threads: needs 1 to {most}, the cores of this machine, got {args.threads}")
    shapes = shapes_of(args.shapes, args.params)
    _require_convertible(names, shapes)
    lines = rows(args.optimizer, names, not args.no_monitor, not args.no_others, args.extra, args.sharded)
    if args.bandwidth is not None and not (args.plan and 0 < args.bandwidth < math.inf):
        raise ValueError(f"--bandwidth: needs --plan and a number above 0, got {args.bandwidth:g}")
    if args.plan:
        return show_plan(lines, shapes, args)
    device = torch.device(args.device)
    reason = missing(fastest(device))
    if reason or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device: no kernels for {device}: {reason or 'torch sees no GPU'}; --plan needs none")
    require_memory(lines, shapes, device)
    open_folder(args.out)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    screen = Console(width=max(100, Console().width), quiet=rank > 0)
    try:
        result = measure(args.optimizer, lines, shapes, args.rounds, device, screen)
    finally:
        torch.set_num_threads(before)
    if rank:
        return 0
    result["command"] = (
        f"collage bench --optimizer {args.optimizer} --device {args.device} --params {args.params} "
        f"--shapes {args.shapes} --threads {result['machine']['threads']} --strategies {','.join(names)} "
        f"--rounds {args.rounds}{' --sharded' * args.sharded}"
    )
    (args.out / "bench.json").write_text(to_json(result, indent=1), encoding="utf-8")
    plot.draw(result, args.out / "bench.png")
    show(result, screen)
    say(screen, f"numbers and picture: {args.out}/bench.json, bench.png")
    return 0


def shapes_of(spread: str, params: int) -> Shapes:
    """The shapes of the tensors that hold so many parameters."""
    if spread == "even":
        return [matrix(max(1, params // 4))] * 4
    if spread == "small":
        return [(1000,)] * max(1, params // 1000)
    model = build(spread, device="meta")
    return [tuple(p.shape) for p in model.parameters()]


def matrix(numel: int) -> tuple[int, int]:
    """The shape, in rows of 4,096 if it is that large, that comes nearest to so many elements."""
    columns = min(4096, numel)
    return round(numel / columns), columns


def _require_convertible(names: Sequence[str], shapes: Shapes) -> None:
    """Raise ValueError for strategies of e4m3 weights where there are only vectors, which stay bfloat16."""
    converted = [name for name in names if Strategy.parse(name).dtype.itemsize == 1]
    if converted and not any(len(shape) == 2 for shape in shapes):
        raise ValueError(
            f"--shapes: small has only vectors, and {converted[0]} trains e4m3 matrices; give --shapes even, or leave "
            f"{', '.join(converted)} out of --strategies"
        )


def require_memory(lines: Sequence[Row], shapes: Shapes, device: torch.device) -> None:
    """Raise ValueError if the rows, all alive at once because they are interleaved, do not fit."""
    needed = sum(row.kept(shapes) for row in lines)
    if device.type == "cuda":
        free: float = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if needed > 0.9 * free:
        raise ValueError(
            f"--params: all rows together need {size(needed)}, {size(free)} are free; take fewer "
            "parameters, fewer --strategies, --no-monitor or --no-others"
        )
