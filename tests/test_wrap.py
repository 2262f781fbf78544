"""`collage.wrap`: under float32 masters the bits of the optimizer on float32 weights, whatever the buckets."""

import pytest
import torch
from helpers import assert_same_bits
from wrapped import BASES, EVERY, FEW, ONE, assert_same_values, trained

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
