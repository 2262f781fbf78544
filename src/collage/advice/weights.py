"""What advice looks at of a model: every shape, and of each parameter a sample of its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from collage.layout import as_rows
from collage.saying import several
from collage.sharding import local

LOOKED = 1 << 14  # numbers of a parameter that are looked at
RUN = 128  # neighbours of a row that stay together, as formats with a scale for 128 need them
ROWS, SINGLES = 64, 1024  # of the rehearsal: runs of matrices, numbers of vectors

_BUFFER = re.compile(r"inv_freq$|running_(mean|var)$|masked_bias$")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")  # old GPT-2 files hold the causal mask as [1, 1, n, n]

_E4M3 = (torch.float8_e4m3fn, "F8_E4M3")

Entry = tuple[str, tuple[int, ...], Tensor]  # name, shape, the numbers or some of them


class Part(NamedTuple):
    """A parameter: runs of it [n, at most RUN] in float32, or if it has one dimension numbers of it [n]."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # that it came in
    values: Tensor

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Weights:
    """The parameters of a model that train, each once; and the bytes of those that do not.

    Raises:
        ValueError: there is none that trains.
    """

    parts: Sequence[Part]
    frozen: int = 0

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("model: has no floating-point weights that train; give one that has")

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [part.shape for part in self.parts]

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {part.dtype for part in self.parts}

    @property
    def count(self) -> int:
        return sum(part.size for part in self.parts)

    def samples(self) -> tuple[Tensor, Tensor]:
        """What is rehearsed: of matrices, and of norms and biases."""
        return self.matrices(), self.vectors()

    def matrices(self) -> Tensor:
        """Runs [ROWS, RUN] of what has two dimensions, each parameter in proportion to its size; or [0, RUN]."""
        own = [part for part in self.parts if len(part.shape) > 1 and part.values.numel()]
        runs = [_runs(part.values) for part in own]
        if not own:
            return torch.zeros(0, RUN, dtype=torch.float32, device="cpu")
        return _systematic([part.size for part in own], runs, ROWS)

    def vectors(self) -> Tensor:
        """Numbers [SINGLES] of norms and biases, likewise; or [0]."""
        own = [part for part in self.parts if len(part.shape) < 2 and part.values.numel()]
        if not own:
            return torch.zeros(0, dtype=torch.float32, device="cpu")
        return _systematic([part.size for part in own], [part.values for part in own], SINGLES)


def of(model: nn.Module | Mapping[str, Tensor] | Weights) -> Weights:
    """The weights of a module's parameters that train, or of tensors by name.

    Raises:
        ValueError: there are none, or they have no numbers: on the meta device, or e4m3 codes.
        TypeError: something else.
    """
    if isinstance(model, Weights):
        return model
    if isinstance(model, nn.Module):
        _require_made(model)
        named = dict(model.named_parameters())
        _require_numbers({name: x.dtype for name, x in (*named.items(), *model.named_buffers())})
        frozen = sum(param.nbytes for param in named.values() if not param.requires_grad)
        return _of_tensors({name: param for name, param in named.items() if param.requires_grad}, frozen)
    if isinstance(model, Mapping):
        _require_numbers({name: x.dtype for name, x in model.items() if isinstance(x, Tensor)})
        return _of_tensors(_trained(model))
    raise TypeError(f"model: needs a torch.nn.Module or a dict of tensors, got {type(model).__name__}")


def _of_tensors(named: Mapping[str, Tensor], frozen: int = 0) -> Weights:
    entries = ((name, tuple(tensor.shape), local(tensor.detach())) for name, tensor in named.items())
    return gathered(entries, frozen)


def _trained(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a dictionary that an optimizer would have: no buffers, a tied one once."""
    found: dict[str, Tensor] = {}
    places: set[tuple[int, torch.Size]] = set()
    for name, x in state.items():
        if not _is_tensor(name, x) or is_buffer(name, x.dim()):
            continue
        place = (x.data_ptr(), x.shape) if x.layout == torch.strided and not x.is_meta else (id(x), x.shape)
        if place not in places or not x.numel():
            found[name] = x
        places.add(place)
    return found


def is_buffer(name: str, dimensions: int) -> bool:
    """Whether an entry of this name is no weight, though it is of floating point."""
    return bool(_BUFFER.search(name) or (dimensions != 1 and _MASK.search(name)))


def codes(dtypes: Mapping[str, Any]) -> list[str]:
    """The weights that `collage.fp8.convert` made: e4m3 codes, which stand for nothing without the scales beside them.

    dtypes: of every entry of a model, torch's or safetensors' names of them.
    """
    return [name for name, dtype in dtypes.items() if dtype in _E4M3 and f"{name}_scale" in dtypes]


def _require_numbers(dtypes: Mapping[str, torch.dtype]) -> None:
    found = codes(dtypes)
    if found:
        raise ValueError(
            f"model: {several(found)}: e4m3 codes, which no strategy but theirs takes; ask before "
            "collage.fp8.convert(model), or about collage.fp8.export(model)"
        )


def _require_made(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if isinstance(param, nn.UninitializedParameter):
            raise ValueError(f"model: '{name}' has no shape yet; call the lazy model once first")


def _is_tensor(name: str, value: Any) -> bool:
    """Raises TypeError for what holds tensors itself; numbers and text beside them are left out."""
    if isinstance(value, Mapping):
        raise TypeError(f"model: '{name}' is a dict; give the dict of the weights alone, such as checkpoint['{name}']")
    return isinstance(value, Tensor)


def gathered(entries: Iterable[Entry], frozen: int = 0) -> Weights:
    """The sample of entries that come one at a time. frozen: bytes of what does not train."""
    return Weights([Part(*entry[:2], entry[2].dtype, _looked(*entry)) for entry in _floats(entries)], frozen)


def _floats(entries: Iterable[Entry]) -> Iterator[Entry]:
    for entry in entries:
        if entry[2].is_floating_point() and entry[2].dtype.itemsize > 1 and 0 not in entry[1]:
            yield entry


@torch.no_grad()
def _looked(name: str, shape: tuple[int, ...], tensor: Tensor) -> Tensor:
    """Numbers of a tensor at even distances, LOOKED of them at most, on the CPU."""
    if tensor.is_meta:
        raise ValueError(f"model: '{name}' is on the meta device and has no numbers to look at; load its weights first")
    if tensor.layout != torch.strided:
        raise ValueError(f"model: '{name}' is sparse ({tensor.layout}); give dense weights")
    if len(shape) < 2:
        return _finite(name, tensor.reshape(-1)[:: -(-tensor.numel() // LOOKED)])
    rows, columns = as_rows(tensor.shape)
    width = min(columns, RUN)
    return _finite(name, tensor.reshape(rows, columns)[:: -(-rows * width // LOOKED), :width])


def _finite(name: str, values: Tensor) -> Tensor:
    """In float32. Raises ValueError for NaN and Inf: nothing that holds them trains."""
    own = values.to("cpu", torch.float32)
    if not bool(own.isfinite().all()):
        raise ValueError(f"model: '{name}' holds NaN or Inf; mend these weights first")
    return own


def _runs(values: Tensor) -> Tensor:
    """[n, RUN]: rows that are shorter stand one after the other, the last run begins anew."""
    flat = values.flatten()
    n = -(-len(flat) // RUN)
    return flat.repeat(-(-n * RUN // len(flat)))[: n * RUN].view(n, RUN)


def _systematic(sizes: Sequence[int], own: Sequence[Tensor], wanted: int) -> Tensor:
    """So many of the entries of several tensors, of each in proportion to its size, at even distances."""
    ends = list(accumulate(sizes))
    picked: list[Tensor] = []
    for k, (end, size, entries) in enumerate(zip(ends, sizes, own, strict=True)):
        before = 0 if k == 0 else ends[k - 1]
        many = math.floor(end / ends[-1] * wanted) - math.floor(before / ends[-1] * wanted)
        places = (torch.arange(many, device="cpu") * len(entries)) // max(many, 1)
        picked.append(entries[places])
        assert size > 0
    return torch.cat(picked)
