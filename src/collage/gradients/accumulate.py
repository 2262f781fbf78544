"""Micro-batch gradients added up in float32, whatever dtype the weights have."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from collage.backends import Batch, choose
from collage.gradients.replicas import anywhere, average_, no_sync, replicas, replicated
from collage.gradients.together import Together, on_arrival
from collage.rules.accumulate import ACCUMULATE
from collage.sharding import local, placed

# Parameter -> who takes its gradients, weakly: that one has the parameter, which would never be freed.
_SUMMED: MutableMapping[Tensor, Callable[[], Any]] = WeakIdKeyDictionary()


def is_summed(param: Tensor) -> bool:
    """Whether an accumulator takes this parameter's gradients as they arrive."""
    return _owner(param) is not None


def _owner(param: Tensor) -> Any:
    return _SUMMED.get(param, lambda: None)()


class GradientAccumulator:
    """Adds the gradients of micro-batches up in float32, where autograd would in the dtype of the weights.

    A sum in bfloat16 drops every term below 2**-9 of it. Here each gradient is rounded to the weights' dtype once, by
    backward, and not again: it is added to a float32 sum (4 bytes per parameter) as it arrives, and freed. `finish`
    leaves the sums in ``param.grad``, float32, which the optimizers here read as they are.

    Args:
        model: plain, sharded by fully_shard, in DistributedDataParallel, or with such modules within. Under DDP
            gradients are averaged over its ranks once per step, in float32: inside ``with accumulator:`` it does not
            average by itself (its ``no_sync``), and `finish` does. Under FSDP2 every micro-batch is
            reduce-scattered, and the shards are added up.

    A model that an earlier accumulator has is taken over from it.

    Raises:
        RuntimeError: a torch without ``Tensor.grad_dtype``; a model within a DistributedDataParallel that was not
            given.
        TypeError: a sparse gradient.

    >>> model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    >>> accumulator = GradientAccumulator(model)
    >>> for scale in (1.0, 2.0**-9, 2.0**-9):
    ...     with accumulator:
    ...         (model(torch.ones(1, 1).bfloat16()) * scale).sum().backward()
    >>> accumulator.finish()
    >>> model.weight.grad
    tensor([[1.0039]])
    """

    def __init__(self, model: nn.Module) -> None:
        params = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
        if not hasattr(Tensor, "grad_dtype"):
            raise RuntimeError(f"model: float32 gradients need a torch with Tensor.grad_dtype, got {torch.__version__}")
        for p in params:
            if is_summed(p):
                _owner(p).remove()
        self._model, self._context = model, ExitStack()
        self._inside = False
        self._sums: dict[Tensor, Any] = {}  # float32, kept from step to step
        self._begun: set[int] = set()  # ids of the parameters that have had a gradient in this step
        self._together = Together(self._take)
        self._dtypes = {p: p.grad_dtype for p in params}
        self._handles = [on_arrival(p, self._arrived) for p in params]
        for p in params:
            p.grad_dtype = None  # it arrives as backward has it, and is left in float32
            _SUMMED[p] = ref(self)

    def __enter__(self) -> GradientAccumulator:
        """Around forward and backward of every micro-batch."""
        self._context.enter_context(no_sync(self._model))
        self._inside = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._inside = False
        self._context.close()
        self._together.flush()

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the sums in ``param.grad``, averaged over the ranks of DDP. Before clipping and the step."""
        self._together.flush()
        self._require_alone()
        for module in replicas(self._model):
            own = [p for p in module.parameters() if p in self._dtypes]
            for p, some in zip(own, anywhere([id(p) in self._begun for p in own], module), strict=True):
                if some and id(p) not in self._begun:  # others used it, this rank did not
                    self._start(p, torch.zeros_like(p))
            average_([self._sums[p] for p in own if id(p) in self._begun], module)
        for p in self._dtypes:
            if id(p) in self._begun:
                p.grad = self._sums[p]
        self._begun = set()

    def _require_alone(self) -> None:
        """Raise RuntimeError where somebody else leaves gradients: DDP around a model that was given without it."""
        held = replicated(self._model)
        found = [p for p in self._sums if p not in held and id(p) in self._begun and p.grad is not None]
        if found:
            raise RuntimeError(
                f"model: a weight of shape {tuple(found[0].shape)} has a gradient beside its sum, which would not be "
                "averaged over ranks; is the model in DistributedDataParallel? Give that to GradientAccumulator"
            )

    def reset(self) -> None:
        """Drop what was added since the last `finish`: for a step that is to be begun anew, after an error."""
        for p in self._together.drop():
            p.grad = None
        self._begun = set()

    def remove(self) -> None:
        """Leave gradients to autograd again; sums that are not finished are dropped."""
        for handle in self._handles:
            handle.remove()
        for p, dtype in self._dtypes.items():
            if p.grad is None or dtype in (None, p.grad.dtype):
                p.grad_dtype = dtype
            _SUMMED.pop(p, None)
        self._dtypes, self._sums, self._begun = {}, {}, set()

    def _arrived(self, param: Tensor) -> None:
        """The hook: backward has left a gradient."""
        if param.grad is not None and param.grad.layout != torch.strided:
            raise TypeError(
                f"model: the gradient of a weight of shape {tuple(param.shape)} is sparse; use a dense one "
                "(Embedding(sparse=False))"
            )
        if self._inside:
            self._together.add(param)
        else:
            self._take([param])

    @torch.no_grad()
    def _take(self, params: Sequence[Tensor]) -> None:
        """Add gradients to the sums, and free them."""
        more: list[tuple[Tensor, Tensor]] = []
        for param in params:
            grad, total = param.grad, self._sums.get(param)
            if total is not None and grad is total:  # backward has added to what `finish` left there
                self._begun.add(id(param))
            elif id(param) in self._begun:
                more.append((local(total), local(placed(grad, total))))
            else:
                self._start(param, grad)
            param.grad = None
        add_(more)

    def _start(self, param: Tensor, grad: Any) -> None:
        """The first gradient of a step."""
        if param not in self._sums or self._sums[param].shape != grad.shape:
            wide = torch.promote_types(grad.dtype, torch.float32)
            self._sums[param] = torch.empty_like(grad, dtype=wide)
        local(self._sums[param]).copy_(local(placed(grad, self._sums[param])))
        self._begun.add(id(param))


def add_(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add to each sum (float32; float64 of such gradients) a gradient, each element rounded once. In one pass."""
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for total, grad in pairs:
        kinds.setdefault((grad.device, grad.dtype), []).append((total, grad))
    for (device, dtype), own in kinds.items():
        sums, grads = map(list, zip(*own, strict=True))
        if dtype == torch.float64:
            torch._foreach_add_(sums, grads)
            continue
        batch = Batch(ACCUMULATE, ("fp32",), torch.float32, 0.0, (1.0,), False, 0, sums, grads, (1,) * len(own))
        choose("auto", device).step(batch)
