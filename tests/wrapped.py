"""Optimizers of other authors that `collage.wrap` is tried on, and runs of them on float32 weights and wrapped."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import adan_pytorch
import lion_pytorch
import pytorch_optimizer
import schedulefree
import torch
import transformers
from helpers import assert_same_bits
from torch import Tensor, nn

import collage
from collage.optimizers.wrap import Wrapped

SHAPES = ((7, 5), (33, 20), (20,), (4, 3, 2))
MATRICES = ((7, 5), (33, 20), (20, 3))
EVERY = 64.0  # MiB: all parameters in one bucket
FEW = 33 * 20 * 4 * 12 / 2**20  # some in one
ONE = 1e-6


class Base(NamedTuple):
    """An optimizer's class, its settings, what it takes, and whether one element's update depends on that alone."""

    kind: type[torch.optim.Optimizer]
    settings: dict[str, Any] = {}  # noqa: RUF012 - never changed
    shapes: Sequence[tuple[int, ...]] = SHAPES
    elementwise: bool = True


OF_TORCH = {
    "Adadelta": Base(torch.optim.Adadelta, {"lr": 1.0, "weight_decay": 0.01}),
    "Adagrad": Base(torch.optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1, "lr_decay": 0.01}),
    "Adagrad fused": Base(torch.optim.Adagrad, {"lr": 1e-2, "fused": True}),
    "Adam": Base(torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    "Adam fused": Base(torch.optim.Adam, {"amsgrad": True, "fused": True}),
    "AdamW": Base(torch.optim.AdamW, {"betas": (0.8, 0.95)}),
    "AdamW foreach": Base(torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
    "AdamW fused": Base(torch.optim.AdamW, {"fused": True}),
    "Adamax": Base(torch.optim.Adamax),
    "Adamax foreach": Base(torch.optim.Adamax, {"foreach": True}),
    "ASGD": Base(torch.optim.ASGD, {"t0": 50.0, "weight_decay": 0.01}),
    "NAdam": Base(torch.optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "NAdam foreach": Base(torch.optim.NAdam, {"foreach": True}),
    "RAdam": Base(torch.optim.RAdam, {"weight_decay": 0.1}),
    "RMSprop": Base(torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    "RMSprop foreach": Base(torch.optim.RMSprop, {"foreach": True}),
    "Rprop": Base(torch.optim.Rprop),
    "SGD": Base(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "SGD plain": Base(torch.optim.SGD, {"lr": 1e-2}),
    "SGD fused": Base(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "fused": True}),
    "SGD foreach": Base(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "foreach": True, "maximize": True}),
    "Adafactor": Base(torch.optim.Adafactor, elementwise=False),
    "Muon": Base(torch.optim.Muon, {}, MATRICES, elementwise=False),
}
OF_OTHERS = {
    "ScheduleFree AdamW": Base(schedulefree.AdamWScheduleFree, {"warmup_steps": 10, "weight_decay": 0.1}),
    "ScheduleFree SGD": Base(schedulefree.SGDScheduleFree, {"lr": 1e-2, "warmup_steps": 5, "foreach": False}),
    "ScheduleFree RAdam": Base(schedulefree.RAdamScheduleFree),
    "Lion": Base(lion_pytorch.Lion, {"lr": 1e-4, "weight_decay": 0.1}),
    "Adan": Base(adan_pytorch.Adan, {"weight_decay": 0.02}),
    "Adan of pytorch_optimizer": Base(pytorch_optimizer.Adan, {"weight_decay": 0.02}),
    "AdEMAMix": Base(pytorch_optimizer.AdEMAMix, {"weight_decay": 0.02}),
    "SOAP": Base(pytorch_optimizer.SOAP, {"precondition_frequency": 5}, elementwise=False),
    "Shampoo": Base(pytorch_optimizer.Shampoo, {"momentum": 0.9}, elementwise=False),
    "ScalableShampoo": Base(pytorch_optimizer.ScalableShampoo, {"block_size": 16}, MATRICES, elementwise=False),
    "Adafactor of transformers": Base(transformers.Adafactor, {"lr": None}, elementwise=False),
    "Adafactor of transformers, with lr": Base(
        transformers.Adafactor, {"lr": 1e-3, "relative_step": False, "scale_parameter": False, "beta1": 0.9},
        elementwise=False,
    ),
}  # fmt: skip
BASES = OF_TORCH | OF_OTHERS


def weights(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    """The same numbers in any dtype: those that bfloat16 has."""
    g = torch.Generator().manual_seed(1)
    return [nn.Parameter((torch.randn(shape, generator=g) * 0.1).bfloat16().to(dtype)) for shape in shapes]


def give(params: Sequence[Tensor], step: int) -> None:
    """Gradients, of the numbers that bfloat16 has."""
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g).bfloat16())  # strided as autograd's


def groups_of(params: list[nn.Parameter], base: Base) -> list[dict[str, Any]]:
    """Two, of which the second has a learning rate of its own, where the optimizer has one."""
    other = {"lr": 2e-3} if base.settings.get("lr", 1.0) is not None else {}
    named = [(str(k), p) for k, p in enumerate(params)]
    return [{"params": named[:2]}, {"params": named[2:], **other}]


def schedule_of(opt: torch.optim.Optimizer, steps: int) -> Callable[[], None]:
    """A cosine of the learning rate, where there is one."""
    if opt.param_groups[0]["lr"] is None:
        return lambda: None
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps).step


def modes(opt: Any, step: int) -> None:
    """Evaluate now and then, as Schedule-Free is told of."""
    if hasattr(opt, "eval"):
        if step % 7 == 3:
            opt.eval()
        opt.train()


def trained(base: Base, steps: int, **wrapping: Any) -> tuple[list[nn.Parameter], Any]:
    """A run of the base on float32 weights, or of one that is wrapped so."""
    params = weights(base.shapes, torch.bfloat16 if wrapping else torch.float32)
    if wrapping:
        opt: Any = collage.wrap(base.kind, groups_of(params, base), **base.settings, **wrapping)
    else:
        opt = base.kind(groups_of(params, base), **base.settings)
    go_on(params, opt, 0, steps)
    return params, opt


def go_on(params: list[nn.Parameter], opt: Any, start: int, stop: int, scheduled: bool = True) -> None:
    """Steps from one number to another."""
    schedule = schedule_of(opt, 200) if scheduled else (lambda: None)
    for step in range(start, stop):
        modes(opt, step)
        give(params, step)
        opt.step()
        schedule()


def planes(opt: Wrapped) -> Iterator[tuple[str, Any]]:
    """All that a wrapped optimizer has of its parameters, by position and key, weights too."""
    for k, parameter in enumerate(opt.parameters()):
        own = {"": parameter.tensor.detach(), **opt.state.get(parameter.tensor, {})}
        theirs = opt.base.state.get(parameter.tensor, {})
        for key, value in [*own.items(), *((f"base.{key}", value) for key, value in theirs.items())]:
            yield f"{k}.{key}", value


def assert_same_values(name: str, got: Any, want: Any) -> None:
    """Each bit of a state of any kind."""
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor), name
        assert_same_bits(name, got, want)
    elif isinstance(want, list | tuple | dict):
        keys = want.keys() if isinstance(want, dict) else range(len(want))
        assert len(got) == len(want), name
        for key in keys:
            assert_same_values(f"{name}[{key}]", got[key], want[key])
    elif isinstance(want, int | float | str | None):
        assert got == want, f"{name}: got {got}, want {want}"
    else:
        assert type(got) is type(want), name


def assert_same_run(got: Wrapped, want: Wrapped) -> None:
    """Each bit of weights, planes and states, and every setting."""
    mine, theirs = dict(planes(got)), dict(planes(want))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert_same_values(key, mine[key], value)
    for a, b in zip(got.param_groups, want.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
