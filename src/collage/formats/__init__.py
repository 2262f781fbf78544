"""Planes in memory <-> numbers in registers, and the table of formats.

A format holds one number per element in one or more *planes*. Plane 0 is the visible one; for theta it is the parameter
itself. Most planes have a word per element, in the parameter's shape and strides; a plane may have one per block of
elements (a scale), and then its format is given whole blocks. A format is pure: it decodes planes into an accumulator
and encodes an accumulator into new planes; only a backend writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collage.accumulators import Register
from collage.formats.blocks import Companded
from collage.formats.floats import Compensated, Expansion, Master, Single
from collage.formats.format import Format
from collage.formats.words import Cut, ScaledMaster, Word
from collage.layout import Planes

__all__ = [
    "FORMATS", "Companded", "Compensated", "Cut", "Expansion", "Format", "Master", "ScaledMaster", "Single", "Word",
    "fitted", "format_of", "split",
]  # fmt: skip

F32, BF16, FP16, E4M3 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn

FORMATS: dict[str, Format] = {
    "fp32": Single(F32),
    "bf16": Single(BF16),
    "fp16": Single(FP16),
    "bf16x2": Expansion(BF16),
    "bf16x3": Expansion(BF16, 3),
    "fp16x2": Expansion(FP16),
    "bf16+int16": Cut(16),
    "bf16+int8": Cut(8),
    "fp16+int8": Word(FP16, 8),
    "e4m3+int16": Word(E4M3, 16, scaled=True),
    "e4m3+int8": Word(E4M3, 8, scaled=True),
    "int8/128": Companded(torch.int8, "bf16"),
    "uint8/128": Companded(torch.uint8, "bf16x2"),
    "bf16+fp32": Master(BF16),
    "fp16+fp32": Master(FP16),
    "e4m3+fp32": ScaledMaster(),
    "bf16+kahan": Compensated(),
    "bf16:sr": Single(BF16, stochastic=True),
    "fp16:sr": Single(FP16, stochastic=True),
    "bf16x2:sr": Expansion(BF16, stochastic=True),
    "bf16x3:sr": Expansion(BF16, 3, stochastic=True),
    "fp16x2:sr": Expansion(FP16, stochastic=True),
    "bf16+int8:sr": Cut(8, stochastic=True),
    "fp16+int8:sr": Word(FP16, 8, stochastic=True),
    "e4m3+int16:sr": Word(E4M3, 16, stochastic=True, scaled=True),
    "e4m3+int8:sr": Word(E4M3, 8, stochastic=True, scaled=True),
    "int8/128:sr": Companded(torch.int8, "bf16:sr", stochastic=True),
    "uint8/128:sr": Companded(torch.uint8, "bf16x2:sr", stochastic=True),
}


def format_of(name: str) -> Format:
    """The format of that name. Raises ValueError listing the known ones."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def split(fmt: Format, x: Tensor, random: Tensor | None = None) -> tuple[Tensor, ...]:
    """Planes that hold float32 ``x`` as well as the format can. With blocks: x is [rows, columns] of whole ones."""
    return fmt.encode(Register(x), random)


def fitted(fmt: Format, planes: Planes) -> tuple[tuple[Tensor, ...], Tensor]:
    """(planes that fit plane 0, bool per element: which did not). Pure.

    Others write to plane 0 alone: clamping, pruning, a loaded model. Where that shows (`broken`), the other planes are
    derived from it as it is now; everywhere else they stay.
    """
    broken = fmt.broken(planes)
    fresh = fmt.shown(planes) if planes[1:] else ()
    others = (
        torch.where(broken, new, old) if plane.per == 1 else new
        for plane, new, old in zip(fmt.planes[1:], fresh[1:], planes[1:], strict=True)
    )
    return (planes[0], *others), broken
