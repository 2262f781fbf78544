"""What a model and a state can become: any strategy of ours, or the state of another optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from collage.harness.convert.states import APEX, COLLAGE, TE, TORCH, prefix_of
from collage.optimizers.wrapping.loading import STEP
from collage.strategies import STRATEGIES, Strategy


class Target(NamedTuple):
    """What `--to` names: how numbers are kept, and whose state it is."""

    name: str
    strategy: Strategy
    dialect: str
    says: str = ""

    @property
    def is_ours(self) -> bool:
        return self.dialect == COLLAGE


FOREIGN = {
    target.name: target
    for target in (
        Target("torch", STRATEGIES["fp32"], TORCH, "a float32 model, and torch.optim's state in float32"),
        Target("torch-bf16", STRATEGIES["bf16"], TORCH, "a bfloat16 model, and torch.optim's state in bfloat16"),
        Target("te", Strategy("bf16+int16", "fp32", "fp32"), TE,
               "a bfloat16 model, and TransformerEngine's FusedAdam with store_param_remainders"),
        Target("apex", Strategy("bf16+fp32", "fp32", "fp32"), APEX,
               "a bfloat16 model, and Apex's DistributedFusedAdam, whose checkpoints hold float32 weights"),
    )
}  # fmt: skip
_KEYS = {TE: {"param_lo": "master_param", "param_master": "master_param"}, APEX: {"param_master": "param"}}
_FUSED = ("lr", "bias_correction", "betas", "eps", "weight_decay")  # what a group of Apex and TransformerEngine has
_NOT_OURS = ("foreach", "fused", "differentiable", "capturable", "bias_correction", "step")


def target_of(name: str) -> Target:
    """The target of that name. Raises ValueError listing the known ones."""
    if name in FOREIGN:
        return FOREIGN[name]
    try:
        strategy = Strategy.parse(name)
    except ValueError as error:
        raise ValueError(f"--to: {str(error).removeprefix('strategy: ')}; or {', '.join(FOREIGN)}") from None
    if strategy.beside is not strategy:
        raise ValueError(
            f"--to: '{strategy}' trains what collage.fp8.convert(model) makes of linear layers, which no file tells "
            "from others; call it on the model with its weights, and opt.load_state_dict(state, convert=True) after it"
        )
    return Target(str(strategy), strategy, COLLAGE)


def key_of(target: Target, key: str) -> str:
    """What the target's optimizer calls a key of ours."""
    return _KEYS.get(target.dialect, {}).get(key, key)


def rest_of(target: Target, state: Mapping[str, Any], wrapped: bool) -> dict[str, Any]:
    """What the target's optimizer keeps of a parameter besides numbers of each element: its counters."""
    kept = {key: x for key, x in state.items() if not prefix_of(key)}
    step = torch.as_tensor(kept.get("step", 0)).reshape(())
    if target.dialect in (TE, APEX):
        return {}
    if wrapped and target.is_ours:
        return {STEP: step.to(torch.int64), **kept}
    if wrapped:
        return {key: x for key, x in kept.items() if key != STEP}
    return {**kept, "step": step.to(torch.int64 if target.is_ours else torch.float32)}


class Kept(NamedTuple):
    """What a state keeps: of each element, and the largest counter; whether its optimizer is one that is wrapped."""

    slots: set[str]
    step: int
    wrapped: bool


def content(
    target: Target,
    groups: Sequence[Mapping[str, Any]],  # as they were saved
    names: Sequence[Sequence[str]],  # of each group's parameters
    strategies: Sequence[Strategy],  # that each group will have
    states: Mapping[Any, Any],
    kept: Kept,
) -> dict[str, Any]:
    """What torch.save is to write: the states under their ids, and groups with the settings that were saved."""
    made = [
        {**_group(target, group, strategy, kept), "params": list(group["params"]), "param_names": list(own)}
        for group, own, strategy in zip(groups, names, strategies, strict=True)
    ]
    return {"state": {**({"step": kept.step} if target.dialect == APEX else {}), **states}, "param_groups": made}


def _group(target: Target, group: Mapping[str, Any], strategy: Strategy, kept: Kept) -> dict[str, Any]:
    own = {key: value for key, value in group.items() if key not in ("params", "param_names", "strategy")}
    if target.is_ours:  # what is left out keeps the value of the optimizer that loads it
        return {**{k: x for k, x in own.items() if kept.wrapped or k not in _NOT_OURS}, "strategy": str(strategy)}
    if target.dialect == TORCH and kept.wrapped:
        return {key: value for key, value in own.items() if key not in ("seed", "skip_nonfinite")}
    if target.dialect == TORCH:
        return {key: own.get(key, value) for key, value in torch_defaults(own, kept.slots).items()}
    if kept.slots != {"param", "exp_avg", "exp_avg_sq"} or kept.wrapped:
        others = ", ".join(sorted(kept.slots - {"param"})) or "no moments (a model alone has no state to take)"
        raise ValueError(f"--to {target.name}: is Adam's, and this state keeps {others}")
    made = {"bias_correction": True, **{key: own[key] for key in _FUSED if key in own}}
    return {**made, "step": kept.step} if target.dialect == TE else made


def torch_defaults(group: Mapping[str, Any], slots: set[str]) -> dict[str, Any]:
    """The settings of torch's optimizer with these states. Raises ValueError where torch has none."""
    moments = slots - {"param"}
    if moments in ({"exp_avg", "exp_avg_sq"}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}):
        name = "AdamW" if group.get("decoupled_weight_decay", True) else "Adam"
    elif moments <= {"momentum_buffer"}:
        name = "Muon" if group.get("use_muon") or "ns_steps" in group else "SGD"
    else:
        kept = ", ".join(sorted(moments))
        raise ValueError(f"--to torch: torch has no one optimizer that keeps {kept}; choose a strategy")
    if not hasattr(torch.optim, name):
        raise ValueError(f"--to torch: torch {torch.__version__} has no torch.optim.{name}; update torch")
    dummy = torch.nn.Parameter(torch.zeros(1, 1))
    return dict(getattr(torch.optim, name)([dummy], lr=group.get("lr", 1e-3)).defaults)


def described() -> str:
    """What a target may be, a line for each kind."""
    lines = {
        "a strategy": "as `collage info` lists them, but for those of FP8 weights",
        **{name: target.says for name, target in FOREIGN.items()},
    }
    return "\n".join(f"  {name:<12}{says}" for name, says in lines.items())
