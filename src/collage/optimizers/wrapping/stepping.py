"""The step of a wrapped optimizer: a bucket of parameters at a time is decoded, given to it, and encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from collage.backends import Backend, Batch, Noise, Region, choose, operator
from collage.optimizers import edits
from collage.optimizers.base import PrecisionOptimizer
from collage.optimizers.parameters import Group, Parameter
from collage.optimizers.plan import Columns
from collage.optimizers.wrapping.bucket import Arena, Memory, aligned, buckets
from collage.optimizers.wrapping.foreign import Foreign, Values
from collage.optimizers.wrapping.pieces import DECODED, Piece, can_be_cut, cut, is_known_elementwise
from collage.optimizers.wrapping.probing import Kept, Shape, small
from collage.optimizers.wrapping.slots import Formats, packed, unpacked
from collage.sharding import any_dtensor, local
from collage.strategies import is_small

IN_CACHE = 1 << 21  # numbers of a bucket on a CPU: more of them is slower, fewer cost calls


class InBuckets(PrecisionOptimizer):
    """What a wrapped optimizer's step is.

    base: the optimizer; states: formats of its states by name; bucket_mb: MiB of float32 numbers at a time.
    """

    base: torch.optim.Optimizer
    states: Mapping[str, str]
    bucket_mb: float
    _foreign: Foreign
    _memory: Memory
    _tried: list[dict[Shape, Kept]]

    def formats_of(self, parameter: Parameter) -> Formats:
        """The formats of a parameter's states."""
        return Formats(self.strategy_of(parameter), self.states, is_small(parameter.tensor.shape))

    def _traced(self, closure: Callable[[], Any] | None) -> Any:
        raise RuntimeError("wrap: a compiled step knows the rules of this package alone; call opt.step() uncompiled")

    def _is_skipped(self) -> bool:
        return bool(getattr(self, "found_inf", None))  # waits: the optimizer itself would not look

    def _count_on_device(self) -> None:
        """Nothing is: the optimizer's own counters stay where it has them."""

    def _looks_in_the_step(self, found: Tensor) -> bool:
        return False

    def _prepare(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("wrap: its step reads counters on the host; leave opt.step() out of the CUDA graph")
        super()._prepare()
        self._foreign.forget()

    def _advance(self) -> None:
        try:
            super()._advance()
        finally:
            self._memory.release(self._most())
        self._foreign.settle(self.param_groups)

    def _batch(self, group: Group, columns: Columns, grads: Sequence[Tensor]) -> Batch:
        """Of theta: its gradients, until the optimizer has made new numbers of them."""
        scale = getattr(self, "grad_scale", None)
        return Batch(
            columns.rule, columns.formats, torch.float32, 1.0, (1.0,), False, group["seed"], columns.planes, grads, (),
            columns.keys, columns.places, (), columns.steps, 1.0 if scale is None else scale, None, columns.kept,
        )  # fmt: skip

    def _step(self, columns: Columns, batch: Batch) -> None:
        whole = operator.begun(batch, self.backend)
        assert whole is not None, "a step that is skipped ends before"
        formats = [Formats(columns.strategy, self.states, small) for small in (False, True)]
        devices: dict[torch.device, list[Piece]] = {}
        for k, plan in enumerate(columns.plans):
            own = formats[is_small(plan.parameter.tensor.shape)]
            pieces = self._pieces(plan.parameter, own, k, whole.own(k))
            devices.setdefault(plan.planes[0].device, []).extend(pieces)
        for device, pieces in devices.items():
            for bucket in self._buckets(pieces, device):
                self._bucket(columns.group, bucket, whole, choose(self.backend, device))
        edits.written(columns.thetas, columns.seen, columns.sharded)

    def _pieces(self, parameter: Parameter, formats: Formats, column: int, planes: Sequence[Tensor]) -> list[Piece]:
        """A parameter, in parts where it is too large for a bucket and may be cut. planes: of theta."""
        state = self.base.state.get(parameter.tensor, {})
        piece = Piece(parameter, formats, column, self._shaped(parameter), is_new=not state)
        most = self._most(planes[0].device)
        if (
            piece.numbers <= most
            or not is_known_elementwise(self.base)
            or not can_be_cut([parameter.tensor, *planes, *state.values()])
        ):
            return [piece]
        return list(cut(piece, most))

    def _buckets(self, pieces: Sequence[Piece], device: torch.device) -> Iterator[list[Piece]]:
        """Those that are taken together."""
        for positions in buckets([piece.numbers for piece in pieces], self._most(device)):
            yield [pieces[k] for k in positions]

    def _most(self, device: torch.device | None = None) -> int:
        """Float32 numbers of a bucket."""
        most = int(self.bucket_mb * 2**20) // 4
        return min(most, IN_CACHE) if device is not None and device.type == "cpu" else most

    def _shaped(self, parameter: Parameter) -> int:
        """How many states of its shape the optimizer keeps of a parameter."""
        return len(self._kept(parameter.group_index, parameter.tensor).shaped)

    def _kept(self, index: int, param: Tensor) -> Kept:
        """What the optimizer keeps of a parameter of that group, as far as was tried."""
        return self._tried[index].get(small(param), Kept({}))

    def _bucket(self, group: Group, pieces: Sequence[Piece], batch: Batch, backend: Backend) -> None:
        """The step of these. batch: of theta, with the gradients of all that step together."""
        arena = self._arena(pieces)
        theta = [nn.Parameter(arena.like(piece.like)) for piece in pieces]
        values = [local(own.detach()) for own in theta]
        planes = [[piece.of(plane) for plane in batch.own(piece.column)] for piece in pieces]
        backend.decode(batch.formats[0], planes, values)
        for own, piece in zip(theta, pieces, strict=True):
            own.grad = _unscaled(piece.of(batch.grads[piece.column]), float(batch.scale), arena.like(piece.like))
        kept = self._taken(pieces)
        states = self._run("step", group, pieces, theta, kept, arena, backend)
        backend.step(_part(batch, pieces, planes, values))
        self._store(pieces, states, kept, arena, backend)

    def _arena(self, pieces: Sequence[Piece]) -> Arena:
        """Memory for their bucket."""
        device = local(pieces[0].parameter.tensor).device if pieces else torch.device("cpu")
        return self._memory.take(sum(aligned(own.numel) * (DECODED + own.states) for own in pieces), device)

    def _taken(self, pieces: Sequence[Piece]) -> list[Values]:
        """The optimizer's states of these, as they are kept."""
        return [piece.taken(self.base.state.get(piece.parameter.tensor, {})) for piece in pieces]

    def _run(
        self,
        method: str,
        group: Group,
        pieces: Sequence[Piece],
        theta: Sequence[nn.Parameter],
        kept: Sequence[Values],
        arena: Arena,
        backend: Backend,
    ) -> list[Values]:
        """Run a method of the optimizer on float32 numbers of theta. Returns the states that it left, unpacked."""
        given = unpacked(kept, [own.like for own in pieces], [own.formats for own in pieces], arena.like, backend)
        return self._foreign.run(group, theta, given, method)

    def _store(
        self,
        pieces: Sequence[Piece],
        states: Sequence[Values],
        kept: Sequence[Values],
        arena: Arena,
        backend: Backend,
    ) -> None:
        """Store the states that the optimizer left, in planes; nothing stays in the bucket's memory."""
        for piece, own in zip(pieces, self._packed(pieces, states, kept, backend), strict=True):
            stay = {key: x.clone() if arena.holds(x) else x for key, x in own.items()}
            piece.put(self.base.state[piece.parameter.tensor], stay)

    def _packed(
        self, pieces: Sequence[Piece], states: Sequence[Values], before: Sequence[Values], backend: Backend
    ) -> list[Values]:
        like, formats = [piece.like for piece in pieces], [piece.formats for piece in pieces]
        return packed(states, like, formats, before, self._noise(pieces), backend)

    def _piece_of(self, parameter: Parameter) -> Piece:
        return Piece(parameter, self.formats_of(parameter), 0, self._shaped(parameter))

    def _in_planes(self, parameter: Parameter, state: Values) -> Values:
        """A parameter's state, as the optimizer itself has it, as it is kept."""
        piece = self._piece_of(parameter)
        return self._packed([piece], [state], [{}], choose(self.backend, local(parameter.tensor).device))[0]

    def _noise(self, pieces: Sequence[Piece]) -> Callable[[str, list[int]], Noise]:
        """The random bits of a state, by its name, of those of these that are in the given positions."""
        placed = _are_placed(pieces)

        def noise(name: str, columns: list[int]) -> Noise:
            taken = [pieces[k] for k in columns]
            steps = [int(self.state.get(own.parameter.tensor, {}).get("step", 0)) for own in taken]
            keys, places = [own.parameter.key for own in taken], [own.region() for own in taken if placed]
            return Noise(name, taken[0].parameter.group["seed"], steps, keys, places)

        return noise

    @torch.no_grad()
    def _rewrite(self, method: str) -> None:
        """Run a method of the optimizer that writes weights, on those that have a state."""
        edits.require_own((p.tensor for p in self.parameters()), f"{method}()")
        self._foreign.forget()
        for index, group in enumerate(self.param_groups):
            devices: dict[torch.device, list[Piece]] = {}
            for p in self.parameters():
                if p.group_index == index and self.base.state.get(p.tensor):
                    devices.setdefault(local(p.tensor).device, []).append(self._piece_of(p))
            for device, pieces in (devices or {torch.device("cpu"): list[Piece]()}).items():
                for bucket in [*self._buckets(pieces, device)] or [[]]:
                    self._rewrite_bucket(method, group, bucket, choose(self.backend, device))
        self._memory.release(self._most())
        self._foreign.settle()

    def _rewrite_bucket(self, method: str, group: Group, pieces: Sequence[Piece], backend: Backend) -> None:
        arena = self._arena(pieces)
        theta = [nn.Parameter(arena.like(piece.like)) for piece in pieces]
        values = [local(own.detach()) for own in theta]
        numbers = [(piece.formats.strategy.param, self.theta(piece.parameter)) for piece in pieces]
        found = [edits.decode(*number, value) for number, value in zip(numbers, values, strict=True)]
        self.tell((p.parameter, n, p.numel) for p, n in zip(pieces, found, strict=True) if n)
        kept = self._taken(pieces)
        states = self._run(method, group, pieces, theta, kept, arena, backend)
        for k, ((fmt, planes), value) in enumerate(zip(numbers, values, strict=True)):
            backend.encode(fmt, [value], [planes], self._noise(pieces)(f"param_{method}", [k]))  # no bits of a step's
        self._store(pieces, states, kept, arena, backend)
        self._written([piece.parameter.tensor for piece in pieces])


def _unscaled(grad: Tensor, scale: float, out: Any) -> Any:
    """The gradient in float32, as the optimizer is given it, in memory of the bucket."""
    part = local(out).copy_(grad)
    if scale != 1.0:
        part.div_(torch.tensor(scale, dtype=torch.float32, device=part.device))
    return out


def _part(batch: Batch, pieces: Sequence[Piece], planes: Sequence[Sequence[Tensor]], values: list[Tensor]) -> Batch:
    """The assignment of these new numbers to theta."""
    columns = [piece.column for piece in pieces]
    places: list[Region] = [piece.region() for piece in pieces] if batch.keys and _are_placed(pieces) else []
    return replace(
        batch, planes=[plane for own in planes for plane in own], grads=values, scale=1.0, kept=None, regions=places,
        steps=[batch.steps[k] for k in columns], keys=[batch.keys[k] for k in columns] if batch.keys else (),
        sums=[batch.sums[k] for k in columns] if batch.sums else (),
    )  # fmt: skip


def _are_placed(pieces: Sequence[Piece]) -> bool:
    """Whether where they lie in a whole is to be known."""
    return any(piece.end is not None for piece in pieces) or any_dtensor(piece.parameter.tensor for piece in pieces)
