"""Averages that stand in for a model's weights for a while, and the weights' own numbers, kept until all have left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from collage.backends import choose
from collage.fp8.owning import scale_of
from collage.optimizers.edits import LENT, LENT_AT
from collage.saying import warn
from collage.sharding import any_dtensor, local, reshard, versions_of

log = logging.getLogger("collage")

Write = Callable[[Tensor], None]  # writes this rank's part of a number, rounded to the tensor's dtype


class _Loan:
    """One parameter: its own numbers, and those who stand in for them, in the order in which they came."""

    def __init__(self, name: str, param: nn.Parameter) -> None:
        self.name, self.param, self.own = name, param, local(param.detach()).clone()
        self.scale = None if self._scale() is None else self._scale().clone()
        self.lenders: dict[object, Write] = {}
        self.address, self.versions = 0, [0]  # of what was written last

    @property
    def last(self) -> Write:
        return list(self.lenders.values())[-1]

    def value(self) -> Tensor:
        """What the model has now, in float32."""
        result = torch.empty_like(self.own, dtype=torch.float32)
        self.last(result)
        return result

    def _scale(self) -> Any:
        """What an e4m3 parameter has for each of this rank's rows."""
        scale = scale_of(self.param)
        return None if scale is None else local(scale)

    def _write(self, part: Tensor, scale: Tensor | None) -> None:
        """What the model has now, into a tensor like the parameter."""
        if scale is None:
            self.last(part)
        else:
            planes = part, torch.empty_like(part, dtype=torch.int8), scale
            choose("auto", part.device).encode("e4m3+int8", [self.value()], [planes])

    def enter(self, lender: object, write: Write) -> None:
        self.lenders[lender] = write
        try:
            self.show()
        except BaseException:
            del self.lenders[lender]
            self.show()
            raise

    def leave(self, lender: object) -> None:
        """Nobody has to be the last to leave, or the first: the model then has who is still there."""
        self.tell_of_writes()
        del self.lenders[lender]
        self.show()

    def show(self) -> None:
        part = local(self.param).detach()
        LENT_AT.discard(self.address)
        self.address = part.data_ptr()
        if self.lenders:
            LENT[id(self.param)] = self.value
            LENT_AT.update({self.address} - {0})  # an empty part lies nowhere
            self._write(part, self._scale())
        else:
            del LENT[id(self.param)], _LOANS[id(self.param)]
            if part.shape == self.own.shape:
                part.copy_(self.own)
                if self.scale is not None:
                    self._scale().copy_(self.scale)
        self.versions = self.count()

    def count(self) -> list[int]:
        """Of writes to it."""
        return versions_of([self.param], [local(self.param)])

    def tell_of_writes(self) -> None:
        """Say what is dropped: a warning where most of it was written to, as by load_state_dict."""
        part = local(self.param).detach()
        if (self.address, self.versions) == (part.data_ptr(), self.count()):
            return
        expected = torch.empty_like(self.own)
        self._write(expected, None if self.scale is None else torch.empty_like(self.scale))
        count = int((part != expected).sum()) if part.shape == expected.shape else part.numel()
        whose = "this rank's" if any_dtensor([self.param]) else "its"
        text = f"param '{self.name}': {count} of {whose} {part.numel()} weights were written to inside averaged()"
        if 2 * count > part.numel():
            warn(f"{text}; this is dropped, its own are back")
        elif count:
            log.info("%s; this is dropped", text)


_LOANS: dict[int, _Loan] = {}  # by the id of the parameter, which a loan keeps alive


@contextmanager
def lent(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    write: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Inside, the model's parameters have what `write` writes for their names; afterwards their own numbers again."""
    this = object()
    try:
        with torch.no_grad():
            for name, param in params.items():
                loan = _LOANS.get(id(param)) or _LOANS.setdefault(id(param), _Loan(name, param))
                loan.enter(this, partial(write, name))
        yield
    finally:
        reshard(model)
        with torch.no_grad():
            for loan in [loan for loan in _LOANS.values() if this in loan.lenders]:
                loan.leave(this)
