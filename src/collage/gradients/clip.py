"""Clipping by the norm of all gradients, added up in float64: bf16 gradients have no bf16 norm here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from collage.backends import operator
from collage.collectives import summed
from collage.sharding import locals_of, placed

# Parameter -> the Release that uses its gradients, weakly: that one has the parameter, which would never be freed.
RELEASED: MutableMapping[Tensor, Callable[[], Any]] = WeakIdKeyDictionary()


def checked(name: str, number: Any) -> float:
    """A number >= 0. Raises ValueError, naming the argument."""
    try:
        result = float(number)
    except (TypeError, ValueError):
        result = math.nan
    if not result >= 0:
        raise ValueError(f"{name}: needs a number >= 0, got {number!r}")
    return result


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale all gradients, in place, so that their norm is at most ``max_norm``. As torch.nn.utils.clip_grad_norm_.

    torch rounds the norm of each bfloat16 gradient to bfloat16 (0.4 %); this one adds up in float64, in an order that
    neither threads nor devices change. Each gradient is multiplied in float32 and rounded once to its own dtype.

    Args:
        parameters: those whose gradients count, or one; any floating dtypes and devices; DTensors are seen as wholes
            (a collective: every rank has to come).
        max_norm: the largest norm allowed. Gradients are scaled by min(1, max_norm / (norm + 1e-6)).
        norm_type: of the p-norm, > 0; ``inf`` for the largest magnitude.
        error_if_nonfinite: whether to raise where the norm is NaN or Inf; otherwise all gradients are scaled by that.
        foreach: accepted, as torch has it; there is one way here.

    Returns:
        The norm before clipping, 0-d float32, of the whole gradients, the same on every rank (torch's is a DTensor).

    Raises:
        ValueError: max_norm below 0 or NaN, norm_type not above 0.
        TypeError: a sparse gradient, a module.
        RuntimeError: a norm that is not finite, if that is asked for; gradients that `release_gradients` has used up.
            Nothing is changed then.

    >>> w = torch.nn.Parameter(torch.zeros(2).bfloat16())
    >>> w.grad = torch.tensor([3.0, 4.0]).bfloat16()
    >>> clip_grad_norm_([w], 1.0), w.grad
    (tensor(5.), tensor([0.6016, 0.8008], dtype=torch.bfloat16))
    """
    if isinstance(parameters, nn.Module):
        raise TypeError("parameters: got a module; give model.parameters()")
    max_norm = checked("max_norm", max_norm)
    if not checked("norm_type", norm_type) > 0:
        raise ValueError(f"norm_type: needs a number > 0, or inf, got {norm_type!r}")
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if any(release.has_begun for p in given if (release := RELEASED.get(p, lambda: None)())):
        raise RuntimeError(
            "parameters: their gradients are used as they arrive (release_gradients), so some are gone; give max_norm "
            "to release_gradients"
        )
    params = [p for p in given if p.grad is not None]
    norm = total(_powers_of(params, float(norm_type)), float(norm_type))
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients of `parameters` is {norm.item():g}, so it cannot be "
            "clipped. error_if_nonfinite=False scales by it; an optimizer with skip_nonfinite=True skips such a step"
        )
    scale_([p.grad for p in params], coefficient(norm, max_norm))
    return norm.float()


def squares_of(params: Sequence[Any]) -> Tensor:
    """[params] float64: the sum of the squares of this rank's part of each gradient. TypeError for a sparse one."""
    return operator.squares(_parts([placed(p.grad, p) for p in params]))


def _powers_of(params: Sequence[Any], norm_type: float) -> Tensor:
    """[params] float64: the sum of |g|**norm_type over each whole gradient; for inf the largest |g|."""
    whole = [placed(p.grad, p) for p in params]
    parts = _parts(whole)
    if norm_type == 2.0:
        return summed(operator.squares(parts), whole)
    found = [_power(g, norm_type).to(parts[0].device) for g in parts]
    return summed(
        torch.stack(found) if found else torch.zeros(0, dtype=torch.float64, device="cpu"),
        whole,
        largest=math.isinf(norm_type),
    )


def _parts(grads: list[Any]) -> list[Tensor]:
    for g in grads:
        if g.layout != torch.strided:
            raise TypeError(f"parameters: the gradient of one of shape {tuple(g.shape)} is sparse; use a dense one")
    return locals_of(grads)


def _power(g: Tensor, norm_type: float) -> Tensor:
    if g.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=g.device)
    norm: Tensor = torch.linalg.vector_norm(g, norm_type, dtype=torch.float64)
    return norm if math.isinf(norm_type) else norm.pow(norm_type)


def total(powers: Tensor, norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients, 0-d float64."""
    if math.isinf(norm_type):
        return powers.amax() if powers.numel() else powers.sum()
    return powers.sum() ** (1.0 / norm_type) if norm_type != 2.0 else powers.sum().sqrt()


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied by, 0-d float32: torch's, min(1, max_norm / (norm + 1e-6))."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).float()


def scale_(grads: Sequence[Any], by: Tensor) -> None:
    """Multiply gradients in place, each product rounded once. On the CPU nothing is done where ``by`` is 1."""
    if by.is_cpu and by.item() == 1.0:
        return
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in locals_of(list(grads)):
        alike.setdefault((g.device, g.dtype), []).append(g)
    for (device, _), own in alike.items():
        torch._foreach_mul_(own, by.to(device))
