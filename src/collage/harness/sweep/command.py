"""`collage sweep`: strategies over the values of one setting, resumable run by run."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import collage
from collage.harness import console, options
from collage.harness.compare import asking
from collage.harness.machine import machine
from collage.harness.report.results import REFERENCE, SUMMARY
from collage.harness.sweep.axes import AXES, Axis
from collage.harness.sweep.grid import Grid
from collage.harness.sweep.running import complete
from collage.harness.sweep.shown import print_grid
from collage.harness.sweep.store import STORE, Store, Stored
from collage.harness.sweep.study import Study
from collage.harness.text import to_json
from collage.harness.train import checkpoints, world
from collage.harness.train.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `collage sweep`."""
    parser.add_argument("--axis", required=True, choices=tuple(AXES), help="the setting that is varied")
    parser.add_argument("--values", metavar="X,Y,...", help="of that setting (default: some around the task's own)")
    asking.add_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="of the results; runs that it holds already are not made again (default: runs/sweep-MODEL-TASK-AXIS)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Make the runs that are not there yet, write the summary and the maps, print the tables. Returns the exit code."""
    if world.size() > 1:
        raise ValueError("collage sweep: runs in one process; leave out torchrun")
    screen, study = Console(), study_of(args)
    jobs, out = study.jobs(), options.open_folder(study.plan.run.out)
    _require_same_axis(out, study)
    store = Store(options.open_folder(out / STORE))
    try:
        stored = complete(jobs, store, screen)
    except KeyboardInterrupt:
        console.say(
            screen, f"interrupted; finished runs are in {store.folder}, and the same command goes on from there"
        )
        return 130
    grid = study.grid(one.run for one in stored)
    checkpoints.write_whole(out / SUMMARY, to_json(summarise(study, grid, stored), indent=1))
    print_grid(screen, grid)
    from collage.harness.sweep.heat import write_heat_maps  # matplotlib takes a second

    maps = write_heat_maps(grid, study.setting(), out)
    console.say(screen, f"maps and every number: {', '.join(map(str, [*maps, out / SUMMARY]))}")
    return 0


def _require_same_axis(out: Path, study: Study) -> None:
    """Raises ValueError if a summary and maps of another sweep would be replaced."""
    found = json.loads((out / SUMMARY).read_text(encoding="utf-8")) if (out / SUMMARY).exists() else {}
    ours = {"task": study.plan.task.name, "axis": study.axis.name if study.axis else None}
    theirs = {name: found.get(name, value) for name, value in ours.items()}
    if theirs != ours:
        raise ValueError(f"--out '{out}': holds {SUMMARY} of {theirs['task']} along {theirs['axis']}; choose another")


def study_of(args: argparse.Namespace) -> Study:
    """Check all that was asked for, before anything is trained."""
    axis = AXES[args.axis]
    strategies, seeds = asking.strategies_of(args), asking.seeds_of(args)
    if REFERENCE not in strategies:
        raise ValueError(f"--strategies: a sweep compares with {REFERENCE} on the same seed; add it")
    if getattr(args, axis.name.replace("-", "_"), None) is not None:
        raise ValueError(f"--{axis.name}: is what --axis varies; give --values instead")
    plan = asking.plan_of(args, f"sweep-{{model}}-{{task}}-{axis.name}")
    asking.require_strategies(strategies, plan.run)
    return Study(plan, strategies, seeds, axis, _values(args.values, axis, plan.run))


def _values(given: str | None, axis: Axis, config: RunConfig) -> tuple[float, ...]:
    axis.require(config)
    if given is None:
        return axis.defaults(config)
    values = [axis.parse(text) for text in given.split(",")]
    if len(set(values)) < len(values):
        raise ValueError(f"--values: each once, got {given}")
    return tuple(sorted(_allowed(value, axis, config) for value in values))


def _allowed(value: float, axis: Axis, config: RunConfig) -> float:
    """A value. Raises ValueError naming the flag for one that a run cannot have."""
    try:
        axis.config(config, value)
    except ValueError as error:
        raise ValueError(f"--values: {error}") from None
    return value


def summarise(study: Study, grid: Grid, stored: list[Stored]) -> dict[str, Any]:
    """summary.json."""
    run = study.plan.run
    return {
        "title": f"{study.setting()}, along {grid.axis}",
        "command": shlex.join(["collage", *sys.argv[1:]]),
        "version": collage.__version__,
        "machine": machine(run.compute_dtype()),
        "task": study.plan.task.name,
        "settings": run.to_dict(),
        "axis": grid.axis,
        "values": list(study.values),
        "strategies": list(study.strategies),
        "seeds": list(study.seeds),
        "sentences": grid.sentences(),
        "cells": grid.to_dict(),
        "runs": [f"{STORE}/{one.asked.name}.json" for one in stored],
        "machines": sorted({one.machine for one in stored}),
    }
