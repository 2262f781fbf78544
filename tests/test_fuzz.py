"""A short run of the fuzzer on fixed seeds (`make fuzz` goes on from there), and its model against wrong steps."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import torch
from fuzzing.edits import edit
from fuzzing.expected import Book, Hyper, judge
from fuzzing.world import World
from helpers import BARE
from torch import nn

import collage
from collage.optimizers import edits
from collage.strategies import STRATEGIES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("seed", [0, 1000])
def test_random_sequences_do_what_a_user_expects(seed):
    command = [sys.executable, Path(fuzz.__file__), "--seed", str(seed), "--count", "60", "--seconds", "250"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


HYPER = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.1, maximize=False)


SHAPE = (32, 130)  # blocks of 128, and short ones


def stepped(strategy):
    """(book before the third step, gradient, planes after it)."""
    g = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(SHAPE, generator=g).to(STRATEGIES[strategy].dtype))
    opt = collage.AdamW([("w", w)], lr=HYPER.lr, weight_decay=HYPER.decay, strategy=strategy)
    planes = []
    for _ in range(3):
        w.grad = torch.randn(SHAPE, generator=g).to(w.dtype)
        opt.step()
        planes.append({"param": w.detach().clone(), **{k: v.clone() for k, v in opt.state[w].items() if k != "step"}})
    return Book(planes[1], planes[1]["param"], step=2), w.grad, planes[2]


@pytest.mark.parametrize("strategy", BARE)
def test_the_model_knows_a_right_step_from_a_wrong_one(strategy):
    book, grad, after = stepped(strategy)
    judge("w", STRATEGIES[strategy].of(grad.shape), book, after, grad, HYPER, looked=True, sums=None)
    wrong = {
        "weights that did not move": {key: x for key, x in book.planes.items() if key.startswith("param")},
        "weights that moved twice": {"param": after["param"] * 2 - book.planes["param"]},
        "a moment that did not move": {"exp_avg": book.planes["exp_avg"]},
        "a variance that is off": {"exp_avg_sq": (after["exp_avg_sq"] * 1.1).to(after["exp_avg_sq"].dtype)},
    }
    for key in after.keys() & {"param_lo", "param_kahan"}:
        wrong[f"{key} forgotten"] = {key: torch.zeros_like(after[key])}
    for planes in wrong.values():
        with pytest.raises(AssertionError, match="of 'w'"):
            judge("w", STRATEGIES[strategy].of(grad.shape), book, after | planes, grad, HYPER, looked=True, sums=None)


@pytest.mark.filterwarnings("ignore")  # what a sequence does is worth a warning
def test_a_planted_bug_is_found(monkeypatch):
    """A step that does not look whether others have changed the weights."""
    monkeypatch.setattr(edits, "adopt", lambda *_: {})
    monkeypatch.setattr(fuzz, "ACTIONS", {World.step: 1, edit: 1})

    def search():
        for seed in range(100):
            fuzz.sequence(seed, None, lambda _: None)

    with pytest.raises(AssertionError, match=r"value of 'w\d+': .* are wrong"):
        search()


@pytest.mark.filterwarnings("ignore")
def test_a_sequence_is_its_seed():
    """The same actions and the same bits, however often."""
    trails = [[], []]
    for trail in trails:
        fuzz.sequence(3, None, trail.append)
    assert trails[0] == trails[1]
