"""FP8 weights without master weights: linear layers that multiply with the weight's first component itself."""

from collage.fp8.converting import convert
from collage.fp8.exporting import export
from collage.fp8.linear import Float8Linear
from collage.fp8.replicating import replicate

__all__ = ["Float8Linear", "convert", "export", "replicate"]
