"""Orthogonalisation by Newton-Schulz steps, as Muon has it (Jordan et al. 2024), of one matrix at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage.rules import Setting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCALES = (None, "original", "match_rms_adamw")
MOST_STEPS = 100  # as in torch


def scale_of(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """By how much lr is adjusted to a matrix of that shape, as torch.optim.Muon does it.

    >>> scale_of("match_rms_adamw", 100, 25)
    2.0
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Orthogonalisation(NamedTuple):
    """How a group's matrices are orthogonalised: its settings, which were checked.

    ns_dtype: of the multiplications; None: bfloat16 where the hardware multiplies it, else float32, which is faster.
    split: as `sizes_of` takes it.
    """

    ns_coefficients: tuple[float, ...]
    ns_steps: int
    eps: float
    adjust_lr_fn: str | None
    ns_dtype: str | None
    split: Sequence[int]

    @staticmethod
    def of(group: Mapping[str, Any]) -> Orthogonalisation:
        return Orthogonalisation(*map(group.__getitem__, Orthogonalisation._fields))

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Of the multiplications."""
        slow = device.type == "cpu" and not _cpu_multiplies_bfloat16()
        return DTYPES[self.ns_dtype or ("float32" if slow else "bfloat16")]

    def __call__(self, matrix: Tensor) -> Tensor:
        """Each block of a matrix's rows, nearly orthogonal, times the scale of its shape: float32. Pure.

        matrix: [rows, columns], in the dtype of the multiplications.
        """
        if not matrix.numel():
            return matrix.float()
        sizes = sizes_of(self.split, len(matrix))
        with torch.autocast(matrix.device.type, enabled=False):
            if len(set(sizes)) > 1:
                return torch.cat([self._scaled(block) for block in torch.split(matrix, list(sizes))])
            if len(sizes) == 1:
                return self._scaled(matrix)
            return self._scaled(matrix.reshape(len(sizes), sizes[0], -1)).reshape(matrix.shape)

    def _scaled(self, blocks: Tensor) -> Tensor:
        scale = scale_of(self.adjust_lr_fn, *blocks.shape[-2:])
        return newton_schulz(blocks, self.ns_coefficients, self.ns_steps, self.eps).float().mul_(scale)


@cache
def _cpu_multiplies_bfloat16() -> bool:
    """Twice as fast as float32; where it has no instructions for it, torch's is several times slower."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def newton_schulz(blocks: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Matrices with the same singular vectors, whose singular values these steps bring close to 1 (some 0.7 to 1.2).

    The bits of a single matrix are those of torch.optim.Muon, whose order of operations this is.

    Args:
        blocks: [rows, columns], or [blocks, rows, columns], each by itself.
        coefficients: of x, x**3 and x**5, which every step applies to all singular values.
        eps: the least norm that one is divided by.
    """
    a, b, c = coefficients
    is_tall = blocks.shape[-2] > blocks.shape[-1]
    x = blocks.mT if is_tall else blocks
    fused = torch.addmm if x.dim() == 2 else torch.baddbmm
    x = x / _norm(x).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = fused(x, fused(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _norm(x: Tensor) -> Tensor:
    """Of each matrix."""
    norm: Tensor = x.norm() if x.dim() == 2 else torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return norm


def sizes_of(split: Sequence[int], rows: int) -> Sequence[int]:
    """Rows of each block that is orthogonalised by itself: of one after another, of every one, or () for a single one.

    Raises:
        ValueError: these are not all rows.

    >>> sizes_of((128, 32, 32), 192), sizes_of((64,), 192), sizes_of((), 192)
    ((128, 32, 32), (64, 64, 64), (192,))
    """
    if not split:
        return (rows,)
    sizes = split if len(split) > 1 else tuple(split) * (rows // split[0])
    if sum(sizes) != rows:
        wanted = f"{tuple(split)}, which add up to {sum(split)}" if len(split) > 1 else f"blocks of {split[0]}"
        raise ValueError(f"split: asks for {wanted}, and there are {rows} rows")
    return sizes


def checked(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings of the orthogonalisation as Python's numbers. Raises, naming the setting, for a wrong one."""
    steps = group["ns_steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps < MOST_STEPS:
        raise ValueError(f"ns_steps: needs an integer in [0, {MOST_STEPS}), got {steps!r}")
    for name, known in (("adjust_lr_fn", SCALES), ("ns_dtype", (None, *DTYPES))):
        if group[name] not in known:
            raise ValueError(f"{name}: unknown {group[name]!r}; known: {', '.join(map(str, known))}")
    return {
        "ns_coefficients": _coefficients(group["ns_coefficients"]),
        "eps": Setting("eps").checked(group["eps"]),
        "split": _split(group["split"]),
    }


def _coefficients(given: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, given))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"ns_coefficients: needs three finite numbers, got {given!r}")
    return numbers


def _split(given: Any) -> tuple[int, ...]:
    sizes = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ValueError(f"split: needs the rows of each block, or of all blocks, each > 0; got {given!r}")
    return sizes
