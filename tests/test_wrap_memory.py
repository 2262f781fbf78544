"""How much memory a step of a wrapped optimizer takes beside weights, gradients and states."""

import weakref

import lion_pytorch
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import collage
from collage.optimizers.wrapping.pieces import ELEMENTWISE

MIB = 2**20
N, ROWS = 8, 64  # parameters of [ROWS, 1024]: 0.25 MiB in float32 each


class Live(TorchDispatchMode):
    """The most bytes that storages made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakSet = weakref.WeakSet()
        self._refs: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given | self._refs.keys():
                self._add(x.untyped_storage())
        return out

    def _add(self, storage):
        at, size = storage._cdata, storage.nbytes()
        self._refs[at] = size
        self.now += size
        self.most = max(self.most, self.now)

        def gone():
            self.now -= self._refs.pop(at)

        weakref.finalize(storage, gone)


def made(kind, bucket_mb, shape=(ROWS, 1024), n=N, **settings):
    params = [nn.Parameter(torch.randn(shape).bfloat16()) for _ in range(n)]
    opt = collage.wrap(kind, params, strategy="collage-plus", bucket_mb=bucket_mb, **settings)
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    return opt


def most_of(opt):
    with Live() as live:
        opt.step()
    return live.most


def test_what_is_alive_is_counted():
    with Live() as live:
        a, b = torch.zeros(1000), torch.zeros(2000)
        del a
        c = b.view(2, 1000) * 2
    assert live.most == live.now == 4 * 4000
    del b, c


KINDS = {
    "AdamW": (torch.optim.AdamW, {"foreach": False}, 2),  # and how many states of its shape it keeps of a parameter
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}, 2),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}, 2),
    "Rprop foreach": (torch.optim.Rprop, {"foreach": True}, 2),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, 1),
    "Adafactor": (torch.optim.Adafactor, {}, 0),
    "Lion": (lion_pytorch.Lion, {}, 1),
    "Muon": (torch.optim.Muon, {}, 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_step_takes_the_memory_of_a_bucket_or_of_its_largest_parameter(name):
    """Theta, its gradient and its states in float32, and two numbers more that the optimizer itself makes.

    A parameter that is larger than a bucket is taken in pieces where the optimizer is known to be elementwise.
    """
    kind, settings, states = KINDS[name]
    little = ROWS * 1024 + 4096  # bytes of a comparison that some make, and of numbers that are 0-d
    for bucket_mb in (0.5, 3.0):
        opt = made(kind, bucket_mb, **settings)
        kept = sum(own.numel() * 4 for own in opt._memory._of.values())
        alone = 0 if kind in ELEMENTWISE else (2 + states + 2) * ROWS * 1024 * 4
        assert most_of(opt) + kept <= max(bucket_mb * MIB, alone) + little
