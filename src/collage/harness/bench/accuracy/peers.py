"""Other packages: torchao's and optimi's own code where they are installed, and FlashOptim's formats, emulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from collage.accumulators import Accumulator, Register
from collage.formats import Format, Single
from collage.harness.bench.accuracy.held import Emulated
from collage.layout import Plane, Planes
from collage.rules import RULES

F32, BF16 = torch.float32, torch.bfloat16
GROUP = 32  # neighbours that share a scale in FlashOptim
LEAST = 1e-12  # of a scale


@dataclass(frozen=True)
class Grouped(Format):
    """Codes of 8 bits, each a share of its group's largest number after a companding; the scale is a float16.

    Databricks' FlashOptim 0.1 (arXiv 2602.23349): momentum by softsign, 2x / (1 + |x|), in int8; the root of the
    variance in uint8.
    """

    dtype: torch.dtype
    stochastic: bool = False

    @property
    def planes(self) -> tuple[Plane, ...]:  # type: ignore[override]
        return Plane("", self.dtype), Plane("_scale", torch.float16, per=GROUP)

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        return Register(self.value(planes))

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        x = number.value.reshape(len(number.value), -1, GROUP)
        x = x if self.dtype == torch.int8 else x.sqrt()
        scale = x.abs().amax(2).clamp(min=LEAST)
        share = x / scale[..., None]
        share = 2.0 * share / (1.0 + share.abs()) if self.dtype == torch.int8 else share
        codes = (share * torch.iinfo(self.dtype).max + 0.5).floor()
        return codes.flatten(1).to(self.dtype), scale.half()

    def value(self, planes: Planes) -> Tensor:
        codes, scale = planes
        share = codes.reshape(*scale.shape, GROUP).float() / torch.iinfo(self.dtype).max
        share = share / (2.0 - share.abs()) if self.dtype == torch.int8 else share
        x = (share * scale.float()[..., None]).flatten(1)
        return x if self.dtype == torch.int8 else x * x


@dataclass(frozen=True)
class Corrected(Format):
    """FlashOptim's weight: bf16, and its error as a share of half an ulp in 127 steps to either side."""

    planes: tuple[Plane, ...] = (Plane("", BF16), Plane("_error", torch.int8))
    stochastic: bool = False

    def load(self, planes: Planes, arithmetic: torch.dtype) -> Accumulator:
        return Register(self.value(planes))

    def encode(self, number: Accumulator, random: Tensor | None = None) -> tuple[Tensor, ...]:
        hi = number.value.to(BF16)
        share = ((number.value - hi.float()) / half_ulp(hi)).clamp(-1.0, 1.0) * 127.0
        return hi, ((share.abs() + 0.5).floor() * share.sign()).to(torch.int8)

    def value(self, planes: Planes) -> Tensor:
        return planes[0].float() + planes[1].float() / 127.0 * half_ulp(planes[0])


def half_ulp(x: Tensor) -> Tensor:
    """Of a bfloat16, as float32."""
    exponent = ((x.view(torch.int16).int() >> 7) & 0xFF).clamp(min=1) - 127
    return torch.ldexp(torch.ones_like(x, dtype=F32), exponent - 8)


class Package:
    """An optimizer of another package on one parameter; `read` finds a number by prefix."""

    def __init__(
        self, param: Tensor, opt: torch.optim.Optimizer, read: Callable[[dict[str, Any], str], Tensor]
    ) -> None:
        self.param, self.opt, self.read, self.advance = param, opt, read, opt.step

    def step(self, grad: Tensor) -> None:
        self.param.grad = grad.to(self.param.dtype)
        self.advance()

    def value(self, prefix: str) -> Tensor:
        state = self.opt.state[self.param]
        if prefix != "param":
            return self.read(state, prefix)
        kahan = state.get("kahan_comp")
        return self.param.detach().float() + (0.0 if kahan is None else kahan.float())

    @torch.no_grad()
    def restart(self) -> None:
        self.param.zero_()
        kahan = self.opt.state[self.param].get("kahan_comp")
        if kahan is not None:
            kahan.zero_()


def torchao(theta: Tensor, lr: float, hyper: Sequence[float]) -> Package:
    """torchao.optim.AdamW8bit, on float32 weights: its moments alone are looked at."""
    from torchao.optim import AdamW8bit

    param = nn.Parameter(theta.clone())
    opt = AdamW8bit([param], lr=lr, betas=tuple(hyper[:2]), eps=hyper[2], weight_decay=hyper[3])
    package = Package(param, opt, lambda state, prefix: state[prefix].dequantize())
    package.advance = torch.compiler.set_stance("force_eager")(opt.step)  # else it compiles its step, for a minute
    return package


def optimi(theta: Tensor, lr: float, hyper: Sequence[float]) -> Package:
    """optimi.AdamW: bfloat16, with Kahan summation."""
    from optimi import AdamW

    param = nn.Parameter(theta.to(BF16))
    betas = {"exp_avg": hyper[0], "exp_avg_sq": hyper[1]}
    opt = AdamW([param], lr, betas=tuple(hyper[:2]), eps=hyper[2], weight_decay=hyper[3], foreach=False, triton=False)

    def read(state: dict[str, Any], prefix: str) -> Tensor:  # its moments are those that others correct in the update
        moment: Tensor = state[prefix].float() * (1.0 - betas[prefix] ** opt.param_groups[0]["step"].item())
        return moment

    return Package(param, opt, read)


def optimi_weights(theta: Tensor, lr: float) -> Package:
    """optimi.SGD: the Kahan summation of all its optimizers."""
    from optimi import SGD

    param = nn.Parameter(theta.to(BF16))
    return Package(param, SGD([param], lr, foreach=False, triton=False), lambda state, prefix: state[prefix])


def flash(theta: Tensor, lr: float, hyper: Sequence[float]) -> Emulated:
    """FlashOptim's moments, under our AdamW in float32."""
    return Emulated(RULES["adamw"], (Single(F32), Grouped(torch.int8), Grouped(torch.uint8)), theta, lr, hyper)


def flash_weights(theta: Tensor, lr: float) -> Emulated:
    return Emulated(RULES["apply"], (Corrected(),), theta, lr, (0.0,))
