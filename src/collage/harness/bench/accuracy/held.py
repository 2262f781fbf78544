"""What is measured: numbers that a format of ours or another package keeps, stepped by the code that steps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from collage.backends import Backend, Batch, choose, reference
from collage.backends.batch import cut
from collage.floors import register_of
from collage.formats import Format, format_of, split
from collage.layout import Planes, zeros
from collage.rules import Rule
from collage.rules.folding import tensors

SEED = 0  # of stochastic rounding
F32 = torch.float32


class Held(Protocol):
    """Weights of one parameter, [rows, columns], with their moments if the rule has some.

    step: one step with a gradient, float32 numbers that bfloat16 has too.
    value: the number under a prefix of a state's keys, float32.
    restart: the weights become 0; moments stay.
    """

    def step(self, grad: Tensor) -> None: ...

    def value(self, prefix: str) -> Tensor: ...

    def restart(self) -> None: ...


class Stepped:
    """Formats of the table under a rule, stepped by a backend, as an optimizer does it."""

    def __init__(
        self, rule: Rule, names: tuple[str, ...], theta: Tensor, lr: float, hyper: Sequence[float] = ()
    ) -> None:
        first, *others = map(format_of, names)
        slots = [split(first, theta), *(zeros(fmt, theta) for fmt in others)]
        self.batch = Batch(
            rule, names, register_of(names[0]), lr, hyper, maximize=False, seed=SEED,
            planes=[plane for own in slots for plane in own], grads=[torch.zeros_like(theta)], steps=[0], keys=[0],
        )  # fmt: skip
        self.backend = fastest(self.batch)
        self.batch = replace(self.batch, kept={})

    def step(self, grad: Tensor) -> None:
        self.batch = replace(self.batch, grads=[grad], steps=[self.batch.steps[0] + 1])
        self.backend.step(self.batch)

    def planes(self, prefix: str) -> Planes:
        return cut(self.batch.formats, self.batch.planes)[self.batch.rule.prefixes.index(prefix)]

    def value(self, prefix: str) -> Tensor:
        return self.batch.layouts[self.batch.rule.prefixes.index(prefix)].value(self.planes(prefix))

    def restart(self) -> None:
        for plane in self.planes("param"):
            plane.zero_()


def fastest(batch: Batch) -> Backend:
    """The backend that an optimizer takes here, if it has kernels for these formats; the reference has all of them."""
    backend = choose("auto", batch.planes[0].device)
    try:
        backend.step(replace(batch, planes=[plane.clone() for plane in batch.planes], steps=[1]))
    except ValueError:
        return reference
    return backend


class Emulated:
    """The same with formats that are in no table: of packages that do not run here. Rounded to nearest."""

    def __init__(
        self, rule: Rule, formats: tuple[Format, ...], theta: Tensor, lr: float, hyper: Sequence[float] = ()
    ) -> None:
        self.rule, self.formats, self.lr, self.hyper, self.steps = rule, formats, lr, hyper, 0
        self.slots: list[Planes] = [split(formats[0], theta), *(zeros(fmt, theta) for fmt in formats[1:])]

    def step(self, grad: Tensor) -> None:
        self.steps += 1
        constants = tensors(self.rule.fold(self.lr, self.hyper, self.steps, F32), F32, grad.device)
        numbers = tuple(fmt.load(planes, F32) for fmt, planes in zip(self.formats, self.slots, strict=True))
        grown = self.rule.update(numbers, grad, constants).slots
        self.slots = [fmt.encode(number) for fmt, number in zip(self.formats, grown, strict=True)]

    def value(self, prefix: str) -> Tensor:
        k = self.rule.prefixes.index(prefix)
        return self.formats[k].value(self.slots[k])

    def restart(self) -> None:
        for plane in self.slots[0]:
            plane.zero_()
