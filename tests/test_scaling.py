"""What a monitor counts of the scales of e4m3 weights: those that moved, and weights too large for the largest."""

from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import collage
from collage import fp8
from collage.formats import format_of
from collage.monitor.quality import Quality
from collage.strategies import STRATEGIES

E4M3 = [name for name, strategy in STRATEGIES.items() if strategy.dtype == torch.float8_e4m3fn]
BACKENDS = ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)]
SHOWN = Fraction(448) * Fraction(2) ** 119  # the largest that shows
FINITE = torch.finfo(torch.float32).max
ROWS = {  # a row's largest weight, and what a step makes of it -> (whether its scale moves, whether it is saturated)
    (1.0, 1.0): (0, 0),
    (1.0, 1.75): (0, 0),  # the end of the scale, which is 448 * 2**-8
    (1.0, 1.875): (1, 0),
    (-1.0, -2.0): (1, 0),
    (1.0, 0.875): (1, 0),
    (1.0, 2.0**-60): (1, 0),
    (2.0**126, 1.75 * 2.0**127): (1, 0),
    (1.75 * 2.0**127, 1.875 * 2.0**127): (0, 1),
    (-(2.0**126), -FINITE): (1, 1),
    (2.0**-60, FINITE): (1, 1),
}


def linear(rows: list[float], columns: int = 40) -> nn.Module:
    """A converted layer whose rows have these largest weights, and a bias."""
    net = nn.Sequential(nn.Linear(columns, len(rows)))
    with torch.no_grad():
        net[0].weight.copy_(torch.rand(len(rows), columns).mul(2.0**-70))
        net[0].weight[:, 3] = torch.tensor(rows)
    return fp8.convert(net, skip=[], grad_dtype=torch.float32)


def counted(quality: Quality) -> tuple[int, int, int | None]:
    """(scales, how many of them moved, saturated weights)."""
    moved = (quality.rescaled or 0.0) * quality.scales
    assert abs(moved - round(moved)) < 1e-9  # of a share, which is rounded
    return quality.scales, round(moved), quality.saturated


def recounted(layer: nn.Module, opt: torch.optim.Optimizer, old: Tensor) -> tuple[int, int, int]:
    """The same of one step, from the planes, in integers."""
    state = opt.state[layer.weight]
    if "param_master" in state:
        numbers = [Fraction(x) for x in state["param_master"].flatten().tolist()]
    else:
        numbers = list(decoded(layer.weight.detach(), state["param_lo"], layer.weight_scale))
    moved = sum(a != b for a, b in zip(layer.weight_scale.tolist(), old.tolist(), strict=True))
    return len(old), moved, sum(abs(x) > SHOWN for x in numbers)


def decoded(hi: Tensor, lo: Tensor, scales: Tensor) -> Iterator[Fraction]:
    """The magnitudes of all normal numbers."""
    bits = 8 * lo.dtype.itemsize
    magnitudes = ((hi.view(torch.uint8).long() & 0x7F) << bits) + lo
    for words, scale in zip(magnitudes.tolist(), scales.tolist(), strict=True):
        for exponent, fraction in (divmod(word, 2 ** (bits + 3)) for word in words):
            yield (1 + Fraction(fraction, 2 ** (bits + 3))) * Fraction(2) ** (exponent - 7 + scale - 127)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", E4M3)
def test_rows_whose_scale_moves_and_weights_beyond_the_largest(strategy, backend):
    before, after = zip(*ROWS, strict=True)
    net = linear(list(before))
    opt = collage.SGD(net.named_parameters(), lr=1.0, strategy=strategy, backend=backend)
    monitor = collage.monitor(opt, every=1)
    weight = net[0].weight
    weight.grad = torch.zeros(weight.shape)
    weight.grad[:, 3] = torch.tensor(before) - torch.tensor(after)
    net[0].bias.grad = torch.ones_like(net[0].bias)
    opt.step()
    moved, saturated = (sum(own) for own in zip(*ROWS.values(), strict=True))
    report = monitor.report()
    for quality in (report.total, report.by_group[0], report.by_parameter["0.weight"]):
        assert counted(quality) == (len(ROWS), moved, saturated)
    beside = report.by_parameter["0.bias"]
    assert (beside.scales, beside.rescaled, beside.saturated) == (0, None, None)


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("strategy", E4M3)
def test_counts_of_a_run_are_those_of_its_planes(strategy, release):
    """Step after step, of every measured one; whatever comes in between, and in whatever parts."""
    torch.manual_seed(0)
    net = fp8.convert(
        nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 2))
    )
    opt = collage.AdamW(net.named_parameters(), lr=3e-2, strategy=strategy)
    collage.release_gradients(net, opt) if release else None
    monitor, own = collage.monitor(opt, every=2), {"0.weight": net[0], "2.weight": net[2]}
    wanted = {name: [0, 0, 0] for name in own}
    for step in range(9):
        old = {name: layer.weight_scale.clone() for name, layer in own.items()}
        net(torch.randn(16, 40).bfloat16()).float().square().mean().backward()
        opt.step()
        opt.zero_grad()
        for name, layer in own.items() if step % 2 == 0 else ():
            wanted[name] = [a + b for a, b in zip(wanted[name], recounted(layer, opt, old[name]), strict=True)]
        if step == 5 and not format_of(STRATEGIES[strategy].param).shows_edits:
            with torch.no_grad():
                net[0].weight_scale.add_(1)  # others' doing, not a step's
    report = monitor.report()
    for name, counts in wanted.items():
        assert counted(report.by_parameter[name]) == tuple(counts)
        assert counts[1] > 0
    assert counted(report.total) == tuple(map(sum, zip(*wanted.values(), strict=True)))
    assert all((q.rescaled is None) == (name not in own) for name, q in report.by_parameter.items())


def test_strategies_without_scales_have_no_counts():
    w = nn.Parameter(torch.randn(64, 96).bfloat16())
    opt = collage.AdamW([("w", w)], strategy="collage-8bit")  # its moments have scales, which nothing shows
    monitor = collage.monitor(opt, every=1, strategies=E4M3)
    w.grad = torch.randn_like(w)
    opt.step()
    report = monitor.report()
    for quality in (report.total, report.by_parameter["w"], *report.beside.values()):
        assert (quality.scales, quality.rescaled, quality.saturated) == (0, None, None)
