"""The shadow: the same rule in float32 on one element in N, fed with the run's own gradients.

Of elementwise rules this is, for those elements, exactly the run that float32 would have made of these gradients;
parameters of other rules are left out. It sees what the sums of a step cannot: a second moment that stuck long ago.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from collage.backends import Batch, Row, reference
from collage.collectives import Spread, spreads_of
from collage.formats import Format, format_of
from collage.layout import Planes
from collage.monitor.following import Following, carry_out
from collage.monitor.sampling import Sampling, components, value
from collage.rules import Rule
from collage.sharding import layouts_of
from collage.strategies import STRATEGIES, Strategy


class Placed(Protocol):
    """A parameter: its name, the key of its random bits, its group's and its own place, and itself, maybe a DTensor."""

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> int: ...

    @property
    def group_index(self) -> int: ...

    @property
    def position(self) -> int: ...

    @property
    def tensor(self) -> Tensor: ...


Stepping = tuple[Sequence[Placed], Batch]  # parameters, and the batch whose rows are their step


def followed(stepping: Iterable[Stepping]) -> list[Stepping]:
    """Those of elementwise rules."""
    return [(parameters, batch) for parameters, batch in stepping if batch.rule.elementwise]


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


# What a strategy beside the run lost of the parameters whose parts the same ranks hold: its SUMS, and its moments.
Beside = dict[tuple[str, Spread | None], tuple[list[float], Sampled]]


class _Met(NamedTuple):
    """A parameter as it was met: what tells it apart from another of its name, and what is followed of it."""

    of: tuple[Any, ...]
    sampling: Sampling
    spread: Spread | None


class Follower(Protocol):
    """What follows the steps of an optimizer: a shadow."""

    def before(self, stepping: Sequence[Stepping], due: bool, changed: Container[str] = ()) -> None: ...

    def after(self, stepping: Sequence[Stepping], due: bool) -> tuple[dict[str, Sampled], Beside]: ...


class Shadow:
    """Follows one element in ``stride`` of every parameter (of this rank's part), as `Sampling` takes them."""

    def __init__(self, stride: int, strategies: Sequence[Strategy]) -> None:
        self.stride = stride
        self._exact = Following(STRATEGIES["fp32"])
        self._beside = [Following(strategy) for strategy in strategies]
        self._met: dict[str, _Met] = {}
        self._before: list[Planes] = []  # theta's components in each batch of a measured step

    def before(self, stepping: Sequence[Stepping], due: bool, changed: Container[str] = ()) -> None:
        """Meet new parameters, follow those that others changed, remember theta if the step is to be measured."""
        stepping = followed(stepping)
        for parameters, batch in stepping:
            layouts = layouts_of([parameter.tensor for parameter in parameters])
            for parameter, layout, row in zip(parameters, layouts, batch.rows(), strict=True):
                met, of = self._met.get(parameter.name), (row.shape, layout, batch.rule)
                if met is None or met.of != of:
                    self._meet(parameter, of, batch, row)
                elif parameter.name in changed:
                    for one in (self._exact, *self._beside):
                        one.follow(parameter.name, self._value([parameter.name], batch.formats[0], [row.slots[0]]))
        if due:
            self._before = [self._components(*alike) for alike in self._alike(stepping)]

    def _meet(self, parameter: Placed, of: tuple[Any, ...], batch: Batch, row: Row) -> None:
        sampling, name = Sampling(parameter.tensor, self.stride), parameter.name
        self._met[name] = _Met(of, sampling, spreads_of([parameter.tensor])[0])
        values = [self._value([name], fmt, [own]) for fmt, own in zip(batch.formats, row.slots, strict=True)]
        for one in (self._exact, *self._beside):
            one.meet(name, parameter.key, sampling, batch.rule, values)

    def _joined(self, names: Sequence[str], tensors: Iterable[Tensor], per: int | None = 1) -> Tensor:
        """These parameters' planes, or gradients, sampled, in one."""
        return torch.cat([self._met[name].sampling.take(own, per) for name, own in zip(names, tensors, strict=True)])

    def _planes(self, names: Sequence[str], fmt: Format, slots: Sequence[Planes]) -> list[Tensor]:
        """A slot's planes, sampled, of all these parameters in one."""
        every = zip(fmt.planes, zip(*slots, strict=True), strict=True)
        return [self._joined(names, own, plane.per) for plane, own in every]

    def _value(self, names: Sequence[str], format: str, slots: Sequence[Planes]) -> Tensor:
        """The numbers that a slot's planes stand for, float32, sampled, of all these parameters in one."""
        fmt = format_of(format)
        return value(fmt, self._planes(names, fmt, slots))

    def _components(self, parameters: Sequence[Placed], batch: Batch) -> Planes:
        """Theta's components as the optimizer has them, sampled, of all parameters of a batch in one."""
        fmt, names = format_of(batch.formats[0]), [parameter.name for parameter in parameters]
        return components(fmt, self._planes(names, fmt, [row.slots[0] for row in batch.rows()]))

    def after(self, stepping: Sequence[Stepping], due: bool) -> tuple[dict[str, Sampled], Beside]:
        """Follow the step. Returns, if it is measured, each parameter's sums and each other strategy's."""
        sampled: dict[str, Sampled] = {}
        beside: Beside = {}
        for k, (parameters, batch) in enumerate(self._alike(followed(stepping))):
            names = tuple(parameter.name for parameter in parameters)
            g = self._joined(names, batch.grads).float()
            exact = self._exact.batch(names, batch, g)
            delta = self._exact.intended(exact) if due else None
            carry_out(exact)
            if delta is not None:
                sampled |= self._compare(parameters, batch, delta, self._before[k])
            for one in self._beside:
                own = one.batch(names, batch, g, due)
                carry_out(own)
                if due:
                    key = str(one.strategy), self._met[names[0]].spread
                    sums, sample = beside.get(key, ([0.0] * len(reference.SUMS), Sampled()))
                    moments = self._moments(one.values(names, batch.rule), names, batch.rule)
                    total = [a + b for a, b in zip(sums, torch.stack([*own.sums]).sum(0).tolist(), strict=True)]
                    beside[key] = total, sample + Sampled(*moments.flatten(1).sum(1).tolist())
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
        sizes = torch.tensor(self._exact.sizes(names), dtype=torch.int64, device=delta.device)
        owner = torch.repeat_interleave(sizes)
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
        """Parameters that share a batch, step number, device, ranks and width of runs can step as one tensor."""
        found: list[Stepping] = []
        for parameters, batch in stepping:
            kinds: dict[tuple[Any, ...], list[int]] = {}
            for k, (p, step, theta) in enumerate(zip(parameters, batch.steps, batch.visible(), strict=True)):
                met = self._met[p.name]
                kinds.setdefault((step, theta.device, met.sampling.run, met.spread), []).append(k)
            found += [([parameters[k] for k in positions], batch.take(positions)) for positions in kinds.values()]
        return found
