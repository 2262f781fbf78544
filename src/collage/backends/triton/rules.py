"""The update rules and the folding of their constants on the device, as in rules/*.py. RULES is the table."""

from dataclasses import dataclass
from typing import Any, get_type_hints

import triton
import triton.language as tl

from collage import rules
from collage.backends.triton.arithmetic import minus, sign, sqrt
from collage.backends.triton.fold import power
from collage.backends.triton.language import Row
from collage.backends.triton.numbers import Register


@dataclass(frozen=True, eq=False, repr=False)
class Rule(Row):
    """What a rule's kernels are made of.

    update: (slots' numbers, gradient, constants) -> (new numbers, intended update of theta or ())
    fold: (lr, settings, step) -> constants in float64, not rounded
    constants: the named tuple that they are; those annotated as tuples are expansions
    """

    update: Any
    fold: Any
    constants: type

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of each constant in a kernel's row."""
        return tuple(1 if hint is Any else 2 for hint in get_type_hints(self.constants).values())

    @property
    def columns(self) -> int:
        return sum(self.widths)


@triton.jit
def adamw(slots, g, c):
    theta, m, v = slots
    m = m.scaled(c.beta1).grown(c.one_minus_beta1 * g)
    v = v.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g))
    delta = minus((c.a * m.value()) / (sqrt(v.value()) + c.e) + c.w * theta.value())
    return (theta.grown(delta), m, v), delta


@triton.jit
def adamw_amsgrad(slots, g, c):
    theta, m, v, top = slots
    m = m.scaled(c.beta1).grown(c.one_minus_beta1 * g)
    v = v.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g))
    top = top.raised(v)
    delta = minus((c.a * m.value()) / (sqrt(top.value()) + c.e) + c.w * theta.value())
    return (theta.grown(delta), m, v, top), delta


@triton.jit
def adam(slots, g, c):
    theta, m, v = slots
    g = g + c.w * theta.value()
    m = m.scaled(c.beta1).grown(c.one_minus_beta1 * g)
    v = v.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g))
    delta = minus((c.a * m.value()) / (sqrt(v.value()) + c.e))
    return (theta.grown(delta), m, v), delta


@triton.jit
def adam_amsgrad(slots, g, c):
    theta, m, v, top = slots
    g = g + c.w * theta.value()
    m = m.scaled(c.beta1).grown(c.one_minus_beta1 * g)
    v = v.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g))
    top = top.raised(v)
    delta = minus((c.a * m.value()) / (sqrt(top.value()) + c.e))
    return (theta.grown(delta), m, v, top), delta


@triton.jit
def fold_adamw(lr, settings, t):
    beta1, beta2, eps, weight_decay = settings
    s = tl.sqrt(1.0 - power(beta2, t))
    a = lr * s / (1.0 - power(beta1, t))
    return beta1, 1.0 - beta1, beta2, 1.0 - beta2, a, eps * s, lr * weight_decay


@triton.jit
def fold_adam(lr, settings, t):
    beta1, beta2, eps, weight_decay = settings
    s = tl.sqrt(1.0 - power(beta2, t))
    a = lr * s / (1.0 - power(beta1, t))
    return beta1, 1.0 - beta1, beta2, 1.0 - beta2, a, eps * s, weight_decay


@triton.jit
def sgd(slots, g, c):
    theta = slots[0]
    delta = minus(c.lr * (g + c.w * theta.value()))
    return (theta.grown(delta),), delta


@triton.jit
def fold_sgd(lr, settings, t):
    return lr, settings[0]


@triton.jit
def sgd_momentum(slots, g, c):
    theta, b = slots
    b = b.scaled(c.momentum).grown(c.gain * (g + c.w * theta.value()))
    delta = minus(c.lr * b.value())
    return (theta.grown(delta), b), delta


@triton.jit
def sgd_nesterov(slots, g, c):
    theta, b = slots
    d = g + c.w * theta.value()
    b = b.scaled(c.momentum).grown(c.gain * d)
    delta = minus(c.lr * (d + b.scaled(c.momentum).value()))
    return (theta.grown(delta), b), delta


@triton.jit
def fold_sgd_momentum(lr, settings, t):
    momentum, dampening, weight_decay = settings
    return momentum, tl.where(t == 1, 1.0, 1.0 - dampening), lr, weight_decay


@triton.jit
def lion(slots, g, c):
    theta, m = slots
    u = sign(m.scaled(c.beta1).grown(c.one_minus_beta1 * g).value())
    delta = minus(c.lr * u + c.w * theta.value())
    m = m.scaled(c.beta2).grown(c.one_minus_beta2 * g)
    return (theta.grown(delta), m), delta


@triton.jit
def fold_lion(lr, settings, t):
    beta1, beta2, weight_decay = settings
    return beta1, 1.0 - beta1, beta2, 1.0 - beta2, lr, lr * weight_decay


@triton.jit
def average(slots, g, c):
    own, theta = slots
    return (own.grown(c.weight * (theta.value() - own.value())), theta), ()


@triton.jit
def fold_average(lr, settings, t):
    return (1.0 - settings[0],)


@triton.jit
def accumulate(slots, g, c):
    return (slots[0].grown(c.weight * g),), ()


@triton.jit
def fold_accumulate(lr, settings, t):
    return (settings[0],)


@triton.jit
def momentum(slots, g, c):
    b = slots[0].scaled(c.momentum).grown(c.one_minus_momentum * g)
    return (b, Register(b.value())), ()


@triton.jit
def momentum_nesterov(slots, g, c):
    b = slots[0].scaled(c.momentum).grown(c.one_minus_momentum * g)
    return (b, Register(c.one_minus_momentum * g + b.scaled(c.momentum).value())), ()


@triton.jit
def fold_momentum(lr, settings, t):
    return settings[0], 1.0 - settings[0]


@triton.jit
def apply(slots, g, c):
    theta = slots[0]
    delta = minus(c.lr * g + c.w * theta.value())
    return (theta.grown(delta),), delta


@triton.jit
def fold_apply(lr, settings, t):
    return lr, lr * settings[0]


@triton.jit
def assign(slots, g, c):
    number = c.weight * g
    return (Register(number),), number - slots[0].value()


RULES = {
    "adamw": Rule(adamw, fold_adamw, rules.adamw.Constants),
    "adamw_amsgrad": Rule(adamw_amsgrad, fold_adamw, rules.adamw.Constants),
    "adam": Rule(adam, fold_adam, rules.adamw.Constants),
    "adam_amsgrad": Rule(adam_amsgrad, fold_adam, rules.adamw.Constants),
    "sgd": Rule(sgd, fold_sgd, rules.sgd.Plain),
    "sgd_momentum": Rule(sgd_momentum, fold_sgd_momentum, rules.sgd.Constants),
    "sgd_nesterov": Rule(sgd_nesterov, fold_sgd_momentum, rules.sgd.Constants),
    "lion": Rule(lion, fold_lion, rules.lion.Constants),
    "average": Rule(average, fold_average, rules.average.Constants),
    "accumulate": Rule(accumulate, fold_accumulate, rules.accumulate.Constants),
    "momentum": Rule(momentum, fold_momentum, rules.momentum.Constants),
    "momentum_nesterov": Rule(momentum_nesterov, fold_momentum, rules.momentum.Constants),
    "apply": Rule(apply, fold_apply, rules.apply.Constants),
    "assign": Rule(assign, fold_accumulate, rules.accumulate.Constants),
}
