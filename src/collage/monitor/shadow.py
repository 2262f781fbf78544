"""The shadow: the same rule in float32 on one element in N, fed with the run's own gradients.

The rules are elementwise, so for those elements this is exactly the run that float32 would have made of these
gradients. It sees what the sums of a step cannot: a second moment that stuck long ago.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from collage.backends import Batch, choose, reference
from collage.backends.batch import cut
from collage.formats import Format, format_of, split
from collage.layout import Planes
from collage.monitor.sampling import Sampling
from collage.rules import Rule
from collage.rules.folding import tensors
from collage.strategies import STRATEGIES, Strategy, is_small


class Placed(Protocol):
    """A parameter: its name, its group's and its own place, and itself, unsharded or a DTensor."""

    @property
    def name(self) -> str: ...

    @property
    def group_index(self) -> int: ...

    @property
    def position(self) -> int: ...

    @property
    def tensor(self) -> Tensor: ...


Stepping = tuple[Sequence[Placed], Batch]  # parameters, and the batch whose rows are their step


@dataclass(slots=True)
class Sampled:
    """Sums over the sampled elements. Where steps are added up, v and m are those of the last, dot and norm2 of all."""

    v: float = 0.0
    v_shadow: float = 0.0
    m_error2: float = 0.0
    m_shadow2: float = 0.0
    dot: float = 0.0  # <shadow's update, arrived>
    norm2: float = 0.0  # |shadow's update|**2

    def __add__(self, other: Sampled) -> Sampled:
        return Sampled(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def intended(batch: Batch, slots: Sequence[Planes], g: Tensor) -> Tensor:
    """The update that a batch's rule makes of these planes and gradients in its first step, before it is rounded."""
    constants = tensors(batch.constants(batch.steps[0]), batch.register, g.device)
    formats = map(format_of, batch.formats)
    numbers = tuple(fmt.load(planes, batch.register) for fmt, planes in zip(formats, slots, strict=True))
    delta = batch.rule.update(numbers, reference.gradient(batch, g), constants).delta
    assert delta is not None, f"rule '{batch.rule.name}' has no theta"
    return delta


Beside = dict[str, tuple[list[float], Sampled]]


class _Run:
    """One strategy on the sampled elements. Parameters that step together lie in one tensor."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._small: dict[str, bool] = {}
        self._planes: dict[str, list[Tensor]] = {}  # of each parameter: views of those below, once it has stepped
        self._joined: dict[tuple[str, ...], list[Tensor]] = {}

    def formats(self, name: str, rule: Rule) -> tuple[str, ...]:
        return (self.strategy.small if self._small[name] else self.strategy).formats(rule.roles)

    def meet(self, name: str, small: bool, rule: Rule, values: Sequence[Tensor]) -> None:
        """Start a parameter at these numbers of theta and the rule's other slots, sampled."""
        self._small[name] = small
        pairs = zip(map(format_of, self.formats(name, rule)), values, strict=True)
        self._joined = {names: planes for names, planes in self._joined.items() if name not in names}
        self._planes[name] = [plane for fmt, x in pairs for plane in split(fmt, x)]

    def follow(self, name: str, theta: Tensor) -> None:
        """Go on from these weights; the other slots stay."""
        for plane, value in zip(self._planes[name], split(format_of(self.strategy.param), theta), strict=False):
            plane.copy_(value)

    def planes(self, names: tuple[str, ...]) -> list[Tensor]:
        """The planes of every slot, of all these parameters in one."""
        if names not in self._joined:
            self._join(names)
        return self._joined[names]

    def _join(self, names: tuple[str, ...]) -> None:
        sizes = [len(self._planes[name][0]) for name in names]
        joined = [torch.cat(parts) for parts in zip(*map(self._planes.__getitem__, names), strict=True)]
        for name, *parts in zip(names, *(torch.split(plane, sizes) for plane in joined), strict=True):
            self._planes[name] = parts
        self._joined = {others: planes for others, planes in self._joined.items() if not set(others) & set(names)}
        self._joined[names] = joined

    def values(self, names: tuple[str, ...], rule: Rule) -> list[Tensor]:
        """The numbers that the planes stand for, float32."""
        formats = self.formats(names[0], rule)
        return [format_of(f).value(own) for f, own in zip(formats, cut(formats, self.planes(names)), strict=True)]

    def batch(self, names: tuple[str, ...], like: Batch, g: Tensor, key: int, sums: Sequence[Tensor] = ()) -> Batch:
        """The step that an optimizer of this strategy would make where that of the run makes its own."""
        return Batch(
            like.rule, self.formats(names[0], like.rule), self.strategy.register, like.lr, like.hyper, like.maximize,
            like.seed, self.planes(names), [g], like.steps[:1], [key], (), sums, scale=like.scale,
        )  # fmt: skip

    def intended(self, batch: Batch) -> Tensor:
        """The update that a batch of `batch` will make, before it is rounded into theta."""
        return intended(batch, cut(batch.formats, batch.planes), batch.grads[0])


def _step(batch: Batch) -> None:
    choose("auto", batch.grads[0].device).step(batch)


class Shadow:
    """Follows one element in ``stride`` of every parameter (its rank's part), as `Sampling` takes them."""

    def __init__(self, stride: int, strategies: Sequence[Strategy]) -> None:
        self.stride = stride
        self._exact = _Run(STRATEGIES["fp32"])
        self._beside = [_Run(strategy) for strategy in strategies]
        self._met: dict[str, tuple[Sampling, Rule]] = {}
        self._before: list[Planes] = []  # theta's components in each batch of a measured step

    def before(self, stepping: Sequence[Stepping], due: bool, changed: Container[str] = ()) -> None:
        """Meet new parameters, follow those that others changed, remember theta if the step is to be measured."""
        for parameters, batch in stepping:
            for parameter, row in zip(parameters, batch.rows(), strict=True):
                sampling = Sampling(row.shape, is_small(parameter.tensor.shape), self.stride)
                own, met = [parameter.name], self._met.get(parameter.name) == (sampling, batch.rule)
                self._met[parameter.name] = sampling, batch.rule
                if not met:
                    pairs = zip(batch.formats, row.slots, strict=True)
                    values = [self._value(own, name, [planes]) for name, planes in pairs]
                    for run in (self._exact, *self._beside):
                        run.meet(parameter.name, sampling.small, batch.rule, values)
                elif parameter.name in changed:
                    for run in (self._exact, *self._beside):
                        run.follow(parameter.name, self._value(own, batch.formats[0], [row.slots[0]]))
        if due:
            self._before = [self._components(*alike) for alike in self._alike(stepping)]

    def _joined(self, names: Sequence[str], tensors: Iterable[Tensor], per: int | None = 1) -> Tensor:
        """These parameters' planes, or gradients, sampled, in one."""
        return torch.cat([self._met[name][0].take(own, per) for name, own in zip(names, tensors, strict=True)])

    def _planes(self, names: Sequence[str], fmt: Format, slots: Sequence[Planes]) -> list[Tensor]:
        """A slot's planes, sampled, of all these parameters in one."""
        every = zip(fmt.planes, zip(*slots, strict=True), strict=True)
        return [self._joined(names, own, plane.per) for plane, own in every]

    def _value(self, names: Sequence[str], format: str, slots: Sequence[Planes]) -> Tensor:
        """The numbers that a slot's planes stand for, float32, sampled, of all these parameters in one."""
        fmt = format_of(format)
        return fmt.value(self._planes(names, fmt, slots))

    def _components(self, parameters: Sequence[Placed], batch: Batch) -> Planes:
        """Theta's components as the optimizer has them, sampled, of all parameters of a batch in one."""
        fmt, names = format_of(batch.formats[0]), [parameter.name for parameter in parameters]
        return fmt.components(self._planes(names, fmt, [row.slots[0] for row in batch.rows()]))

    def after(self, stepping: Sequence[Stepping], due: bool) -> tuple[dict[str, Sampled], Beside]:
        """Follow the step. Returns, if it is measured, each parameter's sums and each other strategy's."""
        sampled: dict[str, Sampled] = {}
        beside: Beside = {}
        for k, (parameters, batch) in enumerate(self._alike(stepping)):
            names, key = tuple(p.name for p in parameters), parameters[0].group_index
            g = self._joined(names, batch.grads).float()
            exact = self._exact.batch(names, batch, g, key)
            delta = self._exact.intended(exact) if due else None
            _step(exact)
            if delta is not None:
                sampled |= self._compare(parameters, batch, delta, self._before[k])
            for run in self._beside:
                sums = torch.zeros(1, len(reference.SUMS), dtype=torch.float64, device="cpu")
                _step(run.batch(names, batch, g, key, list(sums) if due else ()))
                if due:
                    old, sample = beside.get(str(run.strategy), ([0.0] * len(reference.SUMS), Sampled()))
                    values = run.values(names, batch.rule)
                    moments = Sampled(*self._moments(values, names, batch.rule).flatten(1).sum(1).tolist())
                    total = [a + b for a, b in zip(old, sums[0].tolist(), strict=True)]
                    beside[str(run.strategy)] = total, sample + moments
        self._before = []
        return sampled, beside

    def _compare(
        self, parameters: Sequence[Placed], batch: Batch, delta: Tensor, before: Sequence[Tensor]
    ) -> dict[str, Sampled]:
        """The run's sampled elements against the shadow's, parameter by parameter."""
        arrived = torch.zeros_like(delta, dtype=torch.float64)
        for old, new in reversed(list(zip(before, self._components(parameters, batch), strict=True))):
            arrived += new.double() - old.double()
        rows, names = list(batch.rows()), tuple(p.name for p in parameters)
        values = [self._value(names, name, [row.slots[k] for row in rows]) for k, name in enumerate(batch.formats)]
        terms = [self._moments(values, names, batch.rule)]
        terms.append(torch.stack([delta.double() * arrived, delta.double() * delta.double()]))
        sizes = [self._met[name][0].take(row.slots[0][0]).numel() for name, row in zip(names, rows, strict=True)]
        owner = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64, device=delta.device))
        totals = torch.zeros(6, len(rows), dtype=torch.float64, device=delta.device)
        totals.index_add_(1, owner, torch.cat(terms).flatten(1))
        return {name: Sampled(*own) for name, own in zip(names, totals.T.tolist(), strict=True)}

    def _moments(self, values: Sequence[Tensor], names: tuple[str, ...], rule: Rule) -> Tensor:
        """[4, sampled] float64: what v, v_shadow, m_error2 and m_shadow2 of `Sampled` are the sums of."""
        exact = self._exact.values(names, rule)
        nothing = torch.zeros_like(values[0], dtype=torch.float64)

        def pair(role: str) -> tuple[Tensor, Tensor]:
            slot = rule.slot_of(role)
            return (nothing, nothing) if slot is None else (values[slot].double(), exact[slot].double())

        (m, m_shadow), (v, v_shadow) = pair("momentum"), pair("variance")
        return torch.stack([v, v_shadow, (m - m_shadow) ** 2, m_shadow**2])

    def _alike(self, stepping: Iterable[Stepping]) -> list[Stepping]:
        """Parameters that share a batch, step number, device and width of runs can step as one tensor."""
        found: list[Stepping] = []
        for parameters, batch in stepping:
            kinds: dict[tuple[Any, ...], list[int]] = {}
            for k, (p, step, theta) in enumerate(zip(parameters, batch.steps, batch.visible(), strict=True)):
                kinds.setdefault((step, theta.device, self._met[p.name][0].width), []).append(k)
            found += [([parameters[k] for k in positions], batch.take(positions)) for positions in kinds.values()]
        return found
