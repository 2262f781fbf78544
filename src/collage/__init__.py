"""Collage: train in bfloat16 without float32 master weights, and measure what rounding loses."""

from collage import mcf
from collage.advice.advising import advise
from collage.advised.advice import Advice
from collage.casting import to_bf16, to_fp16
from collage.checkpoint import high_precision_state_dict, load_high_precision_state_dict
from collage.ema import EMA
from collage.gradients.accumulate import GradientAccumulator
from collage.gradients.clip import clip_grad_norm_
from collage.gradients.release import release_gradients
from collage.monitor import monitor
from collage.optimizers.adam import Adam
from collage.optimizers.adamw import AdamW
from collage.optimizers.lion import Lion
from collage.optimizers.muon import Muon
from collage.optimizers.named import make_optimizer
from collage.optimizers.sgd import SGD
from collage.optimizers.wrap import wrap
from collage.strategies import STRATEGIES, Strategy

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "SGD",
    "STRATEGIES",
    "Adam",
    "AdamW",
    "Advice",
    "GradientAccumulator",
    "Lion",
    "Muon",
    "Strategy",
    "advise",
    "clip_grad_norm_",
    "high_precision_state_dict",
    "load_high_precision_state_dict",
    "make_optimizer",
    "mcf",
    "monitor",
    "release_gradients",
    "to_bf16",
    "to_fp16",
    "wrap",
]
