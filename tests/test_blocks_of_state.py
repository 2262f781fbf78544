"""State that is not shaped like its parameter, codes with scales: saved, moved, sharded and resumed bit for bit."""

import copy
import io
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import assert_same_bits, assert_same_planes, planes_of
from ranks import launch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import collage
from collage.sharding import as_bytes, from_bytes

STRATEGY = "collage-8bit"
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")


def model(columns: int = 160) -> nn.Module:
    """Blocks of 128 and a short one; 33 rows, which two ranks share unevenly; and small parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(columns, 33), nn.ReLU(), nn.Linear(33, 7)).bfloat16()


def made_for(made: nn.Module, strategy: str = STRATEGY) -> collage.AdamW:
    return collage.AdamW(made.named_parameters(), lr=1e-2, weight_decay=0.1, strategy=strategy)


def train(made: nn.Module, opt: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Every rank sees the same batches, so that gradients averaged over ranks are those of one."""
    for step in range(start, stop):
        x = torch.randn(8, made[0].in_features, generator=torch.Generator().manual_seed(step)).bfloat16()
        made(x).square().mean().backward()
        opt.step()
        opt.zero_grad()


def trained(steps: int = 3) -> tuple[nn.Module, collage.AdamW]:
    made = model()
    opt = made_for(made)
    train(made, opt, 0, steps)
    return made, opt


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_codes_have_scales_of_their_own_shape_and_small_parameters_have_none():
    made, opt = trained()
    state = opt.state[made[0].weight]
    assert {key: (state[key].dtype, tuple(state[key].shape)) for key in state if key != "step"} == {
        "param_lo": (torch.int8, (33, 160)),
        "exp_avg": (torch.int8, (33, 160)),
        "exp_avg_scale": (torch.uint8, (33, 2)),
        "exp_avg_sq": (torch.uint8, (33, 160)),
        "exp_avg_sq_scale": (torch.uint8, (33, 2)),
    }
    for small in (made[0].bias, made[2].weight, made[2].bias):
        kinds = {key: value.dtype for key, value in opt.state[small].items() if key != "step"}
        assert kinds == {"param_lo": torch.int8} | dict.fromkeys(
            ("exp_avg", "exp_avg_sq", "exp_avg_sq_lo"), torch.bfloat16
        )
    assert "keep bf16:sr, bf16x2:sr; so do 3 of its 4" in repr(opt)


@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "pickle"])
def test_a_run_goes_on_bit_for_bit(way):
    made, opt = trained()
    if way in ("state_dict", "file"):
        again = copy.deepcopy(made)
        other = made_for(again)
        state = opt.state_dict()
        other.load_state_dict(through_file(state) if way == "file" else copy.deepcopy(state))
    elif way == "deepcopy":
        again, other = copy.deepcopy((made, opt))
    else:
        file = io.BytesIO()
        torch.save((made, opt), file)
        file.seek(0)
        again, other = torch.load(file, weights_only=False)
    for pair in ((made, opt), (again, other)):
        train(*pair, 3, 6)
    assert_same_planes(planes_of(other), planes_of(opt))


def test_a_state_of_torch_is_split_into_codes_and_scales():
    made = model()
    theirs = torch.optim.AdamW(made.named_parameters(), lr=1e-2)
    train(made, theirs, 0, 3)
    opt = made_for(made)
    opt.load_state_dict(theirs.state_dict())
    for name, p in made.named_parameters():
        want, state = theirs.state[p], opt.state[p]
        parameter = next(own for own in opt.parameters() if own.name == name)
        for slot, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
            planes = opt.planes(parameter)[slot]
            fmt = collage.formats.format_of(opt.strategy_of(parameter).formats()[slot])
            got = fmt.value(planes)
            # Of the largest code a step is 1/16; what lies far below the largest of its block is coarser.
            assert (got - want[key].float()).abs().max() <= want[key].float().abs().max() / 16, (name, key)
        assert int(state["step"]) == 3


def test_a_state_with_a_scale_of_another_shape_is_refused_by_name():
    _, opt = trained()
    state = copy.deepcopy(opt.state_dict())
    state["state"][0]["exp_avg_scale"] = torch.zeros(33, 3, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=r"'0.weight': exp_avg_scale has shape \(33, 3\), not the parameter's \(33, 2\)"
    ):
        opt.load_state_dict(state)
    state["state"][0]["exp_avg_scale"] = torch.zeros(33, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'0.weight': strategy 'collage-8bit' keeps .*exp_avg_scale \(uint8\)"):
        opt.load_state_dict(state)


def whole(tensor):
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return from_bytes(as_bytes(tensor).full_tensor()) if tensor.dtype == torch.int16 else tensor.full_tensor()


def assert_same_as_alone(ours: nn.Module, opt, alone: nn.Module, other) -> None:
    for (name, p), q in zip(ours.named_parameters(), alone.parameters(), strict=True):
        assert_same_bits(name, whole(p.detach()), q.detach())
        for key, value in other.state[q].items():
            assert_same_bits(f"{name} {key}", whole(opt.state[p][key]), value)


def fsdp(mesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    made = model()
    for module in (made[0], made):
        fully_shard(module, mesh=mesh)
    return made


def resumed_from_shards(mesh, folder: str, strategy: str) -> None:
    """DCP, and torch's own dictionaries, whole and in shards: what goes on has the bits of one process."""
    alone = model()
    other = made_for(alone, strategy)
    train(alone, other, 0, 6)
    ours = fsdp(mesh)
    opt = made_for(ours, strategy)
    train(ours, opt, 0, 3)
    weights = {key: value.clone() for key, value in ours.state_dict().items()}
    for key in SCALES if strategy == STRATEGY else ():
        assert opt.state[ours[0].weight][key].placements == ours[0].weight.placements
        assert tuple(opt.state[ours[0].weight][key].shape) == (33, 2)
    for full in (False, True):
        options = StateDictOptions(full_state_dict=full, cpu_offload=full)
        state = copy.deepcopy(get_optimizer_state_dict(ours, opt, options=options))
        if full:  # which the first rank alone has
            states = [state]
            dist.broadcast_object_list(states)
            state = states[0]
        else:
            dcp.save({"opt": state}, checkpoint_id=folder)
        again = fsdp(mesh)
        again.load_state_dict(weights)
        resumed = made_for(again, strategy)
        if not full:
            empty = get_optimizer_state_dict(again, resumed, options=options)
            dcp.load({"opt": empty}, checkpoint_id=folder)
            state = empty
        set_optimizer_state_dict(again, resumed, state, options=StateDictOptions(full_state_dict=full))
        train(again, resumed, 3, 6)
        assert_same_as_alone(again, resumed, alone, other)
        if full:  # goes on in one process, too
            unsharded = model()
            unsharded.load_state_dict({key: whole(value) for key, value in weights.items()})
            single = made_for(unsharded, strategy)
            single.load_state_dict(by_position(state, unsharded))
            train(unsharded, single, 3, 6)
            assert_same_as_alone(unsharded, single, alone, other)


def by_position(state, made: nn.Module):
    """torch's dictionary of an optimizer, keyed by names, as one of positions."""
    at = {name: k for k, (name, _) in enumerate(made.named_parameters())}
    groups = [{**group, "params": [at[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {at[name]: own for name, own in state["state"].items()}, "param_groups": groups}


def along_rows(mesh, _: str, __: str) -> None:
    """Shards of whole blocks have the bits of the whole; those that cut one are refused on every rank."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    for shape, dim, fits in [
        ((40, 256), 1, True), ((40, 200), 1, False), ((40, 64, 4), 1, True), ((40, 8, 64), 2, False),
        ((40, 256), 0, True),
    ]:  # fmt: skip
        w, g = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
        p = nn.Parameter(distribute_tensor(w.clone(), mesh, [Shard(dim)]))
        if not fits:
            with pytest.raises(ValueError, match=rf"'w': it is sharded along dimension {dim}, .*every 128 neighbours"):
                made_for(nn.ParameterDict({"w": p}))
            made_for(nn.ParameterDict({"w": p}), "collage-exact-lean")
            continue
        q = nn.Parameter(w.clone())
        for x, grad in ((p, distribute_tensor(g, mesh, [Shard(dim)])), (q, g)):
            x.grad = grad
        ours, alone = nn.ParameterDict({"w": p}), nn.ParameterDict({"w": q})
        opt, other = made_for(ours), made_for(alone)
        for _step in range(3):
            opt.step()
            other.step()
        opt.load_state_dict(copy.deepcopy(other.state_dict()))  # whole planes, brought to their parameter's placement
        for optimizer in (opt, other):
            optimizer.step()
        assert_same_as_alone(ours, opt, alone, other)


@pytest.mark.parametrize(
    ("task", "strategy"),
    [("resumed_from_shards", STRATEGY), ("resumed_from_shards", "collage-exact"), ("along_rows", "")],
)
def test_two_processes(task, strategy, tmp_path):
    launch(__file__, 2, task, str(tmp_path), strategy)


if __name__ == "__main__":
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    globals()[sys.argv[1]](init_device_mesh("cpu", (2,)), *sys.argv[2:])
    dist.destroy_process_group()
