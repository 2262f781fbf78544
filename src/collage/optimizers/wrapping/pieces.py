"""What an optimizer is given of a parameter: all of it, or so many neighbours where it updates each element by itself.

Parts of a large parameter stay in the cache from planes to numbers and back, and need less memory. They begin at
multiples of BLOCK elements, so that the sums of a monitor, which are added up in such blocks, are those of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from collage.backends import Region
from collage.backends.reference import BLOCK
from collage.formats import format_of
from collage.layout import as_rows
from collage.optimizers.parameters import Parameter
from collage.optimizers.planes import zeros
from collage.optimizers.wrapping.foreign import Values, copied
from collage.optimizers.wrapping.slots import Formats, is_shaped, keys_of
from collage.sharding import any_dtensor, local, region

DECODED = 2  # float32 numbers of an element while its optimizer steps, beside its states: theta and the gradient
MADE = 2  # what the optimizer itself makes meanwhile, in memory of its own
ELEMENTWISE = (  # of which an element's update is known to depend on nothing but that element, whatever their settings
    *(torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax),
    *(torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD),
)


@dataclass(slots=True)
class Piece:
    """A parameter, or a part of one.

    column: its position among those that step together.
    states: how many the optimizer keeps of its shape.
    begin, end: in elements, or in rows (dimension 0) where a format has blocks of rows; None: it is all of it.
    """

    parameter: Parameter
    formats: Formats
    column: int
    states: int
    is_new: bool = False  # the optimizer has no state of it yet
    begin: int | None = None
    end: int | None = None
    by_rows: bool = False
    last: bool = True
    like: Tensor = field(init=False)  # its part of the parameter
    numel: int = field(init=False)  # elements of it on this rank

    def __post_init__(self) -> None:
        self.like = self.of(self.parameter.tensor.detach())
        self.numel = local(self.like).numel()

    @property
    def numbers(self) -> int:
        """Float32 numbers that there are of it while the optimizer steps."""
        return self.numel * (DECODED + MADE + self.states)

    def of(self, x: Tensor) -> Tensor:
        """Its part of a tensor of the parameter's shape, or of a plane with words for blocks of rows: a view."""
        return x if self.end is None else (x if self.by_rows else x.view(-1))[self.begin : self.end]

    def region(self) -> Region:
        """Where it lies in the whole, which random bits depend on."""
        if self.end is None or self.begin is None:
            return region(self.parameter.tensor)
        sizes = tuple(self.like.shape)
        return Region(sizes, (self.begin, *(0,) * (len(sizes) - 1)), self.like.stride())

    def taken(self, state: Values) -> Values:
        """The optimizer's state of it: views, and copies of what all parts have in common, which the last moves."""
        if self.is_new:
            return {}
        if self.end is None:
            return state
        planes = self._planes(state, self.parameter.tensor)
        return {k: self.of(x) if k in planes else x if self.last else copied(x) for k, x in state.items()}

    def put(self, state: Values, kept: Values) -> None:
        """Store the optimizer's state of it, as `taken` had it, in that of the parameter."""
        if self.end is None:
            for key in state.keys() - kept.keys():
                del state[key]
            state.update(kept)
            return
        param = self.parameter.tensor.detach()
        for name, fmt in self.formats.of_state(kept, self.like).items():
            if any(key not in state for key in keys_of(name, fmt)):
                state.update(zip(keys_of(name, fmt), zeros(format_of(fmt), param), strict=True))
        planes = self._planes(kept, self.like)
        for key, x in kept.items():
            if key not in planes:
                state.update({key: x} if self.last else {})
                continue
            if key not in state:
                state[key] = torch.empty_like(param, dtype=x.dtype)
            if self.of(state[key]).data_ptr() != x.data_ptr():
                self.of(state[key]).copy_(x)

    def _planes(self, state: Values, like: Tensor) -> set[str]:
        """Keys of what has numbers for each element, or words for blocks of them."""
        known = {key for name, fmt in self.formats.of_state(state, like).items() for key in keys_of(name, fmt)}
        return known | {key for key, x in state.items() if is_shaped(x, like)}


def cut(piece: Piece, most: int) -> Iterator[Piece]:
    """A whole parameter in parts, none of which takes more numbers, if blocks allow it."""
    param = piece.parameter.tensor
    rows, columns = as_rows(param.shape)
    names = (*piece.formats.strategy.formats(), *piece.formats.given.values())
    by_rows = not all(format_of(name).elementwise for name in names)
    width = columns if by_rows else 1
    least = BLOCK // math.gcd(width, BLOCK)
    count = max(least, most * piece.numel // (piece.numbers * width) // least * least)
    end = rows if by_rows else param.numel()
    for begin in range(0, end, count):
        stop = min(begin + count, end)
        yield replace(piece, begin=begin, end=stop, by_rows=by_rows, last=stop == end)


def can_be_cut(tensors: Sequence[object]) -> bool:
    """Whether all numbers of a parameter and its states lie one after the other, on this rank."""
    own = [x for x in tensors if isinstance(x, Tensor) and x.dim()]
    return bool(own) and not any_dtensor(own) and all(x.is_contiguous() for x in own)


def is_known_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is known to update each element by itself."""
    return type(optimizer) in ELEMENTWISE
