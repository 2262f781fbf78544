"""Files of torch.save, mapped and not read: what is in them, and new ones that are filled in where they lie."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from mmap import MAP_SHARED
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import set_default_mmap_options, skip_data


class Empty:
    """A tensor to be, in a file that is not there yet."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype


def load(file: Path) -> Any:
    """What torch.save wrote, its tensors mapped. Raises ValueError for anything else."""
    try:
        # A file from before torch 1.6 is not a zip and cannot be mapped.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError):
        raise ValueError(  # torch's own text advises weights_only=False, which runs whatever code the file holds
            f"{file}: damaged, or not written by torch.save(state_dict, FILE)"
        ) from None


def create(file: Path, content: Any) -> Any:
    """Write a file for torch.load with every `Empty` a tensor of zeros, and return it mapped: to be written to."""
    with FakeTensorMode():
        fakes = _mapped(content, lambda x: torch.empty(x.shape, dtype=x.dtype))
    with skip_data(materialize_fake_tensors=True):
        torch.save(fakes, file)
    with set_default_mmap_options(MAP_SHARED):
        made = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    _fill(made, content)
    return made


def _mapped(content: Any, change: Callable[[Any], Any]) -> Any:
    """The same content with every tensor, there or to be, changed."""
    if isinstance(content, Tensor | Empty):
        return change(content)
    if isinstance(content, dict):
        return {key: _mapped(value, change) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_mapped(value, change) for value in content)
    return content


def _fill(made: Any, content: Any) -> None:
    """Copy every tensor that is there."""
    if isinstance(content, Tensor):
        made.copy_(content)
    elif isinstance(content, dict):
        for key, value in content.items():
            _fill(made[key], value)
    elif isinstance(content, list | tuple):
        for to, value in zip(made, content, strict=True):
            _fill(to, value)
