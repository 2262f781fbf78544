"""What torch.compile and CUDA graphs ask of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from collage.optimizers import edits
from collage.optimizers.parameters import Group
from collage.optimizers.plan import KINDS, OWN, Columns, chosen
from collage.rng import signed
from collage.rules import Rule
from collage.sharding import any_dtensor, local_gradients


def numbers(settings: Sequence[float | Tensor]) -> Tensor:
    """Settings as a float64 tensor on the CPU.

    In a graph they are added to a constant, which torch.compile leaves open for the values of later steps; it would
    compile anew for each value of a tensor made of them.
    """
    if torch.compiler.is_compiling():
        return torch.stack([torch.zeros((), dtype=torch.float64, device="cpu") + x for x in settings])
    return torch.tensor(list(map(float, settings)), dtype=torch.float64, device="cpu")


UNCOMPILED = {
    "GradScaler": "a compiled step takes no grad_scale; call scaler.step(opt) uncompiled",
    "monitor": "it measures in Python, outside a compiled step; call opt.step() uncompiled",
    "skip_nonfinite": "it looks at gradients outside a compiled step; call opt.step() uncompiled",
    "release_gradients": "parameters step in backward; call opt.step() uncompiled",
}


def require_compilable(planes: Sequence[Tensor], asked: Mapping[str, bool]) -> None:
    """Raise RuntimeError for a step that torch.compile would get wrong. asked: of UNCOMPILED, what is."""
    for name, reason in UNCOMPILED.items():
        if asked[name]:
            raise RuntimeError(f"{name}: {reason}")
    if any_dtensor(planes):
        raise RuntimeError("params: a compiled step takes no DTensors; call opt.step() uncompiled")
    storages = [plane.untyped_storage().data_ptr() for plane in planes if plane.numel()]
    if len(set(storages)) < len(storages):
        raise RuntimeError(
            "params: some are views of one buffer, which torch.compile is known to mix up; call opt.step() "
            "uncompiled, or give each parameter memory of its own"
        )


def require_capturable(groups: Sequence[Group]) -> None:
    """Raise RuntimeError where a graph is being captured that would repeat one step number for ever."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if capturing and not all(group["capturable"] for group in groups):
        raise RuntimeError("capturable: a step in a CUDA graph needs AdamW(..., capturable=True)")


class Traced(torch.optim.Optimizer):
    """The step as torch.compile sees it. All that it forces on a method is here."""

    backend: str
    monitors: list[Any]
    in_backward: Any = None  # who has gradients used as they arrive; `finish` uses those that are left
    _fresh: list[Tensor]

    def rule_of(self, group: Group) -> Rule:
        """The rule that a group's settings ask for."""
        raise NotImplementedError

    def _look(self, group: Group, first: int, kind: int, params: list[Tensor], grads: list[Tensor]) -> Columns:
        raise NotImplementedError

    def _traced(self, closure: Callable[[], Any] | None) -> Any:
        """The step as torch.compile traces it: two operators per group and kind of parameters."""
        scaled = hasattr(self, "grad_scale") or hasattr(self, "found_inf")  # looked at here, so it is at every call
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for group in self.param_groups:
            for kind in KINDS:
                tensors: list[Tensor] = []
                grads: list[Tensor] = []
                steps: list[Tensor] = []
                keys: list[int] = []
                regions: list[int] = []
                seen: list[Tensor] = []
                names: list[str] = []
                strategy, rule = self._init_group(
                    group, first, kind, tensors, grads, steps, keys, regions, seen, names, scaled
                )
                if len(grads) > 0:
                    torch.ops.collage.adopt_(tensors, seen[0], names, rule, strategy, self.backend)
                    lr = group["lr"]
                    self._operator(
                        group,
                        tensors, grads, steps, torch.empty(0, 5, dtype=torch.float64, device="cpu"),
                        lr if isinstance(lr, Tensor) else numbers([lr])[0],
                        numbers(self.rule_of(group).hyper(group)), rule, strategy, self.backend, keys, regions,
                        signed(group["seed"]), group["maximize"], group["capturable"],
                    )  # fmt: skip
                    edits.advance(seen[0])
            first += len(group["params"])
        return loss

    def _operator(self, group: Group, *arguments: Any) -> None:
        """The step of a group's parameters as one operator."""
        torch.ops.collage.step_(*arguments)

    def _init_group(
        self,
        group: Group,
        first: int,
        kind: int,
        tensors: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        keys: list[int],
        regions: list[int],
        seen: list[Tensor],
        names: list[str],
        scaled: bool,
    ) -> tuple[str, str]:
        """Append what the operators need of a group's parameters. Raises before anything is changed.

        torch.compile knows this method's name: it runs it where it would trace another, and guards what it returned.
        """
        if not first and kind == OWN:  # the first call of a step
            self._fresh = []
        params, given = chosen(group)[kind]
        if not params:
            return "", ""
        own = local_gradients(params, given)
        columns = self._look(group, first, kind, params, own)
        require_compilable(
            [*columns.params, *columns.held],
            {
                "GradScaler": scaled,
                "monitor": len(self.monitors) > 0,
                "skip_nonfinite": group["skip_nonfinite"],
                "release_gradients": self.in_backward is not None,
            },
        )
        edits.traced(columns.thetas, columns.seen)
        tensors += columns.planes
        grads += own
        steps += columns.steps
        keys += map(signed, columns.keys)
        regions += columns.regions
        seen.append(columns.seen)
        names += columns.names
        return str(columns.strategy), columns.rule.name
