"""Averages, full-precision dictionaries, edits, `resync` and `reset_moments` on shards, beside those of one process."""

from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits
from layouts import SHAPES, alone, layouts, numbers, whole
from torch import Tensor, nn

import collage
from collage.strategies import STRATEGIES


class Run:
    """A model whose gradients are given, its optimizer, and an average of each kind."""

    def __init__(self, strategy: str, lay) -> None:
        self.lay, self.dtype = lay, STRATEGIES[strategy].dtype
        self.model = nn.Module()
        for name in SHAPES:
            self.model.register_parameter(name, nn.Parameter(lay(name, numbers(name, 99, self.dtype))))
        self.opt = collage.AdamW(self.model.named_parameters(), lr=1e-2, weight_decay=0.1, strategy=strategy)
        self.emas = [
            collage.EMA(self.model, 0.9, format=format, optimizer=optimizer)
            for format, optimizer in (("bf16x2:sr", self.opt), ("fp32", None))
        ]

    def step(self, *steps: int) -> None:
        for step in steps:
            for name, p in self.model.named_parameters():
                p.grad = self.lay(name, numbers(name, step, self.dtype))
            self.opt.step()
            for ema in self.emas:
                ema.update()

    def found(self) -> dict[str, Tensor]:
        """Everything, unsharded: weights, states, averages, and both kinds of full-precision dictionaries."""
        result = {name: whole(p.detach()) for name, p in self.model.named_parameters()}
        result |= {f"{n} {k}": whole(x) for n, p in self.model.named_parameters() for k, x in self.opt.state[p].items()}
        exports = [collage.high_precision_state_dict(self.model, self.opt)]
        for ema in self.emas:
            exports.append(ema.high_precision_state_dict())
            planes = [(name, k, plane) for name, own in ema.planes.items() for k, plane in enumerate(own)]
            result |= {f"average {name} {k}": whole(plane) for name, k, plane in planes}
        for k, export in enumerate(exports):
            result |= {f"export {k} {name}": whole(x) for name, x in export.items()}
        return result


def trained(run: Run) -> None:
    run.step(0, 1, 2)


@torch.no_grad()
def edited(run: Run) -> None:
    """By operators on the parameters, as others write to them: no monitor looks."""
    run.step(0, 1)
    for p in run.model.parameters():
        p.mul_(0.75)
    run.step(2)
    for p in run.model.parameters():
        p.clamp_(-0.5, 0.5)
    collage.high_precision_state_dict(run.model, run.opt)
    run.step(3)


@torch.no_grad()
def edited_in_part(run: Run) -> None:
    """On the memory of each rank: a write that only the local part counts."""
    run.step(0, 1)
    for p in run.model.parameters():
        (p.to_local() if hasattr(p, "to_local") else p).mul_(0.75)
    run.step(2)


@torch.no_grad()
def resynced(run: Run) -> None:
    """After writes that nothing counts; then moments start anew, and weights keep all they have."""
    run.step(0, 1)
    for p in run.model.parameters():
        (p._local_tensor if hasattr(p, "_local_tensor") else p).data.mul_(1.0 + 2.0**-6)
    run.opt.resync()
    run.step(2)
    run.opt.reset_moments()
    run.step(3)


def lent(run: Run) -> None:
    """Averages that stand in are exported, what is written meanwhile is dropped."""
    run.step(0, 1)
    before = run.found()
    for ema in run.emas:
        with pytest.warns(RuntimeWarning, match="'long': .* weights were written to inside averaged"):
            while_lent(run, ema)
    for name, value in run.found().items():
        assert_same_bits(name, value, before[name])
    run.step(2)


def while_lent(run: Run, ema: collage.EMA) -> None:
    with ema.averaged():
        for name, value in collage.high_precision_state_dict(run.model, run.opt).items():
            assert_same_bits(name, whole(value), whole(ema.value(name)))
        with pytest.raises(RuntimeError, match=r"resync\(\) inside averaged"):
            run.opt.resync()
        with torch.no_grad():
            run.model.long.mul_(2.0)


def restored(run: Run) -> None:
    """Whole float32 dictionaries go in; what comes out goes in again, and so do averages, and training goes on."""
    full = {name: numbers(name, 7, torch.float32) for name in SHAPES}
    if STRATEGIES[str(run.opt.param_groups[0]["strategy"])].param in ("bf16", "bf16:sr"):
        full = {name: value.bfloat16().float() for name, value in full.items()}
    collage.load_high_precision_state_dict(run.model, run.opt, full)
    run.step(0, 1)
    weights = collage.high_precision_state_dict(run.model, run.opt)
    averages = [{**(own := ema.state_dict()), "planes": _cloned(own["planes"])} for ema in run.emas]
    run.step(2)
    if run.opt.param_groups[0]["strategy"] not in ("bf16", "stochastic", "fp32-states", "paper-bf16"):
        collage.load_high_precision_state_dict(run.model, run.opt, weights)
    for ema, state in zip(run.emas, averages, strict=True):
        ema.load_state_dict(state)
    run.step(3)


def refused(run: Run) -> None:
    """A number that one rank alone cannot take: no rank takes any."""
    run.step(0)
    before = run.found()
    full = {name: numbers(name, 7, torch.float32) for name in SHAPES}
    full["long"][4000] = 3e38 if run.dtype == torch.float16 else 3.4e38
    placed = {name: run.lay(name, value) for name, value in full.items()}
    if run.dtype != torch.float32:
        with pytest.raises(ValueError, match=r"is beyond|another rank refuses its part|cut their low bits"):
            collage.load_high_precision_state_dict(run.model, run.opt, placed)
    for name, value in run.found().items():
        assert_same_bits(name, value, before[name])


def _cloned(planes: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [plane.clone() for plane in own] for name, own in planes.items()}


TASKS = (trained, edited, edited_in_part, resynced, lent, restored, refused)


def done(task, strategy: str, lay) -> dict[str, Tensor]:
    run = Run(strategy, lay)
    task(run)
    return run.found()


of_one_process = cache(partial(done, lay=alone))


def compare(strategy: str) -> None:
    for name, lay in layouts(blocks="8bit" in strategy):
        for task in TASKS:
            got = done(task, strategy, lay)
            want = of_one_process(task, strategy) if dist.get_rank() == 0 else got
            assert got.keys() == want.keys()
            for key, value in want.items():
                assert_same_bits(f"{dist.get_world_size()} ranks, {name}, {task.__name__}: {key}", got[key], value)
