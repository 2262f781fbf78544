"""How fast this machine moves the planes of an optimizer: what bounds the time of a fused step."""

from __future__ import annotations

import time
from functools import cache
from statistics import median

import torch

from collage.backends import choose

COUNT, ROUNDS = 1 << 24, 5  # elements of each plane, far beyond any cache; timings, of which the median counts
_FORMATS = ("bf16", "bf16", "bf16")  # of the three slots of Adam


@cache
def measured() -> float:
    """Bytes per second, read and written, while planes are streamed without arithmetic. Takes a second, once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    planes = [torch.zeros(COUNT, dtype=torch.bfloat16, device=device) for _ in _FORMATS]
    gradient = torch.zeros(COUNT, dtype=torch.bfloat16, device=device)
    backend = choose("auto", device)
    times = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        start = time.perf_counter()
        backend.stream(_FORMATS, planes, [gradient])
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    moved = (2 * len(planes) + 1) * gradient.nbytes
    return moved / median(times[1:])
