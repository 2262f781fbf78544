"""Files of MNIST's kind: arrays of bytes behind a header of their lengths, with or without gzip."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

_BYTES = 0x08  # the header's mark of unsigned bytes


def read(folder: Path, name: str) -> Tensor:
    """The array in NAME.gz or NAME of a folder, uint8.

    Raises:
        ValueError: no such file, or one of another kind, cut off or damaged; which, and what is needed.
    """
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        raise ValueError(f"data: '{folder}' has no {name}.gz; give the folder of MNIST's or Fashion-MNIST's four files")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data: {path} cannot be read ({error}); bring the whole file back") from None
    return _array(path, content)


def _array(path: Path, content: bytes) -> Tensor:
    """Header: two zero bytes, the kind of the numbers, how many lengths; then these, big-endian, then the numbers."""
    if len(content) < 4 or content[:3] != bytes((0, 0, _BYTES)):
        raise ValueError(f"data: {path} is not an idx file of bytes (begins with {content[:4].hex(' ')!r})")
    begin = 4 + 4 * content[3]
    if len(content) < begin:
        raise ValueError(f"data: {path} ends within its header; bring the whole file back")
    lengths = struct.unpack_from(f">{content[3]}I", content, 4)
    expected, found = math.prod(lengths), len(content) - begin
    if expected != found:
        raise ValueError(
            f"data: {path} has {found:,} bytes behind its header of {lengths}, which promises {expected:,}"
        )
    numbers = bytearray(content[begin:])
    array = torch.frombuffer(numbers, dtype=torch.uint8) if numbers else torch.empty(0, dtype=torch.uint8)
    return array.reshape(lengths)
