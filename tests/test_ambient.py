"""torch's defaults of dtype and device are the user's: nothing of ours may depend on them."""

import ast
import contextlib
import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import collage
from collage.strategies import STRATEGIES

SRC = Path(__file__).parent.parent / "src" / "collage"
FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "empty_strided", "scalar_tensor", "eye")


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


AMBIENT = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: default_device("meta"),
    "with device meta": lambda: torch.device("meta"),
}


def run(strategy, backend, context, **settings):
    """All that a training loop does with the library: (tensors, numbers)."""
    dtype = STRATEGIES[strategy].dtype
    g = torch.Generator().manual_seed(0)
    model = nn.ParameterDict(
        {"w": torch.randn(40, 5, generator=g).to(dtype), "b": torch.randn(7, generator=g).to(dtype)}
    )
    grads = [[torch.randn(p.shape, generator=g).to(dtype) for p in model.values()] for _ in range(4)]
    with context():
        opt = collage.AdamW(model.named_parameters(), lr=1e-2, strategy=strategy, backend=backend, **settings)
        monitor = collage.monitor(opt, every=2, shadow=1, strategies=["bf16"])
        ema = collage.EMA(model, decay=0.5)
        for step, given in enumerate(grads):
            for p, grad in zip(model.values(), given, strict=True):
                p.grad = grad
            if step == 2:
                with torch.no_grad():
                    model["w"].mul_(1.0)
                opt.load_state_dict(opt.state_dict())
            opt.step()
            ema.update()
        full = collage.high_precision_state_dict(model, opt)
        collage.load_high_precision_state_dict(model, opt, full)
        opt.resync()
        averages = [ema.value(name) for name in model]
        total = monitor.report().total
    return [
        *model.parameters(),
        *(x for p in model.values() for x in opt.state[p].values()),
        *full.values(),
        *averages,
    ], total


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize(("strategy", "backend"), [
    ("collage-plus-sr", "auto"), ("paper-plus", "auto"), ("fp32-master", "reference"), ("collage-plus-sr", "reference"),
    ("fp32", "auto"), ("kahan", "reference"),
])  # fmt: skip
def test_a_training_loop_has_the_same_bits(strategy, backend, ambient):
    check(strategy, backend, ambient)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("ambient", ["bfloat16", "default device meta"])
def test_and_so_it_has_on_triton(ambient, capturable):
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # NumPy's, of overflow
        check("collage-plus-sr", "triton", ambient, capturable=capturable)


def check(strategy, backend, ambient, **settings):
    want, quality = run(strategy, backend, contextlib.nullcontext, **settings)
    got, other = run(strategy, backend, AMBIENT[ambient], **settings)
    assert other == quality
    assert quality.steps == 2
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(f"tensor {k}", a.detach(), b.detach())


def undetermined(source):
    """Calls that make a tensor without saying on which device, and of which dtype."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)) if name in FACTORIES:
                said = {keyword.arg for keyword in node.keywords}
                if "device" not in said or ("dtype" not in said and name != "arange"):
                    yield f"line {node.lineno}: torch.{name}"


@pytest.mark.parametrize(
    "path",
    sorted(p for p in SRC.rglob("*.py") if "harness" not in p.parts),  # commands own their process
    ids=lambda p: p.relative_to(SRC).as_posix(),
)
def test_every_tensor_is_made_on_a_device_that_is_named(path):
    assert list(undetermined(path.read_text(encoding="utf-8"))) == []


def test_one_that_is_not_is_found():
    source = (
        "torch.zeros(3)\ntorch.tensor(1.0, device=d)\ntorch.tensor(1.0, device=d, dtype=t)\ntorch.arange(3, device=d)"
    )
    assert list(undetermined(source)) == ["line 1: torch.zeros", "line 2: torch.tensor"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_what_is_wrapped_is_tried_and_stepped_in_float32(kind, dtype):
    """(A default device is not for torch's own optimizers, whose counters it takes.)"""
    ends = []
    for context in (contextlib.nullcontext, lambda: default_dtype(dtype)):
        w, given = nn.Parameter(torch.ones(40, 5).bfloat16()), torch.linspace(-1, 1, 200).view(40, 5).bfloat16()
        with context():
            opt = collage.wrap(kind, [("w", w)], lr=1e-2, strategy="fp32-master")
            for _ in range(3):
                w.grad = given.clone()
                opt.step()
        ends.append(opt.state[w]["param_master"])
    assert_same_bits("w", *ends)
