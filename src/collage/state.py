"""What an optimizer keeps for one parameter: a step counter and, per slot, the planes of its format.

Plane 0 of the first slot is the parameter itself; every other plane is a tensor of its shape, strides and placement
under a key of the optimizer's state (``param_lo``, ``exp_avg``, ``exp_avg_sq_lo``, ...).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, ge
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from collage.formats import Format, Planes, format_of, pieces, split
from collage.rng import key_of
from collage.rules import Rule
from collage.sharding import local
from collage.strategies import Strategy

_layout, _dtype, _shape, _device, _nbytes = map(attrgetter, ("layout", "dtype", "shape", "device", "nbytes"))

_WITHIN = ("optimizer", "_optimizer", "optim")  # where wrappers keep theirs: Accelerate, Lightning, ZeRO

State = dict[str, Any]
Group = dict[str, Any]
T = TypeVar("T")


class Entry(NamedTuple):
    """One parameter and where it stands."""

    name: str
    key: int  # of its random stream
    group_index: int
    group: Group
    param: Tensor


def named(index: int, first: int, group: Group) -> Iterator[Entry]:
    """A group's parameters, with their names, or their positions from `first` on where they have none."""
    names = group.get("param_names") or [None] * len(group["params"])
    if len(names) != len(group["params"]):
        raise ValueError(
            f"param_groups[{index}]: {len(group['params'])} parameters and {len(names)} names; add parameters with "
            "add_param_group, and take them out of 'params' and 'param_names' together"
        )
    for position, (param, name) in enumerate(zip(group["params"], names, strict=True), first):
        yield Entry(name or str(position), key_of(name or position), index, group, param)


def require_unique(names: Iterable[str]) -> None:
    """Raise ValueError for a name given twice: they tell parameters apart in reports, and give them random bits."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"params: two parameters are named '{name}'; give each a name of its own, with a prefix")
        seen.add(name)


def formats(rule: Rule, strategy: Strategy) -> list[tuple[str, Format]]:
    """(state prefix, format) of each slot of the rule."""
    return [(prefix, format_of(getattr(strategy, slot))) for prefix, slot in rule.slots]


def dtypes(rule: Rule, strategy: Strategy) -> dict[str, torch.dtype]:
    """State key -> dtype of every plane but the parameter itself."""
    keyed = {
        prefix + suffix: dtype
        for prefix, fmt in formats(rule, strategy)
        for suffix, dtype in zip(fmt.suffixes, fmt.dtypes, strict=True)
    }
    del keyed["param"]
    return keyed


def slots(rule: Rule, strategy: Strategy, param: Tensor, state: Mapping[str, Tensor]) -> tuple[Planes, ...]:
    """The local planes of every slot, theta first."""
    tensors = {**state, "param": param.detach()}
    return tuple(
        tuple(local(tensors[prefix + suffix]) for suffix in fmt.suffixes) for prefix, fmt in formats(rule, strategy)
    )


def initialise(rule: Rule, strategy: Strategy, param: Tensor, state: State, capturable: bool) -> None:
    """Fill an empty state: step 0 (on the parameter's device, if capturable), theta as it is, every other number 0."""
    fresh: State = {"step": torch.zeros((), dtype=torch.int64, device=param.device if capturable else "cpu")}
    for key, dtype in dtypes(rule, strategy).items():
        fresh[key] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    resync(rule, strategy, param, fresh)
    state |= fresh


def require_finite(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError, naming the parameter, for a finite number that would become infinite in dtype."""
    if values.is_meta or (dtype.itemsize >= values.dtype.itemsize and dtype != torch.float16):
        return
    for (part,) in pieces([values]):
        broken = part[part.to(dtype).isinf() & part.isfinite()]
        if broken.numel():
            raise ValueError(
                f"param '{name}': {broken[0].item():.6g} is beyond {name_of(dtype)}'s largest number, "
                f"{torch.finfo(dtype).max:g}" + ("; use bfloat16" if dtype == torch.float16 else "")
            )


def cast(rule: Rule, strategy: Strategy, param: Tensor, state: State, capturable: bool) -> None:
    """Cast a float32 parameter to the strategy's dtype, in place; its other planes keep what that cuts off."""
    low = torch.empty_like(param.detach(), dtype=strategy.dtype)
    fresh: State = {}
    initialise(rule, strategy, low, fresh, capturable)
    for source, *planes in pieces((param.detach(), *slots(rule, strategy, low, fresh)[0])):
        write(planes, split(strategy.formats[0], source))
    param.data, param.grad = low, None
    state |= fresh


def resync(rule: Rule, strategy: Strategy, param: Tensor, state: State) -> int:
    """Derive theta's other planes from the parameter as it is now. Returns how many elements that changed."""
    changed = 0
    for planes in pieces(slots(rule, strategy, param, state)[0]):
        fresh = split(strategy.formats[0], planes[0].float())
        moved = torch.zeros_like(planes[0], dtype=torch.bool)
        for old, new in zip(planes[1:], fresh[1:], strict=True):
            moved |= old != new
        changed += int(moved.sum())
        write(planes[1:], fresh[1:])
    return changed


def write(planes: Planes, values: Planes) -> None:
    """Copy values into planes, one by one."""
    for plane, value in zip(planes, values, strict=True):
        plane.copy_(value)


def check(rule: Rule, strategy: Strategy, param: Tensor, state: Mapping[str, Any], name: str, hint: str = "") -> None:
    """Raise ValueError, naming the parameter, if a state has not exactly this strategy's planes."""
    wanted = dtypes(rule, strategy)
    require_tensors(state, name)
    found = {key: value.dtype for key, value in state.items() if key != "step"}
    if "step" not in state or found != wanted:
        raise ValueError(
            f"param '{name}': strategy '{strategy}' keeps step, {_listing(wanted)}; its state has "
            f"{'step, ' if 'step' in state else ''}{_listing(found)}{hint}"
        )
    for key in wanted:
        require_shape(key, state[key], param, name)


def require_tensors(state: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, naming the parameter, if anything in a saved state is not a tensor."""
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"param '{name}': {key} needs to be a tensor, got {value!r:.50} ({type(value).__name__})")


def require_shape(key: str, plane: Tensor, param: Tensor, name: str) -> None:
    if plane.shape != param.shape:
        raise ValueError(
            f"param '{name}': {key} has shape {tuple(plane.shape)}, not the parameter's {tuple(param.shape)}. If it "
            "was resized, start its state anew: opt.state.pop(param), or drop its entry from a state_dict's 'state'"
        )


def check_counter(step: object, name: str) -> None:
    """Raise ValueError, naming the parameter, for a step counter that cannot be counted up."""
    if not isinstance(step, Tensor) or step.dtype != torch.int64 or step.dim() or not in_memory(step):
        got = f"{dtype_of(step)} of shape {tuple(step.shape)}" if isinstance(step, Tensor) else repr(step)
        raise ValueError(f"param '{name}': step needs to be a 0-d int64 tensor with memory in its state, got {got:.50}")


def count(step: Tensor, name: str) -> Tensor:
    """A saved step counter as int64. Raises ValueError, naming the parameter, if it is not one whole number >= 0."""
    if step.numel() != 1 or not float(step) >= 0 or not float(step).is_integer():
        raise ValueError(f"param '{name}': step needs one whole number >= 0, got {step!r:.50}")
    return step.detach().to("cpu", torch.int64).reshape(())


def _listing(planes: Mapping[str, torch.dtype]) -> str:
    return ", ".join(f"{key} ({name_of(dtype)})" for key, dtype in planes.items()) or "nothing"


def from_torch(
    rule: Rule, strategy: Strategy, param: Tensor, saved: Mapping[str, Any], live: Mapping[str, Tensor], name: str
) -> State:
    """A torch.optim state, its moments split into this strategy's planes.

    Theta's other planes are those of the ``live`` state, which may hold more of the weights than plane 0 does; where it
    has none they are derived from the parameter.
    """
    saved = {key: saved[key] for key in ("step", *(prefix for prefix, _ in rule.slots[1:]))}
    require_tensors(saved, name)
    state: State = {}
    initialise(rule, strategy, param, state, capturable=False)
    state["step"] = count(saved["step"], name)
    for planes, (prefix, fmt) in zip(slots(rule, strategy, param, state), formats(rule, strategy), strict=True):
        if prefix != "param":
            require_shape(prefix, saved[prefix], param, name)
            write(planes, split(fmt, local(saved[prefix]).to(planes[0].device, torch.float32)))
    theta = {"param" + suffix for suffix in strategy.formats[0].suffixes[1:]}
    return state | {key: live[key] for key in theta if key in live and live[key].dtype == state[key].dtype}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(tensor: Tensor) -> str:
    return name_of(tensor.dtype)


def unwrapped(optimizer: Any, kind: type[T]) -> T:
    """The optimizer of this kind inside the wrappers of Accelerate, Lightning, Fabric, ZeroRedundancyOptimizer, ...

    The innermost one: a wrapper may pass for what it wraps, by attributes or by class, and keep what is set on it.

    Raises:
        TypeError: there is none, only an optimizer of somewhere else.
    """
    found: T | None = None
    inner = optimizer
    for _ in range(8):  # wrappers of wrappers; a bound, as one might name itself
        if isinstance(inner, kind):
            found = inner
        within = [x for name in _WITHIN if hasattr(x := getattr(inner, name, None), "param_groups")]
        if not within or not hasattr(inner, "param_groups"):  # a scheduler has an optimizer and is none
            break
        inner = within[0]
    if found is None:
        theirs = f"{type(inner).__module__}.{type(inner).__name__}"
        raise TypeError(f"optimizer: needs one of this package, such as collage.AdamW, got {theirs}")
    return found


def accept(params: Sequence[Tensor], grads: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether a step can read these gradients of parameters of one dtype: what `check_gradient` explains, for all.

    Both are local parts. What is no plain tensor has no memory of its own to read.
    """
    return (
        set(map(type, grads)) <= {Tensor, Parameter}
        and set(map(_layout, grads)) <= {torch.strided}
        and set(map(_dtype, grads)) <= {dtype, torch.float32}
        and list(map(_shape, grads)) == list(map(_shape, params))
        and list(map(_device, grads)) == list(map(_device, params))
        and _all_in_memory(grads)
    )


def _all_in_memory(grads: Sequence[Tensor]) -> bool:
    if any(map(Tensor.storage_offset, grads)) or not all(map(Tensor.is_contiguous, grads)):
        return all(map(in_memory, grads))
    return all(map(ge, map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, grads)), map(_nbytes, grads)))


def in_memory(tensor: Tensor) -> bool:
    """Whether its last element lies inside its storage: it was not freed or shrunk."""
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or (last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def check_gradient(entry: Entry, grad: Tensor) -> None:
    """Raise, naming the parameter, for a gradient, or this rank's part of it, that the step cannot read."""
    if grad.layout != torch.strided:
        raise TypeError(
            f"param '{entry.name}': its gradient is sparse ({grad.layout}); use a dense one (Embedding(sparse=False))"
        )
    if grad.dtype not in (entry.param.dtype, torch.float32):
        wanted = dict.fromkeys((dtype_of(entry.param), "float32"))
        raise TypeError(
            f"param '{entry.name}': it is {dtype_of(entry.param)} and its gradient {dtype_of(grad)}; use "
            f"{' or '.join(wanted)} for the gradient (param.grad_dtype, or cast it before the step)"
        )
    if type(grad) not in (Tensor, Parameter):
        raise TypeError(f"param '{entry.name}': its gradient is a {type(grad).__name__}; use a plain tensor")
    param = local(entry.param)
    if not accept([param], [grad], param.dtype):
        raise ValueError(
            f"param '{entry.name}': its gradient has shape {tuple(grad.shape)} on {grad.device} and "
            f"{grad.untyped_storage().nbytes()} bytes of memory, the parameter shape {tuple(param.shape)} on "
            f"{param.device}; call zero_grad() after changing p.data"
        )
