"""Images of ten classes, which install without a hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from collage.harness.tasks import idx
from collage.harness.tasks.examples import Columns, Examples

SIDE = 32  # pixels that every image is brought to
HELD_OUT = 5  # one image in so many
CLASSES = 10
MNIST_SIDE = 28


def examples(data: Sequence[str]) -> Examples:
    """Of the folder that was given, or the digits. Raises ValueError for more than one folder, or what it lacks."""
    if len(data) > 1:
        raise ValueError(f"data: takes one folder of images, got {len(data)}")
    return mnist(Path(data[0])) if data else digits()


def digits() -> Examples:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, each pixel drawn as 4 x 4. Every fifth is held out."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8).repeat_interleave(SIDE // 8, 2).repeat_interleave(SIDE // 8, 3)
    held_out = torch.arange(len(labels)) % HELD_OUT == 0
    images = _standardised(images, images[~held_out])
    return Examples("digits", _columns(images, labels, ~held_out), _columns(images, labels, held_out))


def mnist(folder: Path) -> Examples:
    """MNIST, or Fashion-MNIST, from the folder of its four files; of 28 x 28 pixels, with a frame of background.

    Raises:
        ValueError: a file that is missing, damaged, or of other images; which, and what is needed.
    """
    train, labels = _labelled(folder, "train")
    held_out, others = _labelled(folder, "t10k")
    images = _standardised(train, train), _standardised(held_out, train)
    return Examples(
        folder.name,
        {"pixel_values": images[0], "labels": labels},
        {"pixel_values": images[1], "labels": others},
    )


def _labelled(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, SIDE, SIDE] float32, and their classes [n] int64."""
    images = idx.read(folder, f"{part}-images-idx3-ubyte")
    labels = idx.read(folder, f"{part}-labels-idx1-ubyte")
    if images.shape[1:] != (MNIST_SIDE, MNIST_SIDE):
        raise ValueError(
            f"data: images of '{folder}' ({part}) need {MNIST_SIDE} x {MNIST_SIDE} pixels, got {tuple(images.shape)}"
        )
    if labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"data: '{folder}' ({part}) needs a label for each image, got {len(images)} and {tuple(labels.shape)}"
        )
    if labels.max() >= CLASSES:
        raise ValueError(f"data: labels of '{folder}' ({part}) need to be below {CLASSES}, got {int(labels.max())}")
    frame = (SIDE - MNIST_SIDE) // 2
    return torch.nn.functional.pad(images.unsqueeze(1).float(), [frame] * 4), labels.long()


def _standardised(images: Tensor, of: Tensor) -> Tensor:
    """Pixels whose mean is 0 and whose deviation 1 over those that are trained on."""
    return (images - of.mean()) / of.std()


def _columns(images: Tensor, labels: Tensor, chosen: Tensor) -> Columns:
    return {"pixel_values": images[chosen], "labels": labels[chosen].long()}
