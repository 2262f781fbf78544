"""One strategy on the elements that a shadow follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collage.backends import Batch, choose, reference
from collage.backends.batch import cut, stochastic
from collage.formats import format_of, split
from collage.layout import Planes
from collage.monitor.sampling import Sampling
from collage.rules import Rule
from collage.rules.folding import tensors
from collage.strategies import Strategy


def intended(batch: Batch, slots: Sequence[Planes], g: Tensor) -> Tensor:
    """The update that a batch's rule makes of these planes and gradients in its first step, before it is rounded."""
    constants = tensors(batch.constants(batch.steps[0]), batch.register, g.device)
    formats = map(format_of, batch.formats)
    numbers = tuple(fmt.load(planes, batch.register) for fmt, planes in zip(formats, slots, strict=True))
    delta = batch.rule.update(numbers, reference.gradient(batch, g), constants).delta
    assert delta is not None, f"rule '{batch.rule.name}' has no theta"
    return delta


class Following:
    """One strategy on the sampled elements. Parameters that step together lie in one tensor."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._met: dict[str, tuple[int, Sampling]] = {}  # key and sampling of each parameter
        self._planes: dict[str, list[Tensor]] = {}  # of each parameter: views of those below, once it has stepped
        self._joined: dict[tuple[str, ...], list[Tensor]] = {}

    def formats(self, name: str, rule: Rule) -> tuple[str, ...]:
        """Those of a parameter's slots."""
        return self._of(name).formats(rule.roles)

    def _of(self, name: str) -> Strategy:
        """The strategy of a parameter; where its sample has no rows, one without blocks or scales."""
        return self.strategy.small.beside if self._met[name][1].flat else self.strategy

    def meet(self, name: str, key: int, sampling: Sampling, rule: Rule, values: Sequence[Tensor]) -> None:
        """Start a parameter at these numbers of theta and the rule's other slots, sampled."""
        self._met[name] = key, sampling
        pairs = zip(map(format_of, self.formats(name, rule)), values, strict=True)
        self._joined = {names: planes for names, planes in self._joined.items() if name not in names}
        self._planes[name] = [plane for fmt, x in pairs for plane in split(fmt, x)]

    def follow(self, name: str, theta: Tensor) -> None:
        """Go on from these weights; the other slots stay."""
        for plane, value in zip(self._planes[name], split(format_of(self._of(name).param), theta), strict=False):
            plane.copy_(value)

    def sizes(self, names: Sequence[str]) -> list[int]:
        """How many elements are followed of each."""
        return [self._planes[name][0].numel() for name in names]

    def planes(self, names: tuple[str, ...]) -> list[Tensor]:
        """The planes of every slot, of all these parameters in one."""
        if names not in self._joined:
            self._join(names)
        return self._joined[names]

    def _join(self, names: tuple[str, ...]) -> None:
        joined = [torch.cat(parts) for parts in zip(*map(self._planes.__getitem__, names), strict=True)]
        for name, *parts in zip(names, *(self._split(names, plane) for plane in joined), strict=True):
            self._planes[name] = parts
        self._joined = {others: planes for others, planes in self._joined.items() if not set(others) & set(names)}
        self._joined[names] = joined

    def _split(self, names: Sequence[str], joined: Tensor) -> Sequence[Tensor]:
        return torch.split(joined, [len(self._planes[name][0]) for name in names])

    def values(self, names: tuple[str, ...], rule: Rule) -> list[Tensor]:
        """The numbers that the planes stand for, float32."""
        formats = self.formats(names[0], rule)
        return [format_of(f).value(own) for f, own in zip(formats, cut(formats, self.planes(names)), strict=True)]

    def batch(self, names: tuple[str, ...], like: Batch, g: Tensor, measured: bool = False) -> Batch:
        """The step that an optimizer of this strategy would make where that of the run makes its own.

        In one row; where it draws random bits in one for each parameter, as they are a function of the parameter's key
        and of the place in its sample: the same for any grouping of parameters, and for any number of ranks.
        """
        formats, planes, grads = self.formats(names[0], like.rule), self.planes(names), [g]
        keys, regions = [], []
        if stochastic(like.rule, formats):
            planes = [plane for name in names for plane in self._planes[name]]
            grads = list(self._split(names, g))
            keys = [self._met[name][0] for name in names]
            regions = [self._met[name][1].drawn(own.shape) for name, own in zip(names, grads, strict=True)]
        sums = torch.zeros(len(grads) if measured else 0, len(reference.SUMS), dtype=torch.float64, device="cpu")
        return Batch(
            like.rule, formats, self.strategy.register, like.lr, like.hyper, like.maximize, like.seed, planes, grads,
            list(like.steps[:1]) * len(grads), keys, regions, list(sums), scale=like.scale,
        )  # fmt: skip

    def intended(self, batch: Batch) -> Tensor:
        """The update that a batch of `batch` will make, before it is rounded into theta."""
        return intended(batch, cut(batch.formats, batch.planes), batch.grads[0])


def carry_out(batch: Batch) -> None:
    """Carry it out."""
    choose("auto", batch.grads[0].device).step(batch)
