"""A training step on tensors that have shapes and no memory: the model's own code, and FSDP2's over pretended ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from collage.harness.ledger import ACTIVATIONS, COPIES, GRADIENTS, WEIGHTS, Ledger
from collage.harness.train.computing import computed
from collage.harness.train.shards import layers_of
from collage.sharding import local


@dataclass(frozen=True)
class Work:
    """What each rank computes in a step.

    sequences: of each rank; 0: nothing, which leaves activations out. compute: dtype of forward and backward, which
    weights of another one are cast to. ranks: that FSDP2 shards over.
    """

    sequences: int
    length: int
    compute: torch.dtype = torch.bfloat16
    ranks: int = 1


@dataclass(frozen=True)
class Simulated:
    """Bytes on one rank: of weights, all gradients, what forward leaves for backward; by kind when most are used."""

    weights: int
    gradients: int
    activations: int
    peak: dict[str, int]


def simulate(model: nn.Module, dtype: torch.dtype, work: Work, release: bool = False) -> Simulated:
    """Forward and backward of a model on the meta device, its weights held in a dtype.

    release: whether each gradient is freed as soon as it is whole.

    Raises:
        ValueError: a model whose shapes depend on values.
    """
    twin, ledger = deepcopy(model), Ledger()
    with ExitStack() as stack:
        mesh = stack.enter_context(_pretended(work.ranks)) if work.ranks > 1 else None
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_unpacked())
        place(twin, dtype)
        if mesh is not None:
            shard(twin, mesh, dtype, work.compute)
            stack.enter_context(ledger.watching_sizes())
        watch(twin, ledger, release)
        weights, held = ledger.live[WEIGHTS], [local(param) for param in twin.parameters() if param.requires_grad]
        saved = _run(twin, work, ledger) if work.sequences else _give_gradients(twin, ledger, release)
    return Simulated(weights, sum(part.nbytes for part in held), saved, ledger.peak)


def place(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model new parameters of a dtype, and new buffers, on the CPU. Tied parameters stay tied."""
    new: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and param not in new:
                empty = torch.empty(param.shape, dtype=dtype, device="cpu")
                new[param] = nn.Parameter(empty, requires_grad=param.requires_grad)
            if param is not None:
                module._parameters[name] = new[param]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def watch(model: nn.Module, ledger: Ledger, release: bool = False) -> None:
    """Have a ledger told of a model's weights, of copies of them that its modules use, and of gradients."""
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.note(tensor, WEIGHTS)
    for module in model.modules():
        module.register_forward_pre_hook(partial(_note_copies, ledger))
    for param in model.parameters():
        if param.requires_grad:
            hooked: Any = param  # torch has not typed it
            hooked.register_post_accumulate_grad_hook(partial(_note_gradient, ledger, release))


def _note_copies(ledger: Ledger, module: nn.Module, _: Any) -> None:
    for param in module._parameters.values():
        if param is not None:
            ledger.note(param, COPIES)


def _note_gradient(ledger: Ledger, release: bool, param: Tensor) -> None:
    assert param.grad is not None
    ledger.note(param.grad, GRADIENTS)
    if release:
        param.grad = None


def _run(model: nn.Module, work: Work, ledger: Ledger) -> int:
    """Returns what forward has left for backward."""
    ids = torch.zeros(work.sequences, work.length, dtype=torch.long, device="cpu")
    try:
        with ledger, ledger.saving():
            loss = loss_of(model, ids, None if work.ranks > 1 else work.compute)
            saved = ledger.live[ACTIVATIONS]
            loss.backward()  # type: ignore[no-untyped-call]
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"the shapes inside this model depend on the values of its tensors ({error}), so its activations cannot be "
            "told beforehand; use --sequences 0 for weights, gradients and states"
        ) from None
    return saved


def loss_of(model: nn.Module, ids: Tensor, compute: torch.dtype | None) -> Tensor:
    """The loss of a language model on tokens, computed in a dtype; None: in what its modules hold."""
    inputs = {"input_ids": ids, "labels": ids}
    outputs = model(**inputs) if compute is None else computed(model, inputs, compute)
    loss: Tensor = outputs["loss"]
    return loss


def _give_gradients(model: nn.Module, ledger: Ledger, release: bool) -> int:
    """A gradient for every parameter, or for one after the other. Nothing is saved for backward."""
    with ledger:
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.empty_like(param)
                _note_gradient(ledger, release, param)
    return 0


@contextmanager
def _unpacked() -> Iterator[None]:
    """Meanwhile transformers takes it that no sequence is packed of several. It would look at values; here are none."""
    masks = sys.modules.get("transformers.masking_utils")
    if masks is None or not hasattr(masks, "find_packed_sequence_indices"):
        yield
        return

    def found_none(_: Tensor) -> None:  # a Mock would keep what it is called with
        return

    with mock.patch.object(masks, "find_packed_sequence_indices", found_none):
        yield


@contextmanager
def _pretended(ranks: int) -> Iterator[Any]:
    """A mesh of so many ranks, of which this process is the first, and the others are not there."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if distributed.is_initialized():
        raise ValueError("ranks: this process has a process group, and a plan makes one of its own; plan in another")
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        distributed.destroy_process_group()


def shard(model: nn.Module, mesh: Any, dtype: torch.dtype, compute: torch.dtype) -> None:
    """FSDP2 over each layer, and over the rest, as `collage train --shard` has it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=None if dtype == compute else compute)
    for module in (*layers_of(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
