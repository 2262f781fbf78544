"""torch.distributed.checkpoint: saved on N ranks, loaded on M, by every route: the run goes on bit for bit."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import BARE, assert_same_bits, numbers
from ranks import launch, perform, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import collage
from collage.strategies import STRATEGIES

FEW = ("collage-exact", "collage-8bit", "muon:collage-plus-sr")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
SHAPES = {"first": (3, 1536), "rows": (33, 160), "bias": (7,)}


def made(strategy: str, seed: int = 0, sharded: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model, sharded by FSDP2 if there are several ranks, and its optimizer: AdamW, or by "muon:" before its strategy
    Muon."""
    from torch.distributed.fsdp import fully_shard

    kind, _, strategy = strategy.rpartition(":")
    g = torch.Generator().manual_seed(seed)
    model = nn.Module()
    for name, shape in SHAPES.items():
        tensor = torch.randn(shape, generator=g).to(STRATEGIES[strategy].dtype)
        model.register_parameter(name, nn.Parameter(tensor))
    if sharded and dist.get_world_size() > 1:
        fully_shard(model)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "strategy": strategy}
    if kind == "muon":
        return model, collage.Muon(model.named_parameters(), adjust_lr_fn="match_rms_adamw", **settings)
    return model, collage.AdamW(model.named_parameters(), **settings)


def train(model: nn.Module, opt: torch.optim.Optimizer, start: int, stop: int) -> None:
    """The same gradients on any number of ranks."""
    for step in range(start, stop):
        g = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=g).to(p.dtype)
            p.grad = placed_as(p, grad)
        opt.step()
    opt.zero_grad()


def placed_as(p: nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(p, "placements"):
        return tensor
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def planes(model: nn.Module, opt: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and states, whole."""
    found = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name} {key}": whole(value).clone() for key, value in opt.state[p].items()}
    return found


def named(strategies: str):
    return BARE if strategies == "every" else strategies.split()


def save(folder: str, strategies: str) -> None:
    for strategy in named(strategies):
        model, opt = made(strategy)
        train(model, opt, 0, 3)
        at = Path(folder) / strategy
        at.mkdir(exist_ok=True)
        dcp.save(
            {"model": get_model_state_dict(model), "opt": get_optimizer_state_dict(model, opt)},
            checkpoint_id=at / "parts",
        )
        weights, state = get_state_dict(model, opt, options=FLAT)
        dcp.save({"model": weights, "opt": state}, checkpoint_id=at / "flat")
        dcp.save({"model": model.state_dict(), "opt": opt.state_dict()}, checkpoint_id=at / "raw")
        together = get_state_dict(model, opt, options=FULL)
        if dist.get_rank() == 0:
            torch.save(together, at / "full.pt")
        train(model, opt, 3, 6)
        wanted = planes(model, opt)
        if dist.get_rank() == 0:
            torch.save(wanted, at / "wanted.pt")


def through_parts(model, opt, at: Path) -> None:
    state = {"model": get_model_state_dict(model), "opt": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=at / "parts")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, opt, state["opt"])


def optimizer_first(model, opt, at: Path) -> None:
    state = {"model": get_model_state_dict(model), "opt": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=at / "parts")
    set_optimizer_state_dict(model, opt, state["opt"])
    set_model_state_dict(model, state["model"])


def through_flat(model, opt, at: Path) -> None:
    weights, state = get_state_dict(model, opt, options=FLAT)
    loaded = {"model": weights, "opt": state}
    dcp.load(loaded, checkpoint_id=at / "flat")
    set_state_dict(model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"], options=FLAT)


def through_raw(model, opt, at: Path) -> None:
    """Into the tensors of an optimizer that has stepped elsewhere."""
    train(model, opt, 90, 92)
    state = {"model": model.state_dict(), "opt": opt.state_dict()}
    dcp.load(state, checkpoint_id=at / "raw")
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])


def through_full(model, opt, at: Path) -> None:
    weights, state = torch.load(at / "full.pt", weights_only=True)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state, options=FULL)


def from_the_first(model, opt, at: Path) -> None:
    """One by one: `set_state_dict` takes an empty dictionary of weights for none to be loaded, and its ranks part."""
    weights, state = torch.load(at / "full.pt", weights_only=True) if dist.get_rank() == 0 else ({}, {})
    set_model_state_dict(model, weights, options=FROM_FIRST)
    set_optimizer_state_dict(model, opt, state, options=FROM_FIRST)


ROUTES = (through_parts, optimizer_first, through_flat, through_raw, through_full, from_the_first)


def load(folder: str, strategies: str, routes: str) -> None:
    for strategy, route in itertools.product(named(strategies), ROUTES[: int(routes)]):
        at = Path(folder) / strategy
        model, opt = made(strategy, seed=1)
        route(model, opt, at)
        train(model, opt, 3, 6)
        got, want = planes(model, opt), torch.load(at / "wanted.pt", weights_only=True)
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert_same_bits(f"{strategy} {route.__name__} {key}", got[key], tensor)


def between(folder: Path, strategies: str, saving: int, loading: dict[int, int]) -> None:
    """loading: how many ranks -> how many of the routes they try."""
    launch(__file__, saving, "save", str(folder), strategies, seconds=600)
    for world, routes in loading.items():
        launch(__file__, world, "load", str(folder), strategies, str(routes), seconds=600)


@pytest.mark.parametrize("rule", ["AdamW", "Adam", "SGD", "Lion", "Muon"])
@pytest.mark.parametrize("strategy", BARE)
def test_the_step_that_makes_states_to_load_into_changes_no_weight(strategy, rule):
    """torch makes one with gradients of 0 at lr 0. A weight of -0 may become +0."""
    dtype = STRATEGIES[strategy].dtype
    regimes = ["normal", "subnormal", "tiny", "zeros"]
    if dtype != torch.float16 and rule != "Adam":  # whose decay is a gradient, and the square of this one overflows
        regimes.append("huge")
    drawn = [numbers(regime, 5120, 0).view(32, 160).to(dtype) for regime in regimes]
    model = nn.ParameterList(map(nn.Parameter, drawn))
    before = [p.detach() + 0.0 for p in model]
    opt = getattr(collage, rule)(model.named_parameters(), weight_decay=0.1, strategy=strategy)
    get_optimizer_state_dict(model, opt)
    full = collage.high_precision_state_dict(model, opt)
    for k, (p, want) in enumerate(zip(model, before, strict=True)):
        assert opt.state[p]["step"] == 1
        assert_same_bits(f"{k}", p.detach() + 0.0, want)
        assert_same_bits(f"{k} in full precision", full[f"{k}"] + 0.0, want.float())


def test_remainders_are_bytes_in_the_same_memory_and_words_still_load():
    weights = [nn.Parameter(tensor.bfloat16()) for tensor in (torch.randn(6, 4).t(), torch.randn(5), torch.tensor(1.0))]
    opts = [collage.AdamW(weights, strategy="collage-exact") for _ in range(3)]
    for p in weights:
        p.grad = torch.ones_like(p)
    opts[0].step()
    saved = opts[0].state_dict()
    for k, p in enumerate(weights):
        own, stored = opts[0].state[p]["param_lo"], saved["state"][k]["param_lo"]
        assert (stored.dtype, stored.shape, stored.data_ptr()) == (torch.int8, (*p.shape, 2), own.data_ptr())
    words = {k: {**own, "param_lo": opts[0].state[weights[k]]["param_lo"]} for k, own in saved["state"].items()}
    for opt, state in zip(opts[1:], (saved, {**saved, "state": words}), strict=True):
        opt.load_state_dict(state)
        for p in weights:
            assert_same_bits("param_lo", opt.state[p]["param_lo"], opts[0].state[p]["param_lo"])
            assert opt.state[p]["param_lo"].stride() == p.stride()


def test_a_run_goes_on_on_another_number_of_ranks(tmp_path):
    between(tmp_path, " ".join(FEW), 2, {1: len(ROUTES), 3: 1})


@pytest.mark.slow
@pytest.mark.parametrize(("saving", "loading"), [(2, (1, 2, 3, 4)), (1, (1, 2)), (3, (2,)), (4, (2,))])
def test_a_run_goes_on_under_every_strategy(saving, loading, tmp_path):
    between(tmp_path, "every", saving, dict.fromkeys(loading, len(ROUTES)))


if __name__ == "__main__":
    perform(globals())
