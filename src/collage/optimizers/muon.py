"""Muon, the optimizer: its arguments, and its step of two passes with an orthogonalisation between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from collage.backends import Batch
from collage.optimizers import edits, hidden, matrices, orthogonal
from collage.optimizers.base import PrecisionOptimizer
from collage.optimizers.orthogonal import Orthogonalisation
from collage.optimizers.parameters import Group
from collage.optimizers.plan import Columns
from collage.optimizers.settings import known_settings
from collage.rules import Rule
from collage.rules.adamw import ADAMW
from collage.rules.muon import MUON
from collage.saying import warn_once
from collage.strategies import Strategy


class Muon(PrecisionOptimizer):
    """Muon on low-precision weights without a float32 copy, and AdamW for what is no hidden matrix.

        b <- momentum b + (1 - momentum) g
        o <- orthogonalised(momentum b + (1 - momentum) g  with nesterov, else b)
        theta <- theta - lr (scale(shape) o + weight_decay theta)

    where theta and b are each held in the format that ``strategy`` gives to weights and to first moments. One matrix
    after another is orthogonalised, by Newton-Schulz steps, so no more than one has temporaries of its size. A sharded
    one (FSDP2, tensor parallelism) is gathered for it.

    Args:
        params: ``model.named_parameters()``: those with two dimensions, unless their name is that of an embedding or a
            head, are Muon's, and all others AdamW's; or groups with ``use_muon=True`` or ``False``.
        lr: learning rate, a float or a 0-d tensor.
        weight_decay: decoupled.
        momentum: decay rate of b, in [0, 1).
        nesterov: whether to look one step ahead.
        ns_coefficients, eps, ns_steps: of the Newton-Schulz steps: of x, x**3 and x**5; the least norm to divide by;
            and how many.
        adjust_lr_fn: scale of a matrix [A, B], as torch.optim.Muon names it: "original" (also None),
            sqrt(max(1, A / B)); or "match_rms_adamw", 0.2 sqrt(max(A, B)), with which lr and weight_decay are AdamW's.
        strategy, cast, maximize, seed, skip_nonfinite, capturable, backend: as `AdamW`'s.
        adamw: settings of the groups with ``use_muon=False``, where they are to be other than the above: betas
            (0.9, 0.999), eps (1e-8), and any that all groups have.
        split: rows of each block that is orthogonalised by itself, or a tuple of all of them, as torch.split takes
            them: ``head_dim`` for one block per head, ``(d, d, d)`` for a fused QKV weight [3 d, d].
        flatten: whether weights of more than two dimensions, as of convolutions, are seen as matrices [out, all else].
        ns_dtype: of the multiplications: "bfloat16", which gives torch.optim.Muon's bits, or "float32". None: bfloat16
            where the hardware multiplies it (GPUs, CPUs with AMX or AVX512-BF16), else float32, which is faster there.

    Raises:
        ValueError, TypeError: an argument out of range, a parameter of a wrong dtype or shape; named, with the fix.

    References:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, "Muon is Scalable for LLM
        Training", arXiv 2502.16982.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4)).bfloat16()
    >>> hidden, rest = [("1.weight", model[1].weight)], [("0.weight", model[0].weight), ("1.bias", model[1].bias)]
    >>> opt = Muon([{"params": hidden}, {"params": rest, "use_muon": False, "lr": 3e-4}], lr=0.02)
    >>> model(torch.arange(8)).square().sum().backward()
    >>> opt.step()
    >>> sorted(opt.state[model[1].weight]), sorted(opt.state[model[0].weight])
    (['momentum_buffer', 'param_lo', 'step'], ['exp_avg', 'exp_avg_sq', 'exp_avg_sq_lo', 'param_lo', 'step'])
    """

    foreign = (*PrecisionOptimizer.foreign, "amsgrad")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        strategy: str | Strategy = "collage-plus",
        *,
        adamw: Mapping[str, Any] | None = None,
        split: int | Sequence[int] = (),
        flatten: bool = False,
        ns_dtype: str | None = None,
        cast: bool = False,
        maximize: bool = False,
        seed: int = 0,
        skip_nonfinite: bool = False,
        capturable: bool = False,
        backend: str = "auto",
        **dropped: Any,
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
            "split": split, "flatten": flatten, "ns_dtype": ns_dtype, "betas": (0.9, 0.999), "strategy": strategy,
            "maximize": maximize, "seed": seed, "skip_nonfinite": skip_nonfinite, "capturable": capturable,
        }  # fmt: skip
        self._adamw = {"eps": 1e-8, **known_settings("adamw", adamw or {}, defaults)}
        super().__init__(params, defaults, backend, cast, dropped)

    def rule_of(self, group: Group) -> Rule:
        """Muon's, or AdamW's."""
        return MUON if group["use_muon"] else ADAMW

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one that does not say ``use_muon`` becomes two if it has hidden matrices and others."""
        groups = [param_group]
        if "use_muon" not in param_group:
            groups = hidden.parted(param_group, param_group.get("flatten", self.defaults["flatten"]))
        before = len(self.param_groups)
        try:
            for group in groups:
                super().add_param_group(group if group["use_muon"] else self._with_adamws(group))
        except BaseException:
            del self.param_groups[before:]
            raise

    def _with_adamws(self, group: Group) -> Group:
        if "lr" not in {**self._adamw, **group} and self.defaults["adjust_lr_fn"] != "match_rms_adamw":
            warn_once(
                f"lr: AdamW's groups take Muon's, {float(self.defaults['lr']):g}, which is scaled otherwise; say "
                "adamw={'lr': 3e-4}, or adjust_lr_fn='match_rms_adamw', with which both may have the same"
            )
        return {**self._adamw, **group}

    def _validate(self, group: Group) -> None:
        for name in ("use_muon", "nesterov", "flatten"):
            if not isinstance(group[name], bool):
                raise TypeError(f"{name}: needs True or False, got {group[name]!r}")
        super()._validate(group)
        if group["use_muon"]:
            found = orthogonal.checked(group)
            for parameter in self._those_of(group, group["params"]):
                hidden.require_blocks(parameter, found["split"])
            group.update(found)

    def _step(self, columns: Columns, batch: Batch) -> None:
        if columns.rule is not MUON:
            super()._step(columns, batch)
            return
        group = columns.group
        how = Orthogonalisation.of(group)
        matrices.carry_out(batch, columns.params, how, group["nesterov"], self.backend, group["capturable"])
        edits.advance(columns.seen)

    def _operator(self, group: Group, *arguments: Any) -> None:
        if group["use_muon"]:
            torch.ops.collage.muon_(*arguments, group["nesterov"], *Orthogonalisation.of(group))
        else:
            super()._operator(group, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adamw": self._adamw}
