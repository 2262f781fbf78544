"""Which optimizer a run has. A recipe's settings are AdamW's: what they mean to others, and what a user may give."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from collage.optimizers.base import PrecisionOptimizer
from collage.optimizers.named import ADAMW, OURS, WRAP, Named, find, probe
from collage.strategies import Strategy

OPTIMIZERS = f"{', '.join(OURS)}, or {WRAP}package.module.Class, such as {WRAP}torch.optim.NAdam"
LR = (
    "peak learning rate; default: the recipe's, which is AdamW's, times what others usually take over AdamW's 1e-3: "
    "100 for sgd, 0.1 for lion, of wrapped ones their own default"
)
FLAGS = ("lr", "betas", "eps", "weight_decay")  # settings of an optimizer with options of their own
_RUNS = ("seed", "strategy")  # and those of the run


class Usual(NamedTuple):
    """What people give an optimizer where they give AdamW lr 1e-3. decays: at AdamW's rate, lr times weight decay."""

    lr: float
    decays: bool = False
    others: Mapping[str, Any] = {}


_MOMENTUM = Usual(lr=0.1, decays=True, others={"momentum": 0.9})
USUAL = {
    "lion": Usual(lr=1e-4, decays=True),
    "muon": Usual(lr=1e-3, decays=True, others={"adjust_lr_fn": "match_rms_adamw"}),
    "sgd": _MOMENTUM,
    f"{WRAP}torch.optim.SGD": _MOMENTUM,
}


def chosen(name: str, recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's settings in a run: of FLAGS, None for those it has not, and "optimizer_args".

    lr is the recipe's, times what is usual with this optimizer over AdamW's 1e-3. The recipe's other values are taken
    where the optimizer's own default is AdamW's; others keep their own.

    Args:
        name: of the optimizer.
        recipe: AdamW's settings, those of FLAGS.
        given: what the user gave of FLAGS and of "optimizer_args"; it wins.

    Raises:
        ValueError: an unknown optimizer, or a setting that it does not have; named, with the fix.
    """
    named = find(name)
    usual = USUAL.get(name) or Usual(_own_lr(named))
    scale = usual.lr / ADAMW["lr"]
    settings = {key: recipe[key] if named.defaults.get(key) == ADAMW[key] else _own(named, key) for key in FLAGS}
    settings["lr"] = _shown(recipe["lr"] * scale)
    if usual.decays:
        settings["weight_decay"] = _shown(recipe["weight_decay"] / scale)
    for key in FLAGS:
        if key in given:
            _require_flag(named, key)
            settings[key] = given[key]
    others = {**usual.others, **_of_its_adamw(named, recipe), **parsed(named, given.get("optimizer_args", ()))}
    return {**settings, "optimizer_args": tuple(f"{key}={value!r}" for key, value in sorted(others.items()))}


def _shown(x: float) -> float:
    """1e-6, not the 1.0000000000000002e-06 that comes of 1e-5 times 0.1."""
    return float(f"{x:.12g}")


def _of_its_adamw(named: Named, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Muon's settings of AdamW, which takes what is no hidden matrix."""
    found = {key: recipe[key] for key in ("betas", "eps") if recipe[key] != ADAMW[key]}
    return {"adamw": found} if found and "adamw" in named.defaults else {}


def _own_lr(named: Named) -> float:
    lr = named.defaults.get("lr")
    return float(lr) if isinstance(lr, int | float) else float(ADAMW["lr"])


def _own(named: Named, key: str) -> Any:
    """The optimizer's default of one of FLAGS, if the option can say it."""
    return named.defaults[key] if _fits(named, key) else None


def _fits(named: Named, key: str) -> bool:
    """Whether the option can say what the optimizer takes under this name: a number, or for betas two."""
    return key == "lr" or named.takes(key, ADAMW[key])


def _require_flag(named: Named, key: str) -> None:
    if key not in named.defaults:
        raise ValueError(f"{key}: {named.title} has none; leave it out")
    if not _fits(named, key):
        own = named.defaults[key]
        raise ValueError(f"{key}: {named.title}'s is of another kind ({own!r}); give --optimizer-args '{key}={own!r}'")


def parsed(named: Named, arguments: Sequence[str]) -> dict[str, Any]:
    """{"momentum": 0.9} of ("momentum=0.9",). Raises ValueError for what is no setting of this optimizer."""
    found: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"optimizer_args: needs NAME=VALUE, as momentum=0.9, got {argument!r}")
        if key in found:
            raise ValueError(f"optimizer_args: {key} is given twice")
        if key in _RUNS or (key in FLAGS and _fits(named, key)):
            raise ValueError(f"optimizer_args: {key} is set by the run; give --{key.replace('_', '-')} instead")
        found[key] = _value(value)
    try:
        named.require_settings(found)
    except ValueError as error:
        raise ValueError(f"optimizer_args: {error}") from None
    return found


def _value(text: str) -> Any:
    """As Python writes it; true and false too; anything else is a string."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def made(run: Mapping[str, Any], params: Iterable[Any], **more: Any) -> PrecisionOptimizer:
    """The optimizer of a run (the fields of a RunConfig). Raises ValueError for what it refuses."""
    named = find(run["optimizer"])
    own = {key: run[key] for key in FLAGS if run[key] is not None}
    settings = {**own, **parsed(named, run["optimizer_args"]), "seed": run["seed"], **more}
    try:
        return named.make(params, run["strategy"], **settings)
    except Exception as error:  # other packages raise what they like
        raise ValueError(f"optimizer: {named.name}: {error}") from error


def require_makeable(run: Mapping[str, Any]) -> None:
    """Raise ValueError, before anything is built, for settings that a run's optimizer refuses."""
    model = probe(Strategy.parse(run["strategy"]))
    made(run, model.named_parameters(), backend="reference")
