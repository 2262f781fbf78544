"""The weights of a model as it lies on disk, one tensor at a time, and the kind of layer each belongs to."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.advice.weights import codes, is_buffer
from collage.saying import several

KINDS = ("embedding", "attention", "mlp", "norm", "bias", "head", "other")

ACCEPTED = "a .safetensors file, a state dict (.pt, .pth, .bin, .ckpt), or the folder of a transformers model or a run"
STATE_DICTS = (".pt", ".pth", ".bin", ".ckpt")
WEIGHTS = "weights.safetensors"  # of a run
IN_FOLDER = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", WEIGHTS,
)  # fmt: skip
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # where training loops put the weights
_FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of what can be trained

# First match wins. Names of GPT-2, Llama (Hugging Face's and Meta's), BERT, RoBERTa and their relatives.
_PATTERNS = (
    ("norm", r"(^|\.)(ln\w*|bn\d*|\w*norm\w*)(\.\d+)?\.(weight|gamma|scale)$"),
    ("bias", r"(bias|beta)$"),
    ("head", r"(^|\.)(lm_head|embed_out|cls|classifier|pre_classifier|score|pooler|qa_outputs|vocab_\w+)\."),
    ("head", r"^(output|decoder)\.weight$"),
    ("embedding", r"embed|(^|\.)(wte|wpe|shared)\."),
    ("attention", r"attn|attention|(^|\.)[qkvo]_proj\."),
    ("mlp", r"mlp|intermediate|ffn|feed_?forward|expert|densereludense|(^|\.)(fc\d?|c_fc|lin[12]|output\.dense)\."),
    ("mlp", r"(^|\.)(gate|up|down|c)_proj\."),
)
_KINDS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS)


class Entry(NamedTuple):
    """One entry of a model: its tensor, or None for what no optimizer updates (integers, fp8, buffers)."""

    name: str
    numel: int
    tensor: Tensor | None


def kind_of(name: str) -> str:
    """The kind of layer a weight of this name belongs to, one of KINDS.

    >>> [kind_of(n) for n in ("transformer.h.0.ln_1.weight", "encoder.layer.0.attention.output.dense.weight")]
    ['norm', 'attention']
    """
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def read(path: Path) -> Iterator[Entry]:
    """Every tensor of the model at ``path``, memory-mapped where the file allows; tied weights once.

    Raises:
        FileNotFoundError: the path, or a shard that an index names, is missing.
        ValueError: a file of another kind, or of e4m3 codes.
    """
    for file in files_of(path):
        if not file.exists():
            hint = f"named by the index of {path}" if file != path else f"want {ACCEPTED}; nothing is downloaded"
            raise FileNotFoundError(f"{file}: no such file or folder ({hint})")
        if file.suffix == ".safetensors":
            yield from _safetensors(file)
        elif file.suffix in STATE_DICTS:
            yield from _state_dict(file)
        else:
            raise ValueError(f"{file}: not a model; want {ACCEPTED}")


def files_of(path: Path) -> list[Path]:
    """The files of a model: one, or the shards that an index names. Raises as `read` does; a file may be missing."""
    if path.is_dir():
        found = next((path / name for name in IN_FOLDER if (path / name).exists()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: no model in this folder; want one of {', '.join(IN_FOLDER)}")
        return files_of(found)
    if not path.name.endswith(".index.json") or not path.exists():
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        return [path.parent / shard for shard in shards]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not an index of shards (no 'weight_map')") from None


def require_numbers(file: Path, dtypes: Mapping[str, Any]) -> None:
    """Raises ValueError, saying what to give instead, for weights that `collage.fp8.convert` made.

    dtypes: of all entries, as `codes` takes them.
    """
    found, whole = codes(dtypes), float32_of(file)
    if not found:
        return
    fix = "save their numbers, model.save_pretrained(folder, state_dict=collage.fp8.export(model))"
    if whole:
        fix = f"give {whole}, the run's last weights in float32"
    raise ValueError(f"{file}: {several(found)}: e4m3 codes, which only their own layers can read; {fix}")


def float32_of(file: Path) -> Path | None:
    """The float32 weights of the run that has the checkpoint of this file; None: it is of none, or the run goes on."""
    whole = file.parent.parent / WEIGHTS
    return whole if file.parent.name.startswith("checkpoint-") and whole.exists() else None


def _safetensors(file: Path) -> Iterator[Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            headers = {name: tensors.get_slice(name) for name in sorted(tensors.keys())}
            require_numbers(file, {name: header.get_dtype() for name, header in headers.items()})
            for name, header in headers.items():
                shape = torch.Size(header.get_shape())
                used = header.get_dtype() in _FLOATS and not is_buffer(name, len(shape))
                yield Entry(name, shape.numel(), tensors.get_tensor(name) if used else None)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file, or damaged ({first_line(error)})") from None


def _state_dict(file: Path) -> Iterator[Entry]:
    try:
        # A file from before torch 1.6 is not a zip and cannot be mapped.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError):
        raise ValueError(  # torch's own text advises weights_only=False, which runs whatever code the file holds
            f"{file}: damaged, or not a state dict; write one with torch.save(model.state_dict(), FILE)"
        ) from None
    seen = set()
    found = unwrapped(loaded, file)
    require_numbers(file, {name: x.dtype for name, x in found.items() if isinstance(x, Tensor)})
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.layout == torch.strided:
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if tensor.numel() and place in seen:
                continue
            seen.add(place)
        used = tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.layout == torch.strided
        used = used and not is_buffer(name, tensor.dim())
        yield Entry(name, tensor.numel(), tensor.detach() if used else None)


def unwrapped(loaded: Any, file: Path) -> Mapping[str, Any]:
    """The mapping from names to tensors, also when it is one entry of a training checkpoint."""
    candidates = [loaded, *(loaded.get(key) for key in WRAPPERS)] if isinstance(loaded, Mapping) else []
    for mapping in candidates:
        if isinstance(mapping, Mapping) and any(isinstance(x, Tensor) for x in mapping.values()):
            return {str(name): x for name, x in mapping.items()}
    raise ValueError(f"{file}: not a state dict: it holds no tensors by name, also not under {', '.join(WRAPPERS)}")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
