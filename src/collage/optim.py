"""The torch.optim.Optimizer shell: groups, planes, step, state_dict. The numerics are below it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from collage import backends, constants, loading, state
from collage.backends import Update
from collage.monitor import Item, Monitor
from collage.rng import Stream, key_of
from collage.rules import Rule
from collage.rules.adamw import ADAMW
from collage.sharding import local, region
from collage.state import Entry, Group
from collage.strategies import STRATEGIES, Strategy

log = logging.getLogger("collage")


class PrecisionOptimizer(torch.optim.Optimizer):
    """What all optimizers here share. A subclass names its rule and its hyper-parameters."""

    rule: ClassVar[Rule]

    def __init__(self, params: Any, defaults: dict[str, Any], backend: str) -> None:
        self.backend = backend
        self.monitors: list[Monitor] = []
        self._backend = backends.choose(backend)
        super().__init__(params, defaults)
        self._require_low_precision()

    def _require_low_precision(self) -> None:
        entries = list(self.entries())
        full = [e for e in entries if self.strategy_of(e).dtype != Strategy.parse(e.group["strategy"]).dtype]
        if not full:
            return
        if len(full) == len(entries):
            raise ValueError(
                f"params: all {len(full)} parameters are float32, but strategy '{full[0].group['strategy']}' trains "
                "bfloat16 weights. Usually a framework upcast them (from_pretrained without dtype=, a prepared model). "
                "Cast them, p.data = p.data.bfloat16(), or use strategy='fp32'"
            )
        log.info("%d of %d parameters are float32 and are updated in float32", len(full), len(entries))

    def entries(self) -> Iterator[Entry]:
        """Every parameter, in order, with its name (or position) and group."""
        position = 0
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                name = group["param_names"][i] if "param_names" in group else None
                yield Entry(name or str(position), key_of(name or position), index, group, param)
                position += 1

    def strategy_of(self, entry: Entry) -> Strategy:
        """The group's strategy; float32 parameters are updated in float32. Raises TypeError for any other dtype."""
        strategy = Strategy.parse(entry.group["strategy"])
        if entry.param.dtype == strategy.dtype:
            return strategy
        if entry.param.dtype == torch.float32:
            return STRATEGIES["fp32"]
        wanted = str(strategy.dtype).removeprefix("torch.")
        raise TypeError(
            f"param '{entry.name}': strategy '{strategy}' needs {wanted}, got {state.dtype_of(entry.param)}; "
            f"cast it, p.data = p.data.to(torch.{wanted}), or choose a strategy for {state.dtype_of(entry.param)}"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may have a strategy of its own. Raises before anything is added."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["strategy"] = str(Strategy.parse(group["strategy"]))
            self._validate(group)
            for entry in self.entries():
                if entry.group is group:
                    self.strategy_of(entry)
        except BaseException:
            self.param_groups.pop()
            raise

    def _validate(self, group: Group) -> None:
        seed = group["seed"]
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed: needs an integer in [0, 2**64), got {seed!r}")

    def _fold(self, group: Group, step: int, dtype: torch.dtype, device: torch.device) -> Any:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError, ValueError: a gradient or a parameter that cannot be updated, before any is.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = [entry for entry in self.entries() if entry.param.grad is not None]
        items = self._items(entries)
        for monitor in self.monitors:
            monitor.before(items)
        for updates in _batches(items):
            self._backend.step(self.rule, updates)
        for entry in entries:
            self.state[entry.param]["step"] += 1
        for monitor in self.monitors:
            monitor.after(items)
        return loss

    def _items(self, entries: list[Entry]) -> list[Item]:
        """Check every gradient, then say what is to be done for each parameter."""
        strategies = [self.strategy_of(entry) for entry in entries]
        for entry in entries:
            state.check_gradient(entry)
        measured = any(monitor.due for monitor in self.monitors)
        folded: dict[tuple[Any, ...], Any] = {}
        items = []
        for entry, strategy in zip(entries, strategies, strict=True):
            planes = self.planes(entry, strategy)
            step = int(self.state[entry.param]["step"]) + 1
            fold = partial(self._fold_once, folded, entry, step)
            update = Update(
                strategy=strategy,
                slots=planes,
                grad=local(entry.param.grad),
                constants=fold(strategy.register),
                maximize=entry.group["maximize"],
                stream=Stream(entry.group["seed"], step, entry.key),
                region=region(entry.param),
                sums=torch.zeros(5, dtype=torch.float64) if measured else None,
            )
            items.append(Item(entry.name, entry.group_index, update, fold))
        return items

    def _fold_once(self, folded: dict[tuple[Any, ...], Any], entry: Entry, step: int, dtype: torch.dtype) -> Any:
        device = entry.param.device
        key = (entry.group_index, step, dtype, device)
        if key not in folded:
            folded[key] = self._fold(entry.group, step, dtype, device)
        return folded[key]

    def planes(self, entry: Entry, strategy: Strategy | None = None) -> tuple[Any, ...]:
        """The local planes of every slot of one parameter, theta first; created at first use."""
        strategy = strategy or self.strategy_of(entry)
        if not self.state[entry.param]:
            state.initialise(self.rule, strategy, entry.param, self.state[entry.param])
        return state.slots(self.rule, strategy, entry.param, self.state[entry.param])

    @torch.no_grad()
    def resync(self) -> None:
        """Take every weight as it is now: derive its other components (lo, master, compensation) from it.

        Call it after changing weights outside the optimizer: loading a model, swapping in an average, clamp_.
        """
        for entry in self.entries():
            if self.state[entry.param]:
                state.resync(self.rule, self.strategy_of(entry), entry.param, self.state[entry.param])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every plane byte for byte. Also takes the state of a torch.optim optimizer with the same moments.

        Raises:
            ValueError: a state of another strategy, of other shapes, or that does not belong to the weights the
                parameters have now (load the model first). Nothing is changed then.
        """
        adopted: dict[str, Any] = {}

        def adopt(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            adopted.update(loading.adopt(self.rule, self.param_groups, list(self.entries()), saved, self.strategy_of))
            return adopted

        hook = self.register_load_state_dict_pre_hook(adopt)  # runs last: what it returns is what is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for entry, saved_id in loading.paired(self.entries(), adopted):
            if saved_id in adopted["state"]:  # torch has cast the planes to the parameter's dtype: take the originals
                device = entry.param.device
                self.state[entry.param] = {
                    key: value.detach().to(device if key != "step" else "cpu", copy=True)
                    for key, value in adopted["state"][saved_id].items()
                }

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.monitors = []
        self._backend = backends.choose(self.backend)


class AdamW(PrecisionOptimizer):
    """AdamW on low-precision weights without a float32 copy: Collage (Yu et al. 2024), Algorithm 2.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g**2
        theta <- theta - lr (m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps) + weight_decay theta)

    where theta, m and v are each held in the format that ``strategy`` gives them.

    Args:
        params: ``model.named_parameters()`` (names make reports and errors readable), ``model.parameters()``, or
            groups, each of which may set any argument below but ``backend``. Bfloat16; float32 ones among them are
            updated in float32.
        lr: learning rate, a float or a 0-d tensor.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        strategy: a name in ``collage.STRATEGIES``, or a ``collage.Strategy``.
        maximize: ascend instead of descend.
        seed: of stochastic rounding.
        backend: "auto" or "reference".

    Raises:
        ValueError, TypeError: an argument out of range, a parameter of a wrong dtype; named, with the fix.

    >>> model = torch.nn.Linear(4, 2).bfloat16()
    >>> opt = AdamW(model.named_parameters(), lr=1e-3, strategy="collage-plus")
    >>> model(torch.ones(1, 4).bfloat16()).sum().backward()
    >>> opt.step()
    >>> sorted(opt.state[model.weight])
    ['exp_avg', 'exp_avg_sq', 'exp_avg_sq_lo', 'param_lo', 'step']
    """

    rule = ADAMW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        strategy: str | Strategy = "collage-plus",
        *,
        maximize: bool = False,
        seed: int = 0,
        backend: str = "auto",
        **dropped: Any,
    ) -> None:
        if dropped:
            known = ("amsgrad", "foreach", "fused", "differentiable", "capturable")
            hint = "drop it: the step is one pass of its own" if set(dropped) <= set(known) else "it is unknown"
            raise TypeError(f"AdamW: cannot take {', '.join(sorted(dropped))}; {hint}")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "strategy": strategy,
            "maximize": maximize, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults, backend)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        for key in ("lr", "eps", "weight_decay"):
            if isinstance(group[key], Tensor) and group[key].numel() != 1:
                raise ValueError(f"{key}: a tensor needs one element, got shape {tuple(group[key].shape)}")
            if not 0.0 <= float(group[key]) < math.inf:
                raise ValueError(f"{key}: needs a finite number >= 0, got {group[key]}")
        betas = tuple(group["betas"])
        if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
            raise ValueError(f"betas: needs two numbers in [0, 1), got {group['betas']}")

    def _fold(self, group: Group, step: int, dtype: torch.dtype, device: torch.device) -> constants.Constants:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        lr, eps, decay = (float(group[key]) for key in ("lr", "eps", "weight_decay"))
        return constants.fold(lr, (beta1, beta2), eps, decay, step, dtype, device)


def _batches(items: list[Item]) -> Iterator[list[Update]]:
    """All updates of one (group, device, gradient dtype) together."""
    batches: dict[tuple[Any, ...], list[Update]] = {}
    for item in items:
        key = (item.group_index, item.update.grad.device, item.update.grad.dtype)
        batches.setdefault(key, []).append(item.update)
    yield from batches.values()
