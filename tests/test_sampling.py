"""Which elements of e4m3 weights are followed, and with which scales: those of their rows, however few they are."""

import pytest
import torch
from helpers import assert_same_bits, encoded
from torch import nn

import collage
from collage import fp8
from collage.formats import format_of
from collage.harness.train.meters import UpdateSizes
from collage.monitor.sampling import Sampling, components, value

SHAPES = [(2, 8), (10, 40), (33, 96), (300, 5), (64, 96), (3, 2000)]  # the first of them small
KINDS = {
    "own": lambda params, strategy: collage.AdamW(params, lr=1e-3, strategy=strategy),
    "wrapped": lambda params, strategy: collage.wrap(torch.optim.NAdam, params, lr=1e-3, strategy=strategy),
}


def numbers(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Rows whose scales differ."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.exp2(torch.randint(-9, 1, (shape[0], 1), generator=g).float())


@pytest.mark.parametrize("stride", [1, 3, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sample_decodes_to_the_sample_of_what_the_planes_decode_to(shape, stride):
    fmt, sampling = format_of("e4m3+int16"), Sampling(torch.empty(shape), stride)
    planes = encoded("e4m3+int16", numbers(shape))
    sampled = [sampling.take(own, plane.per) for own, plane in zip(planes, fmt.planes, strict=True)]
    assert_same_bits("value", value(fmt, sampled), sampling.take(fmt.value(planes)))
    assert_same_bits("component", components(fmt, sampled)[0], sampling.take(fmt.value(planes)))


@pytest.mark.parametrize("strategy", ["collage-fp8", "collage-fp8-lean"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shadow_of_all_sees_what_the_sums_of_the_first_step_see(kind, strategy):
    """Of every shape; what others write to is followed, and strategies beside go on from it."""
    layers = {f"{rows}x{columns}": nn.Linear(columns, rows, bias=False) for rows, columns in SHAPES}
    net = nn.ModuleDict(layers | {"head": nn.Linear(8, 8, bias=False)})
    for layer in net.values():
        layer.weight.data.copy_(numbers(tuple(layer.weight.shape)))
    opt = KINDS[kind](fp8.convert(net, skip=[], grad_dtype=torch.float32).named_parameters(), strategy)
    monitor = collage.monitor(opt, every=1, shadow=1, strategies=["collage-fp8-lean"])
    UpdateSizes(opt, every=1)
    for step in range(2):
        for p in net.parameters():
            p.grad = numbers(tuple(p.shape), seed=1 + step).to(p.grad_dtype)
        opt.step()
        report = monitor.window()
        for quality in report.by_parameter.values() if step == 0 else ():
            assert quality.edq_shadow == pytest.approx(quality.edq_ratio, rel=1e-12)  # of other orders of summation
        assert abs(report.beside["collage-fp8-lean"].edq_ratio - 1) < 0.1
        with torch.no_grad():
            for p in net.parameters():
                p.view(torch.uint8).bitwise_and_(0xFE)  # which is no NaN


def test_sizes_of_updates_are_of_every_followed_weight():
    net = fp8.convert(nn.ModuleDict({"a": nn.Linear(40, 10, bias=False), "b": nn.Linear(8, 2, bias=False)}))
    opt = collage.SGD(net.named_parameters(), lr=2.0**-8, strategy="collage-fp8")
    sizes = UpdateSizes(opt, every=1, stride=1)
    for layer in net.values():
        layer.weight.grad = torch.ones_like(layer.weight, dtype=torch.bfloat16)
    opt.step()
    assert int(sizes.counts.sum()) == 400 + 16
