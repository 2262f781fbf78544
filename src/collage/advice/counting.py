"""What a step of a given size cannot move in weights, and what a decay cannot reach: counts, by format.

A weight *cannot move* in a format if, from the state it would start in (the stored weight split into the format's
planes), growing it by +lr and by -lr both leave every plane as it is. lr is the size of Adam's typical update. In a
stochastic format both must hold whatever the random bits. This looks at one step; the floors say what happens to many
equal ones (see `collage.floors`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from collage import mcf
from collage.floors import MANTISSAS, THETA_FORMATS, binades, decay_floors, movable_below, register_of, unchanged
from collage.formats import format_of, split
from collage.rules.folding import rounded

CHUNK = 1 << 18  # elements evaluated at once: their temporaries stay in the cache
_HALF = (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class Tally:
    """Counts over the weights of one kind."""

    weights: int = 0
    exactly_one: int = 0
    nonzero: int = 0
    stuck: dict[str, int] = field(default_factory=lambda: dict.fromkeys(THETA_FORMATS, 0))
    undecayed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(THETA_FORMATS, 0))  # of the non-zero ones

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.weights + other.weights, self.exactly_one + other.exactly_one, self.nonzero + other.nonzero,
            {name: self.stuck[name] + other.stuck[name] for name in self.stuck},
            {name: self.undecayed[name] + other.undecayed[name] for name in self.undecayed},
        )  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations this short cost more to share among threads than to do: up to 20 times more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def count(tensor: Tensor, tally: Tally, lr: float, w: float, norm: bool) -> int:
    """Add one tensor to its kind's tally. Returns how many of its weights are Inf or NaN, which are left out."""
    not_finite = 0
    for x, counts in _distinct(tensor):
        finite = x.isfinite()
        if not bool(finite.all()):
            not_finite += _sum(~finite, counts)
            x, counts = x[finite], None if counts is None else counts[finite]
        tally.weights += _sum(torch.ones_like(x, dtype=torch.bool), counts)
        tally.nonzero += _sum(x != 0, counts)
        tally.exactly_one += _sum(x == 1, counts) if norm else 0
        for name in THETA_FORMATS:
            tally.stuck[name] += stuck(name, x, counts, lr)
        if w:
            _count_undecayed(tally, x, counts, w)
    return not_finite


def _distinct(tensor: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(float32 values, how often each occurs or None for once), chunk by chunk.

    A 16-bit tensor has at most 65,536 distinct values, so a large one is counted once and evaluated on those alone.
    """
    flat = tensor.reshape(-1)
    if flat.dtype not in _HALF or flat.numel() <= CHUNK:
        yield from ((chunk.float(), None) for chunk in torch.split(flat, CHUNK))
        return
    counts = torch.zeros(1 << 16, dtype=torch.int64, device="cpu")
    for chunk in torch.split(flat.view(torch.int16), CHUNK):
        counts += torch.bincount(chunk.int() + (1 << 15), minlength=1 << 16)
    codes = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16, device="cpu")
    yield codes.view(flat.dtype)[counts > 0].float(), counts[counts > 0]


def _sum(mask: Tensor, counts: Tensor | None) -> int:
    return int(mask.sum() if counts is None else counts[mask].sum())


def stuck(name: str, x: Tensor, counts: Tensor | None, lr: float, arithmetic: str | None = None) -> int:
    """How many weights neither +lr nor -lr moves; by default in the arithmetic of the format's first strategy."""
    fmt, register = format_of(name), register_of(name, arithmetic)
    large = x.abs() >= movable_below(name, lr, arithmetic)
    if not bool(large.any()):
        return 0
    delta = torch.tensor(rounded(lr, register), dtype=register, device="cpu")
    planes = split(fmt, x[large])
    still = unchanged(fmt, register, planes, delta) & unchanged(fmt, register, planes, -delta)
    return _sum(still, None if counts is None else counts[large])


def _count_undecayed(tally: Tally, x: Tensor, counts: Tensor | None, w: float) -> None:
    """Add the weights that a decay of w per step does not reach: those whose mantissa has a higher decay floor."""
    nonzero = x != 0
    codes = mcf.rn(x[nonzero], torch.bfloat16).view(torch.int16).int()
    mantissas, exponents = codes & (MANTISSAS - 1), ((codes >> 7) & 0xFF) - 127
    weights = None if counts is None else counts[nonzero].double()
    for name in THETA_FORMATS:
        lowest, highest = binades(name)
        cells = (exponents.clamp(lowest, highest) - lowest) * MANTISSAS + mantissas
        histogram = torch.bincount(cells, weights, minlength=(highest - lowest + 1) * MANTISSAS).view(-1, MANTISSAS)
        for k in histogram.sum(1).nonzero().flatten().tolist():
            is_over = decay_floors(name, exponent=lowest + k) >= rounded(w, register_of(name))
            tally.undecayed[name] += int(histogram[k][is_over].sum())
