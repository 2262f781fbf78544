"""Scales of weights: how often they move, and how many weights are too large for theirs.

Told from the planes before a step and after it, so that no kernel counts; of a row it reads one byte. Scales of moments
are left out: no forward pass sees them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collage.backends import Batch
from collage.formats import Format
from collage.formats.scales import LARGEST, MOST
from collage.layout import PIECE, Planes, aligned

COUNTS = ("scales", "rescaled", "saturated")  # of a step: there are, it moved; weights that it left beyond them
NONE = [0] * len(COUNTS)


def scales_of(batch: Batch) -> Sequence[Tensor]:
    """Those of theta, parameter after parameter; none where its format has none."""
    places = [k for k, plane in enumerate(batch.layouts[0].planes) if plane.per != 1]
    return batch.planes[places[0] :: batch.width] if places else ()


def before(batch: Batch) -> Tensor | None:
    """What `counted` needs of a step that is about to be made."""
    scales = scales_of(batch)
    return torch.cat([*scales]) if scales else None


def counted(batch: Batch, old: Tensor | None) -> list[list[int]]:
    """COUNTS of each parameter of a step that was made. old: what `before` gave."""
    if old is None:
        return [NONE] * len(batch.visible())
    scales, fmt = scales_of(batch), batch.layouts[0]
    new, sizes = torch.cat([*scales]), list(map(len, scales))
    moved = torch.stack([own.sum() for own in torch.split(new != old, sizes)]).tolist()
    end = bool((new == MOST).any())  # a smaller scale would have grown instead
    beyond = [_beyond(fmt, row.slots[0]) if end else 0 for row in batch.rows()]
    return [[*own] for own in zip(sizes, moved, beyond, strict=True)]


def _beyond(fmt: Format, planes: Planes) -> int:
    return sum(int((fmt.value(piece).abs() > LARGEST).sum()) for piece in aligned([fmt], [planes], [], PIECE))
