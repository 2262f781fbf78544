"""`collage.advise`: which precision strategy to take for a model and the settings of its training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from collage.advice import bandwidth as measuring
from collage.advice import weights
from collage.advice.counting import one_thread
from collage.advice.memory import amount
from collage.advice.rehearsal import LONGEST, Rehearsed, Settings, rehearse
from collage.advice.rows import GB, Machine, row
from collage.advice.weights import Weights
from collage.advised.advice import Advice
from collage.advised.choosing import chosen
from collage.advised.tuned import Tuned
from collage.numerals import listed
from collage.strategies import UNCONVERTED, Strategy, require_unconverted


def advise(
    model: nn.Module | Mapping[str, Tensor] | Weights,
    lr: float,
    *,
    final_lr: float | None = None,
    weight_decay: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    steps: int = LONGEST,
    memory: float | str | None = None,
    ranks: int = 1,
    tuned_under: str | Strategy | None = None,
    arrived: float | None = None,
    bandwidth: float | None = None,
    strategies: Iterable[str | Strategy] = UNCONVERTED,
) -> Advice:
    """Which precision strategy to take under AdamW, and why: measured on the model's own weights, without training.

    A sample of the weights is stepped by the real optimizer under every strategy, on made-up gradients, and compared
    with float32 (the *rehearsal*). Shapes give bytes; a second's measurement, or `bandwidth`, gives time.

    Args:
        model: with its weights; or a dict of tensors by name.
        lr: the learning rate, its peak.
        final_lr: what it falls to; by default a tenth of lr. A schedule that ends lower loses more in the end.
        weight_decay, betas: as given to AdamW.
        steps: of the run; the rehearsal makes the first 1,000 of them.
        memory: of a rank, in bytes or as "24GB", "22.5GiB": weights, gradients and state have to fit. Activations come
            on top: `collage plan` predicts them.
        ranks: that FSDP2 shards over.
        tuned_under: the strategy under which lr was found; the advice then says what to start from instead.
        arrived: the share of its updates that arrived there, a monitor's `edq_ratio`; by default that of the rehearsal.
        bandwidth: GB per second of the memory; by default measured.
        strategies: to choose from.

    Raises:
        ValueError: a senseless setting, an unknown strategy, a model without weights or on the meta device; named.
        TypeError: a model that is neither a module nor a dict.

    >>> import torch
    >>> advice = advise(torch.nn.Linear(64, 64), lr=1e-5, steps=50, strategies=("bf16", "collage-plus"), bandwidth=20)
    >>> advice.strategy, [row["verdict"] for row in advice.rows]
    ('collage-plus', ['loses', 'safe'])
    """
    settings = _settings(lr, final_lr, weight_decay, betas, steps)
    machine = _machine(memory, ranks, bandwidth)
    chosen_from = (strategies,) if isinstance(strategies, str | Strategy) else tuple(strategies)
    if not chosen_from:
        raise ValueError("strategies: name at least one to choose from")
    names = {str(known): known for known in map(Strategy.parse, chosen_from)}
    lossy = None if tuned_under is None else Strategy.parse(tuned_under)
    require_unconverted("strategies", names.values())
    require_unconverted("tuned_under", [] if lossy is None else [lossy])
    _require_share(arrived, lossy)
    with one_thread(), torch.inference_mode(False), torch.device("cpu"):  # whatever the caller has set
        looked = weights.of(model)
        tried = {**names, **({str(lossy): lossy} if lossy and arrived is None else {})}
        seen = dict(zip(tried, rehearse(looked.samples(), list(tried.values()), settings), strict=True))
        rows = [row(name, strategy, looked, seen[name], settings, machine) for name, strategy in names.items()]
    tuned = None if lossy is None else _tuned(str(lossy), lr, arrived, seen)
    strategy, why = chosen(rows)
    notes = _notes(looked, settings) + _held(names.get(strategy or ""), looked)
    return Advice(strategy, why, rows, notes, tuned)


def _settings(
    lr: float, final_lr: float | None, weight_decay: float, betas: tuple[float, float], steps: int
) -> Settings:
    if not (_is_number(lr) and lr > 0):
        raise ValueError(f"lr: must be a positive number, got {lr!r}")
    final_lr = lr / 10 if final_lr is None else final_lr
    for name, number in (("final_lr", final_lr), ("weight_decay", weight_decay)):
        if not (_is_number(number) and number >= 0):
            raise ValueError(f"{name}: must be zero or positive, got {number!r}")
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas: needs two numbers in [0, 1), got {betas}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: needs an integer >= 1, got {steps!r}")
    return Settings(lr=lr, final_lr=final_lr, weight_decay=weight_decay, betas=betas, steps=steps)


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)


def _machine(memory: float | str | None, ranks: int, bandwidth: float | None) -> Machine:
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks: needs an integer >= 1, got {ranks!r}")
    if bandwidth is not None and not (_is_number(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth: must be a positive number of GB per second, got {bandwidth!r}")
    size = None if memory is None else amount(memory)
    return Machine(memory=size, ranks=ranks, bandwidth=bandwidth * GB if bandwidth else measuring.measured())


def _require_share(arrived: float | None, lossy: Strategy | None) -> None:
    if arrived is not None and lossy is None:
        raise ValueError("arrived: is of the strategy that lr was tuned under; give tuned_under, too")
    if arrived is not None and not (_is_number(arrived) and 0 < arrived <= 2):
        raise ValueError(f"arrived: needs a share above 0, about 1 at most, as a monitor's edq_ratio; got {arrived!r}")


def _tuned(under: str, lr: float, arrived: float | None, seen: Mapping[str, Rehearsed]) -> Tuned:
    if arrived is not None:
        return Tuned(under, lr, arrived, "as that run reports")
    share = seen[under].main.arrived
    if not math.isfinite(share):
        raise ValueError(f"tuned_under: float32 itself does not move these weights at lr {lr:g}; give arrived")
    return Tuned(under, lr, max(share, 1e-3), "as rehearsed")


def _held(strategy: Strategy | None, looked: Weights) -> list[str]:
    """What has to be done to weights before they can be held so."""
    if strategy is None or looked.dtypes <= {strategy.dtype}:
        return []
    cast = {torch.bfloat16: "collage.to_bf16(model)", torch.float16: "collage.to_fp16(model)"}
    now = listed(sorted(str(dtype).removeprefix("torch.") for dtype in looked.dtypes))
    how = f"call {cast.get(strategy.dtype, 'model.float()')} first"
    if looked.dtypes == {torch.float32}:
        how = "give the optimizer cast=True"
    return [f"These weights are {now}; {strategy} holds {str(strategy.dtype).removeprefix('torch.')}: {how}."]


def _notes(looked: Weights, settings: Settings) -> list[str]:
    notes = [
        f"Rehearsed {settings.rehearsed:,} steps of AdamW on a sample of these {looked.count:,} weights, on made-up "
        "gradients that fall. A step's time is its bytes over the memory's bandwidth; activations are not in GB."
    ]
    if settings.steps > settings.rehearsed:
        longer = settings.steps / settings.rehearsed
        notes.append(f"The run is {longer:.3g} times as long: what sticks slowly may show later.")
    return notes
