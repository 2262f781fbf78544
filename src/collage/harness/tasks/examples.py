"""Labelled examples: what a classifier is trained on and judged by, in place of text."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.utils.data import Dataset

Columns: TypeAlias = "Mapping[str, Tensor]"  # an argument of the model's forward -> [n, ...]; "labels": [n] int64


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of a number of classes, split once and for all."""

    name: str
    train: Columns
    validation: Columns

    def checksum(self) -> int:
        """Of every number: other examples have another."""
        total = 0
        for columns in (self.train, self.validation):
            for tensor in columns.values():
                total = zlib.crc32(tensor.contiguous().numpy().tobytes(), total)
        return total


class Rows(Dataset["dict[str, Tensor]"]):
    """One example after the other."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self._columns.items()}
