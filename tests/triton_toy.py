"""A format of three planes, one of them a scale per block of 32: for the reference and for Triton."""

import torch
import triton
import triton.language as tl

from collage import mcf
from collage.accumulators import Register
from collage.backends.triton import format as kernels
from collage.backends.triton.arithmetic import float_of
from collage.backends.triton.format import BF16, FP32, decoded_components, decoded_number, spread
from collage.backends.triton.language import static
from collage.formats import Format
from collage.layout import Plane

BLOCK = 32


class Toy(Format):
    """x = scale * int8 + bf16."""

    planes = (Plane("", torch.int8), Plane("_lo", torch.bfloat16), Plane("_scale", torch.float32, BLOCK))
    stochastic = False

    def load(self, planes, arithmetic):
        return Register(self.value(planes))

    def encode(self, number, random=None):
        x = number.value
        blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        scale = blocks.abs().amax(2) / 127.0
        scale = torch.where(scale == 0, 1.0, scale)
        q = (x / self._spread(scale, x)).round()
        return q.to(torch.int8), mcf.rn(x - q * self._spread(scale, x), torch.bfloat16), scale

    def value(self, planes):
        q, rest, scale = planes
        return q.float() * self._spread(scale, q) + rest.float()

    def components(self, planes):
        return (self.value(planes),)

    @staticmethod
    def _spread(scale, x):
        return scale.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]


@triton.jit
def number_of(x):
    return x.to(tl.float32)


@triton.jit
def integer_of(x):
    return x.to(tl.int32)


@triton.jit
def decode(planes, F: tl.constexpr):
    return planes[0] * spread(planes[2], planes[0]) + planes[1]


@triton.jit
def encode(number, random, largest, F: tl.constexpr):
    x = number.value().x
    scale = tl.div_rn(float_of(largest[0]), 127.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    each = spread(scale, x)
    q = (tl.div_rn(x, each) + 12582912.0) - 12582912.0  # to an integer
    return F.words[0].encode(q), F.words[1].encode(x - q * each), scale


INT8 = static(kernels.Word(tl.int8, number_of, integer_of))
ROW = kernels.Format((INT8, BF16, FP32), decoded_number, encode, decode, decoded_components, None, shared=(1, 1, BLOCK))
