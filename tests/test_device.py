"""Everything an optimizer does, where its kernels run: on a GPU (`make gpu`), else in Triton's interpreter on the CPU.

What it leaves has the bits of the reference backend on the CPU.
"""

import warnings
from collections.abc import Iterator

import pytest
import torch
from helpers import BARE, assert_same_bits
from torch import nn

import collage
from collage import backends
from collage.strategies import STRATEGIES

pytestmark = pytest.mark.slow  # in the interpreter; a part of it: test_triton.py
DEVICE = torch.device("cpu" if backends.interpreted() else "cuda")
SIZES = {"w": (3, 700), "v": (2, 40), "b": (5,)}
OPTIMIZERS = {
    "adamw": (collage.AdamW, {"weight_decay": 0.1}),
    "amsgrad": (collage.AdamW, {"amsgrad": True}),
    "adam": (collage.Adam, {"weight_decay": 0.1}),
    "sgd": (collage.SGD, {"momentum": 0.9, "nesterov": True}),
    "lion": (collage.Lion, {"weight_decay": 0.1}),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """NumPy, which carries the interpreter's kernels out, warns of overflow."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        yield


class Side:
    """Parameters and their optimizer, here or there, and the same gradients for either."""

    def __init__(self, there: bool, kind: str, strategy: str, **settings: object) -> None:
        self.device = DEVICE if there else torch.device("cpu")
        g = torch.Generator().manual_seed(1)
        dtype = STRATEGIES[strategy].dtype
        self.params = {
            name: nn.Parameter(torch.randn(size, generator=g).to(self.device, dtype)) for name, size in SIZES.items()
        }
        self.grads = torch.Generator().manual_seed(2)
        made, own = OPTIMIZERS[kind]
        backend = "triton" if there else "reference"
        self.opt = made(
            self.params.items(), strategy=strategy, seed=5, backend=backend, **({"lr": 1e-3} | own | settings)
        )

    def backward(self) -> None:
        for p in self.params.values():
            p.grad = torch.randn(p.shape, generator=self.grads).mul(1e-2).to(p.device, p.dtype)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.backward()
            self.opt.step()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, p in self.params.items():
            yield name, p.detach().cpu()
            for key, x in self.opt.state[p].items():
                yield f"{name} {key}", x.cpu()


def both(kind: str, strategy: str, **settings: object) -> tuple[Side, Side]:
    return Side(True, kind, strategy, **settings), Side(False, kind, strategy, **settings)


def assert_same(ours: Side, theirs: Side) -> None:
    for (name, x), (_, y) in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert_same_bits(name, x, y)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("strategy", BARE)
def test_steps(kind, strategy):
    ours, theirs = both(kind, strategy)
    ours.train(2)
    theirs.train(2)
    assert_same(ours, theirs)


def test_a_graph_replays_the_bits():
    """lr changes between replays, which run no host code; without a GPU the steps are made one by one."""
    ours, theirs = both("adamw", "collage-plus-sr", lr=torch.tensor(1e-3), skip_nonfinite=True)
    for side in (ours, theirs):
        for group in side.opt.param_groups:
            group["lr"] = torch.tensor(1e-3, dtype=torch.float64, device=side.device)
    for group in ours.opt.param_groups:
        group["capturable"] = True
    ours.train(1)
    theirs.train(1)
    graph = None
    if DEVICE.type == "cuda":
        graph, before = torch.cuda.CUDAGraph(), [x for _, x in ours.tensors()]
        with torch.cuda.graph(graph):
            ours.opt.step()
        assert all(torch.equal(x, y) for x, (_, y) in zip(before, ours.tensors(), strict=True))
    for k in range(4):
        for side in (ours, theirs):
            for group in side.opt.param_groups:
                group["lr"].fill_(1e-3 / (k + 1))
            grads = {name: p.grad for name, p in side.params.items()}
            side.backward()
            for name, p in side.params.items():  # a graph reads where the gradients lay
                p.grad = grads[name].copy_(p.grad)
            if k == 2:
                side.params["v"].grad[1, 3] = torch.inf
        theirs.opt.step()
        ours.opt.step() if graph is None else graph.replay()
        assert_same(ours, theirs)
    assert theirs.opt.skipped_steps == ours.opt.skipped_steps == 1


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_step():
    ours, theirs = both("adamw", "collage-plus", lr=torch.tensor(1e-3))
    step = torch.compile(ours.opt.step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        ours.backward()
        step()
    theirs.train(3)
    assert_same(ours, theirs)


@pytest.mark.parametrize("strategy", ["collage-plus-sr", "collage-8bit-plus", "fp32-master"])
def test_a_measured_run_and_its_checkpoint(strategy):
    """The monitor's sums and shadow, the average, the state from there to here and on."""
    ours, theirs = both("adamw", strategy)
    reports = []
    for side in (ours, theirs):
        model = nn.ParameterDict(side.params)
        monitor = collage.monitor(side.opt, every=1)
        ema = collage.EMA(model, decay=0.9, optimizer=side.opt)
        for _ in range(3):
            side.train(1)
            ema.update()
        reports.append((monitor.report(), [ema.value(name).cpu() for name in SIZES]))
    (quality, averages), (wanted, others) = reports
    assert quality.total == wanted.total
    for name, x, y in zip(SIZES, averages, others, strict=True):
        assert_same_bits(name, x, y)
    full = collage.high_precision_state_dict(nn.ParameterDict(ours.params), ours.opt)
    new = Side(False, "adamw", strategy)
    with torch.no_grad():
        for name, p in new.params.items():
            p.copy_(ours.params[name])
    new.opt.load_state_dict(ours.opt.state_dict())
    new.grads.set_state(ours.grads.get_state())
    new.train(2)
    theirs.train(2)
    assert_same(new, theirs)
    collage.load_high_precision_state_dict(nn.ParameterDict(ours.params), ours.opt, full)


@pytest.mark.parametrize("released", [False, True])
def test_gradients_are_summed_clipped_and_released(released):
    """Backward's own arithmetic is exact here: the products are of powers of two."""
    ends = []
    for device, backend in ((DEVICE, "triton"), (torch.device("cpu"), "reference")):
        net = nn.Linear(64, 8, bias=False).bfloat16()
        net.weight.data = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        net.to(device)
        opt = collage.AdamW(net.named_parameters(), lr=1e-3, backend=backend, skip_nonfinite=not released)
        if released:
            collage.release_gradients(net, opt)
        accumulator = None if released else collage.GradientAccumulator(net)
        for k in range(3):
            x = torch.zeros(1, 64).bfloat16()
            x[0, k::3] = 2.0**-k
            if accumulator is None:
                net(x.to(device)).sum().backward()
            else:
                for _ in range(2):
                    with accumulator:
                        net(x.to(device)).sum().backward()
                accumulator.finish()
                collage.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
        ends.append([net.weight.detach().cpu(), *(v.cpu() for v in opt.state[net.weight].values())])
    for x, y in zip(*ends, strict=True):
        assert_same_bits("weight", x, y)


def test_what_is_wrapped_and_muon_step_where_they_are():
    """torch's own arithmetic differs from one device to another; the stored numbers take it all the same."""
    w = {name: nn.Parameter(torch.ones(64, 64, device=DEVICE).bfloat16()) for name in ("a", "b")}
    wrapped = collage.wrap(torch.optim.AdamW([w["a"]], lr=1e-5))
    muon = collage.Muon([{"params": [("b", w["b"])], "use_muon": True}], lr=1e-5)
    monitors = [collage.monitor(opt, every=1) for opt in (wrapped, muon)]
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in w.values():
            p.grad = torch.randn(64, 64, generator=g).to(DEVICE, torch.bfloat16)
        wrapped.step()
        muon.step()
    for monitor in monitors:
        total = monitor.report().total
        assert total.steps == 3
        assert total.edq_ratio > 0.99
