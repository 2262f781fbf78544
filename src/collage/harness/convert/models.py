"""A model on disk, tensor by tensor: what is in it, read when it is asked for, and written one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from collage.harness.convert.files import load
from collage.harness.tasks.weights import ACCEPTED, STATE_DICTS, files_of, first_line, unwrapped

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ALIGNED = 8  # bytes: where safetensors' own writer begins the data


class About(NamedTuple):
    """What is known of a tensor that has not been read."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Model:
    """The tensors of a model, in the files that they lie in."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self.shards: list[dict[str, About]] = []
        self._of: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}
        for file in files_of(path):
            self.shards.append(self._open(file, stack))
        self.about = {name: about for shard in self.shards for name, about in shard.items()}
        self.is_ordered = all(file.suffix in STATE_DICTS for file in files_of(path))  # safetensors sorts by name

    def _open(self, file: Path, stack: ExitStack) -> dict[str, About]:
        if not file.exists():
            hint = f"named by the index of {self.path}" if file != self.path else f"want {ACCEPTED}"
            raise FileNotFoundError(f"{file}: no such file or folder ({hint})")
        if file.suffix == ".safetensors":
            return self._open_safetensors(file, stack)
        if file.suffix not in STATE_DICTS:
            raise ValueError(f"{file}: not a model; want {ACCEPTED}")
        found = {name: x.detach() for name, x in unwrapped(load(file), file).items() if isinstance(x, Tensor)}
        self._of |= found
        return {name: About(x.dtype, x.shape) for name, x in found.items()}

    def _open_safetensors(self, file: Path, stack: ExitStack) -> dict[str, About]:
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            headers = {name: opened.get_slice(name) for name in list(opened.keys())}
            self._of |= dict.fromkeys(headers, opened)
            self.metadata |= opened.metadata() or {}
            return {
                name: About(DTYPES[header.get_dtype()], torch.Size(header.get_shape()))
                for name, header in headers.items()
            }
        except SafetensorError as error:
            raise ValueError(f"{file}: not a safetensors file, or damaged ({first_line(error)})") from None
        except KeyError as error:
            raise ValueError(f"{file}: holds tensors of dtype {error}, which torch has not") from None

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, from the disk; it stays there as long as it is looked at alone."""
        holder = self._of[name]
        tensor: Tensor = holder if isinstance(holder, Tensor) else holder.get_tensor(name)
        return tensor

    def place(self, name: str) -> tuple[Any, ...]:
        """Equal for the names of tied weights, where the file knows of it."""
        holder = self._of[name]
        if not isinstance(holder, Tensor) or not holder.numel():
            return (name,)
        return holder.untyped_storage().data_ptr(), holder.storage_offset(), holder.shape, holder.stride()


@contextmanager
def opened(path: Path) -> Iterator[Model]:
    """A model, whose files are closed at the end. Raises ValueError, OSError as `weights.read` does."""
    with ExitStack() as stack:
        yield Model(path, stack)


class Writer:
    """A model being written, in as many files as the one it is made of: each tensor once, in any order of its file."""

    def __init__(self, folder: Path, shards: list[dict[str, About]], metadata: Mapping[str, str]) -> None:
        self._folder, self._shards, self._metadata = folder, shards, {"format": "pt", **metadata}
        self._at: dict[str, tuple[BinaryIO, int]] = {}

    def __enter__(self) -> Writer:
        self._stack = ExitStack()
        for k, shard in enumerate(self._shards):
            file = self._stack.enter_context((self._folder / self._name(k)).open("wb"))
            by_size = sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each is aligned
            self._begin(file, dict(by_size))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _name(self, k: int) -> str:
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{k + 1:05d}-of-{count:05d}.safetensors"

    def _begin(self, file: BinaryIO, shard: Mapping[str, About]) -> None:
        """The header, and where each tensor will lie."""
        header: dict[str, Any] = {"__metadata__": self._metadata}
        at = 0
        for name, about in shard.items():
            ends = at, at + about.nbytes
            header[name] = {"dtype": _CODES[about.dtype], "shape": list(about.shape), "data_offsets": list(ends)}
            at = ends[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNED)
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        self._at |= {name: (file, first + header[name]["data_offsets"][0]) for name in shard}

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor where its header says it is."""
        file, at = self._at[name]
        file.seek(at)
        flat = tensor.contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().tobytes())

    def finish(self) -> None:
        """The index of several files."""
        if len(self._shards) < 2:
            return
        weight_map = {name: self._name(k) for k, shard in enumerate(self._shards) for name in shard}
        total = sum(about.nbytes for shard in self._shards for about in shard.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
