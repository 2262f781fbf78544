"""Images of ten classes, which install without a hub."""

from __future__ import annotations

import torch
from torch import Tensor

from collage.harness.tasks.examples import Columns, Examples

SIDE = 32  # pixels that every image is brought to
HELD_OUT = 5  # one image in so many


def digits() -> Examples:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, each pixel drawn as 4 x 4. Every fifth is held out."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8).repeat_interleave(SIDE // 8, 2).repeat_interleave(SIDE // 8, 3)
    held_out = torch.arange(len(labels)) % HELD_OUT == 0
    images = _standardised(images, images[~held_out])
    return Examples("digits", _columns(images, labels, ~held_out), _columns(images, labels, held_out))


def _standardised(images: Tensor, of: Tensor) -> Tensor:
    """Pixels whose mean is 0 and whose deviation 1 over those that are trained on."""
    return (images - of.mean()) / of.std()


def _columns(images: Tensor, labels: Tensor, chosen: Tensor) -> Columns:
    return {"pixel_values": images[chosen], "labels": labels[chosen].long()}
