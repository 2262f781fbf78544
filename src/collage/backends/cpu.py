"""The CPU backend: compiled kernels (``csrc/``), one call per batch, bit for bit what the reference computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from collage.backends import reference
from collage.backends.batch import Batch, Noise, Region
from collage.formats import format_of
from collage.layout import Plane, Planes, as_rows
from collage.rng import bases, draw_of
from collage.rules.folding import row

MISSING = (
    "this installation was built without them; install a C++17 compiler and reinstall the package "
    "(pip install --force-reinstall --no-deps, with -v to see why a build failed)"
)


def _load() -> Any:
    try:
        return import_module("collage._native")
    except ImportError:
        return None


native = _load()
FOLDS_ON_DEVICE = False
GRADIENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def step(batch: Batch) -> None:
    """Carry out the batch on `torch.get_num_threads()` threads, with no temporary of a parameter's size."""
    constants, rows = _constants(batch)
    increment_version(reference.written(batch))  # as any in-place operation would
    gradient = GRADIENTS[batch.grads[0].dtype] if batch.grads else ""
    _operation(batch.rule.name, batch.formats, gradient, batch.rule.prefixes, batch.register).run(
        **_tensors(batch.formats, batch.planes, batch.grads, batch.kept),
        **(_noise(batch.seed, batch.steps, batch.keys, batch.regions, batch.kept) if batch.stochastic else {}),
        constants=constants,
        rows=rows,
        sums=_each(Tensor.data_ptr, batch.sums),
        maximize=batch.maximize,
        scale=float(batch.scale),
        threads=torch.get_num_threads(),
    )


def count_up(steps: Sequence[Tensor], addresses: Sequence[int] | None = None, read: bool = True) -> list[int]:
    """Every counter plus one; the counts, if they are to be read. addresses: where they lie, if that is known."""
    increment_version(list(steps))
    numbers: list[int] = native.count_up(addresses or _each(Tensor.data_ptr, steps))
    return numbers if read else []


def decode(format: str, planes: Sequence[Planes], out: Sequence[Tensor]) -> None:
    """out[k] <- the float32 number that planes[k] stand for."""
    increment_version(list(out))
    tensors = [tensor for own, result in zip(planes, out, strict=True) for tensor in (*own, result)]
    _run("decode", (format, "fp32"), tensors)


def encode(format: str, values: Sequence[Tensor], planes: Sequence[Planes], noise: Noise | None = None) -> None:
    """planes[k] <- values[k], float32, rounded to nearest, or stochastically with noise."""
    tensors = list(chain.from_iterable(planes))
    if [x.shape for x in values] != [own[0].shape for own in planes]:
        raise ValueError("values: one has another shape than the planes that it is to be encoded in")
    increment_version(tensors)
    drawn = _noise(noise.seed, noise.steps, noise.keys, noise.regions) if noise else {}
    _run("encode", (format,), tensors, values, (noise.prefix,) if noise else (), **drawn)


def broken(format: str, thetas: Sequence[Planes]) -> int:
    """How many elements of all parameters' theta have planes that no step could have left."""
    return _run("broken", (format,), list(chain.from_iterable(thetas)))


def squares(grads: Sequence[Tensor]) -> Tensor:
    """The sums of the squares of each gradient's elements, float64, in one pass over them."""
    sums = torch.zeros(len(grads), dtype=torch.float64, device="cpu")
    places = range(sums.data_ptr(), sums.data_ptr() + 8 * len(grads), 8)
    for dtype in {grad.dtype for grad in grads}:
        own = [grad for grad in grads if grad.dtype == dtype]
        formats = (GRADIENTS[dtype],)
        _operation("squares", formats, "", (), torch.float32).run(
            numel=_each(Tensor.numel, own),
            planes=_each(Tensor.data_ptr, own),
            layouts=[] if all(map(Tensor.is_contiguous, own)) else _strides(_layout(formats), own, ()),
            sums=[place for grad, place in zip(grads, places, strict=True) if grad.dtype == dtype],
            threads=torch.get_num_threads(),
        )
    return sums


def stream(formats: tuple[str, ...], planes: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Read and write all planes without arithmetic."""
    _run("stream", formats, planes, grads)


def _run(
    name: str,
    formats: tuple[str, ...],
    planes: Sequence[Tensor],
    grads: Sequence[Tensor] = (),
    prefixes: tuple[str, ...] = (),
    **columns: Any,
) -> int:
    """One of the operations beside a rule's step."""
    if not planes:
        return 0
    kernel = _operation(name, formats, GRADIENTS[grads[0].dtype] if grads else "", prefixes, torch.float32)
    count: int = kernel.run(**_tensors(formats, planes, grads), **columns, threads=torch.get_num_threads())
    return count


def _operation(
    name: str, formats: tuple[str, ...], gradient: str, prefixes: tuple[str, ...], register: torch.dtype
) -> Any:
    return _compiled(instruction_set(), name, formats, gradient, prefixes, register)


@cache
def _compiled(
    instructions: str,
    name: str,
    formats: tuple[str, ...],
    gradient: str,
    prefixes: tuple[str, ...],  # of the slots' state keys, or none: to nearest
    register: torch.dtype,
) -> Any:
    """The kernel of a rule, or of an operation beside it, for slots of these formats and a gradient dtype."""
    random = [tuple(draw_of(prefix)) for prefix in prefixes]
    try:
        return native.Operation(instructions, name, formats, random, register == torch.bfloat16, gradient)
    except ValueError as error:
        raise ValueError(
            f"backend: {error}: '{name}' of {', '.join(formats)}, gradients {gradient or 'none'}. Is it in "
            "csrc/rules.hpp and csrc/formats.hpp, and was the package built since? backend='reference' has them all"
        ) from None


@cache
def instruction_set() -> str:
    """The best one that this machine has."""
    best: str = native.instruction_sets()[0]
    return best


@cache
def _layout(formats: tuple[str, ...]) -> tuple[Plane, ...]:
    """Every plane of a parameter."""
    return tuple(plane for name in formats for plane in format_of(name).planes)


def _each(method: Callable[[Tensor], int], tensors: Sequence[Tensor]) -> list[int]:
    return list(map(method, tensors))


def _tensors(
    formats: tuple[str, ...], planes: Sequence[Tensor], grads: Sequence[Tensor], kept: dict[str, Any] | None = None
) -> dict[str, list[Any]]:
    """Where the tensors of a call lie: columns of native numbers."""
    found: dict[str, Any] = {} if kept is None else kept
    layout = _layout(formats)
    if "numel" not in found:
        visible = planes[:: len(layout)]
        _require_whole(layout, planes, visible)
        in_rows = any(plane.per != 1 for plane in layout)
        found["numel"] = _each(Tensor.numel, visible)
        found.setdefault("addresses", _each(Tensor.data_ptr, planes))
        found["columns"] = [as_rows(param.shape)[1] for param in visible] if in_rows else []
        found["in_order"] = all(map(Tensor.is_contiguous, planes))
    in_order = found["in_order"] and all(map(Tensor.is_contiguous, grads))
    return {
        "numel": found["numel"],
        "planes": found["addresses"],
        "gradients": _each(Tensor.data_ptr, grads),
        "layouts": [] if in_order else _strides(layout, planes, grads),
        "columns": found["columns"],
    }


def _require_whole(layout: tuple[Plane, ...], planes: Sequence[Tensor], visible: Sequence[Tensor]) -> None:
    """Raise ValueError for a plane of another shape or dtype than its format has: a kernel would read beside it."""
    shapes = [plane.shape(param.shape) for param in visible for plane in layout]
    dtypes = [plane.dtype for _ in visible for plane in layout]
    for tensor, shape, dtype in zip(planes, shapes, dtypes, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"planes: one has shape {tuple(tensor.shape)}, {tensor.dtype}, instead of {shape}, {dtype}"
            )


def _strides(layout: tuple[Plane, ...], planes: Sequence[Tensor], grads: Sequence[Tensor]) -> list[list[int]]:
    """Sizes and strides of the parameters whose tensors are not all contiguous."""
    strides = []
    for k in range(len(planes) // len(layout)):
        own = planes[k * len(layout) : (k + 1) * len(layout)]
        each = [tensor for tensor, plane in zip(own, layout, strict=True) if plane.per == 1] + list(grads[k : k + 1])
        contiguous = all(map(Tensor.is_contiguous, each))
        strides.append([] if contiguous else [*own[0].shape, *chain.from_iterable(map(Tensor.stride, each))])
    return strides


def _noise(
    seed: int,
    steps: Sequence[int],
    keys: Sequence[int],
    regions: Sequence[Region],
    kept: dict[str, Any] | None = None,
) -> dict[str, list[Any]]:
    """What random bits are drawn from, as columns."""
    found: dict[str, Any] = {} if kept is None else kept
    if "shards" not in found:
        found["shards"] = [[*region.sizes, *region.starts, *region.strides] for region in regions]
    return {"streams": bases(seed, steps, keys), "shards": found["shards"]}


def _constants(batch: Batch) -> tuple[list[list[float]], list[int]]:
    """(folded constants of each distinct step, which of them each parameter takes)."""
    distinct = {step: k for k, step in enumerate(dict.fromkeys(batch.steps))}
    return [row(batch.constants(step)) for step in distinct], [distinct[step] for step in batch.steps]
