"""The step of Muon's matrices: momentum and update by the backends' kernels, and between them an orthogonalisation.

One matrix after another, so that no more than one has temporaries of its size. The bits of a matrix do not depend on
which others step with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from collage.backends import Batch, choose, operator
from collage.backends.batch import cut
from collage.optimizers.orthogonal import Orthogonalisation
from collage.rules import RULES
from collage.sharding import from_whole, whole

NAME = "collage::muon_"
OWN = "bool nesterov, float[] ns_coefficients, int ns_steps, float eps, str? adjust_lr_fn, str? ns_dtype, int[] split"
SCHEMA = operator.SCHEMA.replace(") -> ()", f", {OWN}) -> ()")


def carry_out(
    batch: Batch,  # of rule "muon"
    params: Sequence[Tensor],  # DTensors, where they are
    how: Orthogonalisation,
    nesterov: bool,
    backend: str,
    capturable: bool = False,
) -> None:
    """Count every parameter's steps up, and make its step. Where matrices are sharded a collective for each."""
    begun = operator.begun(batch, backend, capturable)
    if begun is None:
        return
    for k, param in enumerate(params):
        _step(begun.take([k]), param, how, "momentum_nesterov" if nesterov else "momentum", backend)


def _step(one: Batch, param: Tensor, how: Orthogonalisation, momentum: str, backend: str) -> None:
    """The step of one parameter, whose counter is up already."""
    theta, buffer = cut(one.formats, one.planes)
    of_register = ("fp32", torch.float32) if one.register == torch.float32 else ("bf16", torch.bfloat16)
    direction = torch.empty(theta[0].shape, dtype=of_register[1], device=theta[0].device)
    kernels = choose(backend, direction.device)
    first = replace(
        one, rule=RULES[momentum], formats=(one.formats[1], of_register[0]), hyper=one.hyper[:1],
        planes=[*buffer, direction], sums=(), kept=None,
    )  # fmt: skip
    kernels.step(first)
    full = whole(direction.to(how.dtype_on(direction.device)), param)
    update = from_whole(how(full.flatten(1)).reshape(full.shape), param).contiguous()
    second = replace(
        one, rule=RULES["apply"], formats=one.formats[:1], hyper=one.hyper[1:], planes=theta, grads=[update],
        maximize=False, scale=1.0, kept=None,
    )  # fmt: skip
    kernels.step(second)


def muon_(
    planes: Sequence[Tensor], grads: Sequence[Tensor], steps: Sequence[Tensor], sums: Tensor, lr: Tensor, hyper: Tensor,
    rule: str, strategy: str, backend: str, keys: Sequence[int], regions: Sequence[int], seed: int, maximize: bool,
    capturable: bool, nesterov: bool, ns_coefficients: Sequence[float], ns_steps: int, eps: float,
    adjust_lr_fn: str | None, ns_dtype: str | None, split: Sequence[int],
) -> None:  # fmt: skip
    """`carry_out` as torch.compile sees it, of plain tensors: the arguments of `operator.step_`, and the group's."""
    columns = operator.columns_of(planes, grads, steps, sums, keys, regions)
    batch = operator.batch_of(rule, strategy, lr, hyper, maximize, seed, columns)
    how = Orthogonalisation(tuple(ns_coefficients), ns_steps, eps, adjust_lr_fn, ns_dtype, tuple(split))
    carry_out(batch, batch.visible(), how, nesterov, backend, capturable)


torch.library.define(NAME, SCHEMA)
torch.library.impl(NAME, "CompositeExplicitAutograd", muon_)
torch.library.register_fake(NAME, lambda *_: None)
