"""A task's runs, whatever the strategy and the seed: the same data, and the same start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from collage.harness.report.results import REFERENCE
from collage.harness.tasks.recipes import get_recipe
from collage.harness.tasks.registry import Task
from collage.harness.train import building, loops, training
from collage.harness.train.config import RunConfig

PRETRAIN_STEPS = 250
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """What is run.

    Args:
        task: what for.
        run: of every strategy and seed.
        warm: what goes before, shared by the strategies of a seed; None: nothing.
    """

    task: Task
    run: RunConfig
    warm: RunConfig | None = None

    @classmethod
    def of(cls, task: Task, run: RunConfig, warm_steps: int | None = None, then: tuple[str, ...] = ()) -> Plan:
        """With the warm-up that the task asks for: from scratch, by the recipe; logged and evaluated at its ends.

        Args:
            task: what for.
            run: the settings. A warm-up has its text.
            warm_steps: of the warm-up.
            then: text to go on with after it; by default the embedded Python source.
        """
        if not task.warm_up:
            return cls(task, run)
        steps = PRETRAIN_STEPS if warm_steps is None else warm_steps
        warm = RunConfig.of(
            run.model, run.out, phase=run.phase, strategy=REFERENCE, steps=steps, data=run.data,
            tokenizer=run.tokenizer, batch_size=run.batch_size, micro_batch=run.micro_batch, seq_len=run.seq_len,
            compute=run.compute, every=steps, shadow=0, eval_sequences=run.micro_batch,
        )  # fmt: skip
        return cls(task, replace(run, data=then), warm)


def defaults(task: Task, model: str | None = None, steps: int | None = None) -> dict[str, Any]:
    """Settings of a task's runs that are not left to the recipe. Raises ValueError for a model that it cannot train."""
    model, steps = model or task.models[0], steps or task.steps
    if get_recipe(model).name not in task.models:
        raise ValueError(f"--model: task '{task.name}' trains {', '.join(task.models)}; got '{model}'")
    return {"model": model, "steps": steps, "eval_every": max(1, steps // 4), **task.settings}


class Experiment:
    """Runs of a plan. Data is read once; so is a warm-up trained, for each seed.

    Args:
        plan: what is run.

    Raises:
        ValueError: a package that is missing, a wrong path, too little text: all is known before a run.
    """

    def __init__(self, plan: Plan) -> None:
        plan.task.require()
        self.plan = plan
        self._warmed: dict[int, Mapping[str, Tensor]] = {}
        self._warm_corpus = plan.warm.corpus() if plan.warm else None
        self._corpus = plan.run.corpus()
        if plan.warm is not None and self._warm_corpus is not None:
            building.require_enough(plan.warm, self._warm_corpus)
        building.require_enough(plan.run, self._corpus, "--finetune-data" if plan.warm and plan.run.data else "--data")

    def run(
        self,
        strategy: str,
        seed: int,
        *,
        record: Callable[[dict[str, Any]], None] = lambda _: None,
        tick: Callable[[str, int], Tick] = lambda name, steps: lambda _: None,
        histogram: bool = False,
        **settings: Any,
    ) -> training.RunResult:
        """One run, and before the first of a seed its warm-up. Without the weights.

        Args:
            strategy: of the run.
            seed: of weights, batches, masks and rounding.
            record: is given each log as a line of metrics.jsonl.
            tick: is given a name and a number of steps, and returns what is told how many are done.
            histogram: gather the sizes of the updates.
            **settings: other fields of the plan's RunConfig; none that its data depend on.
        """
        config = replace(self.plan.run, strategy=strategy, seed=seed, **settings)
        init = self._warm(seed, tick)
        result = loops.run(
            config, self._corpus, init=init, record=record, tick=tick(strategy, config.steps), histogram=histogram
        )
        return replace(result, weights={})

    def model(self, seed: int) -> nn.Module:
        """As the runs of a seed begin. Its warm-up is trained, if there is one and it has not been."""
        config = replace(self.plan.run, strategy=REFERENCE, seed=seed)
        init = self._warm(seed, lambda name, steps: lambda done: None) or building.start(config)
        return building.model_of(config, self._corpus, init)

    def _warm(self, seed: int, tick: Callable[[str, int], Tick]) -> Mapping[str, Tensor] | None:
        warm = self.plan.warm
        if warm is not None and seed not in self._warmed:
            done = loops.run(replace(warm, seed=seed), self._warm_corpus, tick=tick("warm-up", warm.steps))
            self._warmed[seed] = done.weights
        return self._warmed.get(seed)
