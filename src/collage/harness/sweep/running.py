"""Runs that a store lacks are made, one after the other, and kept as each ends; how long that takes is said before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console

from collage.harness import console
from collage.harness.console import Tick
from collage.harness.experiment import Experiment
from collage.harness.machine import machine
from collage.harness.sweep.store import Asked, Store, Stored, machine_class
from collage.harness.text import duration
from collage.harness.train.config import RunConfig
from collage.harness.train.training import RunResult

TRIAL = 4  # steps of the run that is timed where nothing is known
FEW = 10 * TRIAL  # steps in all that are not worth a trial


@dataclass(frozen=True)
class Job:
    """A run that is wanted.

    Args:
        asked: what it is found by.
        experiment: what makes it; called when there is something to be made.
        config: all its settings.
        changes: which of them, besides strategy and seed, are not the experiment's.
        where: beside the strategy, on its bar.
    """

    asked: Asked
    experiment: Callable[[], Experiment]
    config: RunConfig
    changes: Mapping[str, Any]
    where: str

    def run(self, tick: Callable[[str, int], Tick], **others: Any) -> tuple[RunResult, float]:
        """Its result, and the seconds of all of it, what had to be made before it too."""
        began = time.perf_counter()
        settings = {**self.changes, **others}
        result = self.experiment().run(self.config.strategy, self.config.seed, tick=tick, **settings)
        return result, time.perf_counter() - began


def complete(jobs: Sequence[Job], store: Store, screen: Console) -> list[Stored]:
    """Every run that is wanted, in order: found in the store, or made and kept there as soon as it ends."""
    found = {job.asked.name: store.find(job.asked) for job in jobs}
    left = [job for job in jobs if found[job.asked.name] is None]
    for line in store.told:
        console.say(screen, line, "yellow")
    if left:
        console.say(screen, _announcement(len(jobs), left, store))
        with console.progress(screen) as bars:
            whole = console.bar(bars, "all runs", len(left))
            for done, job in enumerate(left, 1):
                with console.passing_bars(bars, job.where) as tick:
                    result, seconds = job.run(tick)
                found[job.asked.name] = store.add(job.asked, result, seconds, machine(job.config.compute_dtype()))
                whole(done)
    return [stored for job in jobs if (stored := found[job.asked.name]) is not None]


def _announcement(count: int, left: Sequence[Job], store: Store) -> str:
    kept = f", {count - len(left)} of them finished before" if len(left) < count else ""
    takes = f"the {len(left)} left take" if len(left) > 1 else "the one left takes"
    return f"{count} run{'s' * (count > 1)}{kept}; {takes} {told(expected(left, store.all()))} here"


def told(seconds: float) -> str:
    """How long, in words; what is not worth a trial is not worth a number."""
    return f"about {duration(seconds)}" if seconds else "little"


def expected(left: Sequence[Job], finished: Sequence[Stored]) -> float:
    """Seconds that these runs take here: as long as runs of their kind took, else as a short one does."""
    kinds: dict[tuple[str, str], list[Job]] = {}
    for job in left:
        kinds.setdefault((job.asked.task, job.config.model), []).append(job)
    return sum(_of_finished(jobs, finished) or _of_a_trial(jobs) for jobs in kinds.values())


def _of_finished(jobs: Sequence[Job], finished: Sequence[Stored]) -> float:
    """By runs of the same task and model on this machine: the time of a token, and what goes before a seed's first."""
    task, model = jobs[0].asked.task, jobs[0].config.model
    here = machine_class(machine(jobs[0].config.compute_dtype()))
    alike = [s for s in finished if (s.asked.task, s.asked.settings["model"], s.machine) == (task, model, here)]
    if not alike:
        return 0.0
    per_token: float = median(s.run["seconds"] / _tokens(s.asked.settings) for s in alike)
    before: float = max(0.0, *(s.seconds - s.run["seconds"] for s in alike))
    return per_token * sum(map(_work, jobs)) + before * len({job.config.seed for job in jobs})


def _work(job: Job) -> int:
    return _tokens(job.asked.settings)


def _tokens(settings: Mapping[str, Any]) -> int:
    """What a run's time is about proportional to."""
    return int(settings["steps"] * settings["batch_size"] * settings["seq_len"])


def _of_a_trial(jobs: Sequence[Job]) -> float:
    """By a run of a few steps: what each takes, what a run takes besides, and what goes before a seed's first run.

    0 where there are too few steps in all to be worth it.
    """
    job = jobs[0]
    if sum(job.config.steps for job in jobs) <= FEW or job.config.steps <= TRIAL:
        return 0.0
    ends: list[float] = []
    result, whole = job.run(
        lambda name, steps: lambda done: ends.append(time.perf_counter()),
        steps=TRIAL, warmup_steps=min(TRIAL, job.config.warmup_steps),
    )  # fmt: skip
    each = (ends[-1] - ends[1]) / max(1, len(ends) - 2)  # without the first step's, which is slower
    besides, before = max(0.0, result.seconds - TRIAL * each), max(0.0, whole - result.seconds)
    per_token = each / (_work(job) / job.config.steps)
    seeds = len({job.config.seed for job in jobs}) - 1  # the first seed's is made
    return per_token * sum(map(_work, jobs)) + besides * len(jobs) + before * seeds
