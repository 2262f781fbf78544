"""to_bf16 and to_fp16: what is cast, what stays, and what stays the same object."""

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits
from torch import nn

import collage


class Mixed(nn.Module):
    """One of every kind of parameter and buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight  # tied
        self.wide = nn.Parameter(torch.rand(3, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.rand(2, 3, dtype=torch.float16).T)
        self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)
        self.nothing = nn.Parameter(torch.zeros(3, 0))
        self.phase = nn.Parameter(torch.rand(3, dtype=torch.complex64))
        self.fp8 = nn.Parameter(torch.rand(3).to(torch.float8_e4m3fn), requires_grad=False)
        self.int8 = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("inv_freq", torch.rand(5))


CASTS = [(collage.to_bf16, torch.bfloat16), (collage.to_fp16, torch.float16)]


@pytest.mark.parametrize(("cast", "dtype"), CASTS)
def test_parameters_only_in_place(cast, dtype):
    model = Mixed()
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    model.one.weight.grad = torch.ones(4, 4)
    model.phase.grad = torch.ones(3, dtype=torch.complex64)
    assert cast(model) is model
    kept = {"phase", "fp8", "int8"}
    for name, p in model.named_parameters():
        same, value, trains = before[name]
        assert p is same
        assert p.requires_grad == trains
        assert p.dtype == (value.dtype if name in kept else dtype)
        assert p.stride() == value.stride()
        assert p.tolist() == value.to(p.dtype).tolist()
    assert model.two.weight is model.one.weight
    for name, b in model.named_buffers():
        assert b is buffers[name][0]
        assert_same_bits(name, b, buffers[name][1])
    assert model.one.weight.grad is None
    assert model.phase.grad is not None


def test_an_optimizer_that_holds_them_goes_on():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 4)).sum().backward()  # the graph's node of the old dtype is gone too
    collage.to_bf16(model)
    model(torch.ones(1, 4).bfloat16()).sum().backward()
    opt.step()
    assert model.weight.dtype == model.weight.grad.dtype == torch.bfloat16
    assert model.weight.tolist() == [[0.0] * 4] * 2


def test_views_of_one_memory_stay_so():
    flat = torch.arange(12.0) / 7
    model = nn.ParameterDict({"a": flat[:8].view(2, 4).T, "b": flat[6:], "c": torch.ones(2)})
    want = {name: p.detach().bfloat16() for name, p in model.items()}
    collage.to_bf16(model)
    for name, p in model.items():
        assert_same_bits(name, p, want[name])
    assert model["a"].stride() == (1, 4)
    with torch.no_grad():
        model["b"][0] = 9.0  # flat[6]
    assert model["a"][2, 1] == 9.0
    assert model["c"].untyped_storage().nbytes() == 4


def test_memory_shared_with_a_buffer_is_refused():
    model = nn.Linear(4, 2)
    model.register_buffer("first_row", model.weight.detach()[0])
    with pytest.raises(ValueError, match="param 'weight': shares its memory with 'first_row', which is not cast"):
        collage.to_bf16(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_weight_beyond_the_range_is_refused():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.bias[1] = -7e4
    with pytest.raises(ValueError, match=r"param 'bias': -70000 is beyond float16's .*, 65504; use bfloat16"):
        collage.to_fp16(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        model.bias.copy_(torch.tensor([torch.inf, torch.nan]))  # is not made infinite: it was not finite
    collage.to_fp16(model)
    assert model.bias[0] == torch.inf
    assert model.bias[1].isnan()


def test_meta_and_lazy_parameters():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    collage.to_bf16(model)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}
    assert model[1].weight is model[0].weight
    lazy = collage.to_bf16(nn.LazyLinear(3))
    lazy(torch.ones(2, 5).bfloat16())
    assert lazy.weight.dtype == torch.bfloat16


def test_a_module_that_keeps_its_weights_elsewhere_too():
    lstm = collage.to_bf16(nn.LSTM(3, 3))
    assert lstm._flat_weights[0] is lstm.weight_ih_l0
    assert lstm(torch.ones(2, 1, 3).bfloat16())[0].dtype == torch.bfloat16


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_tied_dtensor_keeps_its_attributes(mesh):
    """torch swaps a DTensor's contents, attributes included, with those of a new one."""
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = nn.Parameter(distribute_tensor(torch.rand(4, 4), mesh, [Shard(0)]))
    weight.tag = "mine"
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = model[1].weight = weight
    collage.to_bf16(model)
    assert model[0].weight is model[1].weight is weight
    assert weight.to_local().dtype == torch.bfloat16
    assert weight.tag == "mine"


def test_a_tensor_subclass_stays():
    """It may say float32 and hold anything, as torchao's quantised weights do."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Linear(4, 4)
    model.weight = weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    collage.to_bf16(model)
    assert model.weight is weight
    assert type(weight) is TwoTensor
    assert weight.dtype == weight.a.dtype == torch.float32
    assert model.bias.dtype == torch.bfloat16


def test_sharded_parameters(mesh):
    """What `.data =` gets wrong: the DTensor says bfloat16 and holds float32."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for module in (model[0], model):
        fully_shard(module, mesh=mesh)
    before = dict(model.named_parameters())
    values = {name: p.detach().full_tensor().clone() for name, p in before.items()}
    collage.to_bf16(model)
    for name, p in model.named_parameters():
        assert p is before[name]
        assert isinstance(p, DTensor)
        assert p.dtype == p.to_local().dtype == torch.bfloat16
        assert_same_bits(name, p.full_tensor(), values[name].bfloat16())
    opt = collage.AdamW(model.named_parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(2, 4).bfloat16()).sum().backward()
        opt.step()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    moved = [not torch.equal(p.full_tensor(), values[name].bfloat16()) for name, p in model.named_parameters()]
    assert all(moved)
