"""State that is not shaped like its parameter, codes with scales: saved, moved, sharded and resumed bit for bit."""

import copy
import io

import pytest
import torch
from helpers import assert_same_planes, planes_of
from ranks import assert_same_as_alone, launch, perform
from torch import nn

import collage

STRATEGY = "collage-8bit"


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


def along_rows() -> None:
    """Shards of whole blocks have the bits of the whole; those that cut one are refused on every rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

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
        assert_same_as_alone(f"{shape}", ours, opt, alone, other)


def test_shards_along_rows():
    launch(__file__, 2, "along_rows")


if __name__ == "__main__":
    perform(globals())
