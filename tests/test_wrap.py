"""`collage.wrap`: under float32 masters the bits of the optimizer on float32 weights, whatever the buckets."""

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from wrapped import BASES, EVERY, FEW, ONE, assert_same_values, trained

import collage
from collage.optimizers.wrap import Wrapped

SOME = 12  # steps
ALL = 200
QUICK = ("Adagrad", "AdamW fused", "ASGD", "Muon", "ScheduleFree AdamW", "SOAP", "Lion", "Adafactor of transformers")


def assert_is_the_base_in_float32(name: str, steps: int, buckets: tuple[float, ...]) -> None:
    """Weights, states and groups, and those of an evaluation."""
    params, base = trained(BASES[name], steps)
    wrapped = [trained(BASES[name], steps, strategy="fp32-master", bucket_mb=bucket) for bucket in buckets]
    for mode in ("", "eval", "train") if hasattr(base, "eval") else ("",):
        for opt in (base, *(opt for _, opt in wrapped)) if mode else ():
            getattr(opt, mode)()
        for bucket, (low, opt) in zip(buckets, wrapped, strict=True):
            assert_same_as_base(f"{name}, {bucket:g} MiB {mode}", low, opt, params, base)


def assert_same_as_base(name: str, low: list[torch.Tensor], opt: Wrapped, params: list, base: object) -> None:
    for k, (p, q) in enumerate(zip(low, params, strict=True)):
        assert_same_bits(f"{name}: master {k}", opt.state[p]["param_master"], q.detach())
        assert_same_bits(f"{name}: weight {k}", p.detach(), q.detach().bfloat16())
        assert_same_values(f"{name}: {k}", dict(opt.base.state[p]), dict(base.state[q]))
    for ours, theirs in zip(opt.param_groups, base.param_groups, strict=True):
        assert_same_values(name, {k: ours[k] for k in theirs if k != "params"}, {
            k: v for k, v in theirs.items() if k != "params"})  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_under_float32_masters_it_is_the_base_on_float32_weights(name):
    assert_is_the_base_in_float32(name, SOME, (ONE, FEW, EVERY))


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_under_float32_masters_it_is_the_base_on_float32_weights_for_200_steps(name):
    assert_is_the_base_in_float32(name, ALL, (ONE, FEW, EVERY))


def test_so_it_is_under_exact_remainders_with_float32_states():
    params, base = trained(BASES["AdamW"], SOME)
    states = {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
    low, opt = trained(BASES["AdamW"], SOME, strategy="collage-exact", states=states)
    full = collage.high_precision_state_dict(nn.ParameterList(low), opt)
    for k, (p, q) in enumerate(zip(low, params, strict=True)):
        assert_same_bits(f"weight {k}", full[str(k)], q.detach())
        assert_same_values(f"{k}", dict(opt.base.state[p]), dict(base.state[q]))


@pytest.mark.parametrize("name", ["AdamW foreach", "NAdam", "Rprop", "ScheduleFree SGD", "Lion"])
def test_large_weights_are_those_of_the_base_too(name):
    """Of which some are taken in pieces: their ends round as their middles do."""
    base = BASES[name]._replace(shapes=((300, 1000), (70_001,), (1000, 33)))
    params, alone = trained(base, 3)
    low, opt = trained(base, 3, strategy="fp32-master", bucket_mb=0.1)
    assert_same_as_base(name, low, opt, params, alone)
