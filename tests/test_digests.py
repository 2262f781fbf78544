"""Every strategy's planes after 50 steps, as digests that were taken once: no change of structure may move a bit.

``python tests/test_digests.py`` prints the table anew, for a change that means to move some.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import REGIMES, numbers
from torch import Tensor, nn

import collage
from collage.fp8 import convert
from collage.strategies import STRATEGIES

TABLE = Path(__file__).with_name("digests.json")
STEPS, N = 50, 1_100  # more than a block of the kernels, and a tail
ROWS = (11, 400)  # of a parameter that is large enough for blocks with scales, the last one of a row short


def digest(strategy: str, regime: str) -> str:
    """Of theta and every plane of its state, NaNs all alike."""
    shape = torch.Size(ROWS if STRATEGIES[strategy].exception else (N,))
    layer = layer_of(numbers(regime, shape.numel(), 1).view(shape), STRATEGIES[strategy].dtype)
    w = layer.weight
    opt = collage.AdamW([("w", w)], lr=1e-3, weight_decay=0.1, strategy=strategy, seed=3)
    for step in range(STEPS):
        w.grad = numbers(regime, shape.numel(), 100 + step).view(shape).to(w.grad_dtype)
        opt.step()
    hashed = hashlib.sha256()
    for x in (w.detach(), *(opt.state[w][key] for key in sorted(opt.state[w]))):
        x = x.masked_fill(x.isnan(), torch.nan) if x.is_floating_point() and x.dtype.itemsize > 1 else x
        hashed.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def layer_of(x: Tensor, dtype: torch.dtype) -> nn.Module:
    """A module whose weight these numbers are; e4m3 ones belong to a linear layer, which has their scales."""
    if dtype.itemsize > 1:
        layer = nn.Module()
        layer.weight = nn.Parameter(x.to(dtype))
        return layer
    layer = nn.Linear(x.shape[1], x.shape[0], bias=False)
    layer.weight = nn.Parameter(x.nan_to_num(0.0, 0.0, 0.0))
    return convert(nn.ModuleDict({"layer": layer}))["layer"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_bit_has_moved(strategy):
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert {regime: digest(strategy, regime) for regime in REGIMES} == table[strategy]


if __name__ == "__main__":
    json.dump({s: {r: digest(s, r) for r in REGIMES} for s in STRATEGIES}, sys.stdout, indent=1)
    print()
