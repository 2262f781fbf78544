"""`collage info`."""

from __future__ import annotations

import argparse
import platform

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import collage
from collage import backends
from collage.backends import cpu
from collage.harness.console import say
from collage.harness.text import short
from collage.strategies import ALIASES, STRATEGIES

USE_WHEN = {
    "bf16": "a baseline: it loses updates below half an ulp",
    "collage-light": "beta2 is 0.95 or less; the smallest that keeps theta whole",
    "collage-plus": "default: fp32 quality; loses increments below 2**-17 theta",
    "collage-plus-sr": "tiny learning rates, weight decay or long averages: no floor",
    "paper-bf16": "reproducing the paper's option A",
    "paper-light": "reproducing the paper's option B",
    "paper-plus": "reproducing the paper's option C",
    "fp32-states": "reproducing the paper's option D-MW",
    "fp32-master": "the reference that others are measured against",
    "fp8-master": "the reference for FP8 weights: e4m3 cut from float32 masters",
    "fp32": "full precision, no bf16 weights",
    "kahan": "comparing with Kahan summation",
    "stochastic": "comparing with stochastic rounding alone",
    "collage-fp16": "float16 weights, with torch.amp.GradScaler",
    "collage-exact": "weights with the bits of a float32 master, in 4 bytes",
    "collage-exact-lean": "the same weights, moments of 16 bits",
    "collage-8bit-plus": "8-bit moments",
    "collage-8bit": "least memory of bf16 weights: 3 bytes, and 8-bit moments",
    "collage-fp8": "weights in FP8, after collage.fp8.convert(model)",
    "collage-fp8-lean": "the same in a byte less; tiny learning rates become noise",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(args: argparse.Namespace) -> int:
    """Print versions, backends, strategies."""
    screen = Console()
    say(screen, f"collage {collage.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    native = (
        f"cpu (compiled kernels, {cpu.instruction_set()} of {', '.join(cpu.native.instruction_sets())})"
        if cpu.native is not None
        else f"cpu is missing: {cpu.MISSING}"
    )
    reason = backends.missing("triton")
    gpu = f"triton is missing: {reason}" if reason else "triton (GPU kernels)"
    say(screen, f"backends: {native}; {gpu}; reference (plain PyTorch, any device)")
    screen.print(_strategies())
    for exception in dict.fromkeys(s.exception for s in STRATEGIES.values() if s.exception):
        names = (name for name, s in STRATEGIES.items() if s.exception == exception)
        say(screen, f"Under {', '.join(names)} {exception}.")
    say(screen, "Use it when you want")
    for name, when in USE_WHEN.items():
        say(screen, f"  {name:<20}{when}")
    return 0


def _strategies() -> Table:
    """Narrow enough for 80 columns."""
    table = Table(header_style="bold", box=SIMPLE)
    letters = {name: f" ({letter})" for letter, name in ALIASES.items()}
    for header in ("strategy", "theta, momentum, variance", "in", "bytes"):
        table.add_column(header, justify="right" if header == "bytes" else "left", no_wrap=True)
    for name, s in STRATEGIES.items():
        arithmetic = {"float32": "fp32", "bfloat16": "bf16"}[s.arithmetic]
        table.add_row(name + letters.get(name, ""), ", ".join(s.formats()), arithmetic, short(s.bytes_per_param()))
    table.caption = "(A … D: the paper's options) in: arithmetic; bytes: of weights, state and gradient, per parameter"
    return table
