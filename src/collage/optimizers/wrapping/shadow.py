"""The shadow of a wrapped optimizer: the same one, in float32 and under other strategies, on one element in N."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from collage.backends import Backend, Batch, Noise, Row, choose, reference
from collage.collectives import Spread, spreads_of
from collage.formats import format_of, split
from collage.layout import Planes
from collage.monitor.sampling import Sampling, components, value
from collage.monitor.shadow import Beside, Sampled, Stepping, followed
from collage.optimizers.parameters import Group, Parameter
from collage.optimizers.wrapping.foreign import Foreign, Values
from collage.optimizers.wrapping.slots import ROLES, Formats, keys_of, packed, unpacked
from collage.rules.assign import ASSIGN
from collage.sharding import local
from collage.strategies import STRATEGIES, Strategy


class Met(NamedTuple):
    """A parameter as it was met: what tells it apart from another of its name, and what is followed of it."""

    of: tuple[Any, ...]
    key: int
    sampling: Sampling
    spread: Spread | None


class Following:
    """One strategy on the elements that are followed."""

    def __init__(self, strategy: Strategy, given: Mapping[str, str]) -> None:
        self.strategy, self._given = strategy, given
        self._theta: dict[str, list[Tensor]] = {}
        self._states: dict[str, Values] = {}

    def formats(self, met: Met) -> Formats:
        """Those of a parameter; without blocks or scales where its sample has no rows."""
        flat = met.sampling.flat
        return Formats(self.strategy.small.beside if flat else self.strategy, self._given, flat)

    def meet(self, name: str, met: Met, theta: Tensor, states: Values) -> None:
        """Start at these numbers of theta and the optimizer's states, sampled."""
        formats = self.formats(met)
        self._theta[name] = list(split(format_of(formats.strategy.param), theta))
        self._states[name] = packed([deepcopy(states)], [theta], [formats], [{}], lambda *_: None, _backend(theta))[0]

    def follow(self, name: str, theta: Tensor, met: Met) -> None:
        """Go on from these weights; the states stay."""
        self._theta[name] = list(split(format_of(self.formats(met).strategy.param), theta))

    def advance(
        self, foreign: Foreign, group: Group, step: int, met: Mapping[str, Met], grads: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Make the optimizer's step. Returns the updates that it intended, and the SUMS of what arrived."""
        names, formats = list(met), [self.formats(own) for own in met.values()]
        param = formats[0].strategy.param
        old = [format_of(param).value(self._theta[name]) for name in names]
        backend = _backend(old[0])
        theta = [nn.Parameter(x.clone()) for x in old]
        for own, grad in zip(theta, grads, strict=True):
            own.grad = grad.clone()
        before = [self._states[name] for name in names]
        new = foreign.run(group, theta, unpacked(before, old, formats, torch.empty_like, backend), noted=False)
        values, keys = [own.detach() for own in theta], [own.key for own in met.values()]
        deltas = [own - x for own, x in zip(values, old, strict=True)]  # now: a number may be its plane
        places = [own.sampling.drawn(x.shape) for own, x in zip(met.values(), values, strict=True)]
        sums = list(torch.zeros(len(names), len(reference.SUMS), dtype=torch.float64, device="cpu"))
        backend.step(
            Batch(
                ASSIGN, (param,), torch.float32, 1.0, (1.0,), False, group["seed"],
                [plane for name in names for plane in self._theta[name]], values, [step] * len(names), keys, places,
                sums,
            )
        )  # fmt: skip

        def noise(name: str, columns: list[int]) -> Noise:
            taken = [keys[k] for k in columns], [places[k] for k in columns]
            return Noise(name, group["seed"], [step] * len(columns), *taken)

        self._states |= dict(zip(names, packed(new, old, formats, before, noise, backend), strict=True))
        return deltas, sums

    def moment(self, name: str, met: Met, role: str) -> Tensor | None:
        """The number of the first state of that role."""
        return moment_of(self._states[name], self.formats(met), role, lambda plane, per: plane)


def moment_of(state: Mapping[str, Any], formats: Formats, role: str, take: Any) -> Tensor | None:
    """The first state of a role, of planes that are taken as ``take(plane, per)`` says; None: there is none."""
    for name, known in ROLES.items():
        fmt = formats.of(name) if known == role else None
        keys = keys_of(name, fmt) if fmt else []
        if fmt and all(isinstance(state.get(key), Tensor) and state[key].dim() for key in keys):
            form = format_of(fmt)
            planes = zip(keys, form.planes, strict=True)
            return form.value([take(local(state[key]), plane.per) for key, plane in planes])
    return None


class WrappedShadow:
    """Follows one element in ``stride`` of every parameter, as `collage.monitor.shadow.Shadow` does of rules.

    optimizer: a `Wrapped` one; foreign: what it wraps.
    """

    def __init__(self, optimizer: Any, foreign: Foreign, stride: int, strategies: Sequence[Strategy]) -> None:
        self._optimizer, self._foreign, self._stride = optimizer, foreign, stride
        self._exact = Following(STRATEGIES["fp32"], {})
        self._beside = [Following(strategy, optimizer.states) for strategy in strategies]
        self._met: dict[str, Met] = {}
        self._before: dict[str, Planes] = {}

    def before(self, stepping: Sequence[Stepping], due: bool, changed: Container[str] = ()) -> None:
        """Meet new parameters, follow those that others changed, remember theta if the step is to be measured."""
        for parameter, batch, row in _each(stepping):
            met, of = self._met.get(parameter.name), (row.shape, id(parameter.tensor), batch.formats)
            if met is None or met.of != of:
                self._meet(parameter, of, batch, row)
            elif parameter.name in changed:
                for one in (self._exact, *self._beside):
                    one.follow(parameter.name, self._value(met, batch, row), met)
            if due:
                self._before[parameter.name] = self._components(self._met[parameter.name], batch, row)

    def _meet(self, parameter: Parameter, of: tuple[Any, ...], batch: Batch, row: Row) -> None:
        spread = spreads_of([parameter.tensor])[0]
        met = self._met[parameter.name] = Met(of, parameter.key, Sampling(parameter.tensor, self._stride), spread)
        state, formats = self._optimizer.base.state.get(parameter.tensor, {}), self._optimizer.formats_of(parameter)
        wide = partial(torch.empty_like, dtype=torch.float32)
        numbers = unpacked([state], [parameter.tensor], [formats], wide, _backend(row.slots[0][0]))[0] if state else {}
        sampled = {
            name: met.sampling.take(local(x)).clone()
            if isinstance(x, Tensor) and x.shape == parameter.tensor.shape
            else x
            for name, x in numbers.items()
        }
        for one in (self._exact, *self._beside):
            one.meet(parameter.name, met, self._value(met, batch, row), sampled)

    def _planes(self, met: Met, batch: Batch, row: Row) -> list[Tensor]:
        planes = zip(row.slots[0], format_of(batch.formats[0]).planes, strict=True)
        return [met.sampling.take(own, plane.per) for own, plane in planes]

    def _value(self, met: Met, batch: Batch, row: Row) -> Tensor:
        return value(format_of(batch.formats[0]), self._planes(met, batch, row)).clone()

    def _components(self, met: Met, batch: Batch, row: Row) -> Planes:
        return [x.clone() for x in components(format_of(batch.formats[0]), self._planes(met, batch, row))]

    def after(self, stepping: Sequence[Stepping], due: bool) -> tuple[dict[str, Sampled], Beside]:
        """Follow the step. Returns, if it is measured, each parameter's sums and each other strategy's."""
        sampled: dict[str, Sampled] = {}
        beside: Beside = {}
        for some in self._alike(stepping):
            (first, batch, _), step = some[0], some[0][2].step
            group = self._optimizer.param_groups[first.group_index]
            met = {parameter.name: self._met[parameter.name] for parameter, _, _ in some}
            grads = [reference.gradient(batch, self._taken(p.name, row.grad)) for p, _, row in some]
            deltas, _ = self._exact.advance(self._foreign, group, step, met, grads)
            for (parameter, own, row), delta in zip(some, deltas, strict=True) if due else ():
                sampled[parameter.name] = self._compare(parameter, own, row, delta)
            for one in self._beside:
                _, sums = one.advance(self._foreign, group, step, met, grads)
                for (name, seen), found in zip(met.items(), sums, strict=True) if due else ():
                    key = str(one.strategy), seen.spread
                    total, sample = beside.get(key, ([0.0] * len(reference.SUMS), Sampled()))
                    theirs = (one.moment(name, seen, "variance"), one.moment(name, seen, "momentum"))
                    added = [a + b for a, b in zip(total, found.tolist(), strict=True)]
                    beside[key] = added, sample + self._moments(name, seen, *theirs)
        self._before = {}
        return sampled, beside

    def _alike(self, stepping: Sequence[Stepping]) -> list[list[tuple[Any, Batch, Row]]]:
        """Those that make the same step of one batch on one device, and whose samples have rows, or have none."""
        found: dict[tuple[Any, ...], list[tuple[Any, Batch, Row]]] = {}
        for parameter, batch, row in _each(stepping):
            flat = self._met[parameter.name].sampling.flat
            key = id(batch), row.step, row.slots[0][0].device, flat
            found.setdefault(key, []).append((parameter, batch, row))
        return list(found.values())

    def _taken(self, name: str, grad: Tensor | None) -> Tensor:
        assert grad is not None
        return self._met[name].sampling.take(grad)

    def _compare(self, parameter: Parameter, batch: Batch, row: Row, delta: Tensor) -> Sampled:
        """The run's sampled elements against the shadow's."""
        met = self._met[parameter.name]
        arrived = torch.zeros_like(delta, dtype=torch.float64)
        pairs = list(zip(self._before[parameter.name], self._components(met, batch, row), strict=True))
        for old, new in reversed(pairs):
            arrived += new.double() - old.double()
        state, formats = self._optimizer.base.state[parameter.tensor], self._optimizer.formats_of(parameter)
        v, m = (moment_of(state, formats, role, met.sampling.take) for role in ("variance", "momentum"))
        wanted = delta.double()
        dot, norm2 = float((wanted * arrived).sum()), float((wanted * wanted).sum())
        return self._moments(parameter.name, met, v, m) + Sampled(dot=dot, norm2=norm2)

    def _moments(self, name: str, met: Met, v: Tensor | None, m: Tensor | None) -> Sampled:
        """What v and m are against the shadow's."""
        exact_v, exact_m = (self._exact.moment(name, met, role) for role in ("variance", "momentum"))
        found = Sampled()
        if v is not None and exact_v is not None:
            found += Sampled(v=float(v.double().sum()), v_shadow=float(exact_v.double().sum()))
        if m is not None and exact_m is not None:
            error = m.double().flatten() - exact_m.double().flatten()
            found += Sampled(m_error2=float(error.square().sum()), m_shadow2=float(exact_m.double().square().sum()))
        return found


def _backend(tensor: Tensor) -> Backend:
    return choose("auto", tensor.device)


def _each(stepping: Sequence[Stepping]) -> Iterator[tuple[Any, Batch, Row]]:
    """Parameters of elementwise optimizers, one by one."""
    for parameters, batch in followed(stepping):
        yield from ((p, batch, row) for p, row in zip(parameters, batch.rows(), strict=True))
