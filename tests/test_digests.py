"""Every strategy's planes after 50 steps, as digests that were taken once: no change of structure may move a bit.

``python tests/test_digests.py`` prints the table anew, for a change that means to move some.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import BARE, REGIMES, numbers
from torch import nn

import collage
from collage.strategies import STRATEGIES

TABLE = Path(__file__).with_name("digests.json")
STEPS, N = 50, 1_100  # more than a block of the kernels, and a tail
ROWS = (11, 400)  # of a parameter that is large enough for blocks with scales, the last one of a row short


def digest(strategy: str, regime: str) -> str:
    """Of theta and every plane of its state, NaNs all alike."""
    dtype = STRATEGIES[strategy].dtype
    shape = torch.Size(ROWS if STRATEGIES[strategy].exception else (N,))
    w = nn.Parameter(numbers(regime, shape.numel(), 1).view(shape).to(dtype))
    opt = collage.AdamW([("w", w)], lr=1e-3, weight_decay=0.1, strategy=strategy, seed=3)
    for step in range(STEPS):
        w.grad = numbers(regime, shape.numel(), 100 + step).view(shape).to(dtype)
        opt.step()
    hashed = hashlib.sha256()
    for x in (w.detach(), *(opt.state[w][key] for key in sorted(opt.state[w]))):
        x = x.masked_fill(x.isnan(), torch.nan) if x.is_floating_point() else x
        hashed.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


@pytest.mark.parametrize("strategy", BARE)
def test_no_bit_has_moved(strategy):
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert {regime: digest(strategy, regime) for regime in REGIMES} == table[strategy]


if __name__ == "__main__":
    json.dump({s: {r: digest(s, r) for r in REGIMES} for s in BARE}, sys.stdout, indent=1)
    print()
