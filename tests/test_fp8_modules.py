"""Converted layers: which they are, what they multiply, and what copies, casts, files and compilers leave of them."""

import copy
import io

import pytest
import torch
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import collage
from collage import fp8
from collage.formats import format_of, split
from collage.fp8 import products
from collage.fp8.codes import coded, decoded, quantised
from collage.fp8.linear import Float8Linear
from collage.fp8.owning import scale_of, taken_remainder

BF16, E4M3, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
SHAPES = [(16, 16, 16), (64, 48, 32), (5, 33, 17), (1, 7, 130), (300, 24, 200)]  # tokens, rows, columns


def net(**own):
    torch.manual_seed(0)
    layers = nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 32, bias=False), nn.LayerNorm(32), nn.Linear(32, 5)
    return fp8.convert(nn.Sequential(*layers), **own)


def layer(rows, columns, seed=0, **own):
    torch.manual_seed(seed)
    made = nn.Linear(columns, rows)
    with torch.no_grad():
        made.weight *= torch.exp2(torch.randint(-9, 9, (rows, 1)))
    return fp8.convert(made, **own)


def activations(*shape, dtype=BF16, seed=1):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.exp2(torch.arange(shape[-2]) % 7 - 3.0)[:, None]).to(dtype).requires_grad_()


def results(module, x, seed=2):
    """Output and gradients: of x, then of every parameter."""
    module.zero_grad()
    x.grad = None
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert_same_bits(name, got[name], want[name])


def plain(own: Float8Linear, dtype=BF16):
    """The same layer of plain weights."""
    made = nn.Linear(own.in_features, own.out_features, own.bias is not None, dtype=dtype)
    made.load_state_dict(fp8.export(own, dtype))
    return made


# Codes


def test_every_code_is_decoded_exactly():
    hi = torch.arange(256).to(torch.uint8).view(E4M3).expand(221, 256)
    scale = torch.arange(26, 247).to(torch.uint8)
    wanted = hi.double() * torch.exp2(scale.double() - 127)[:, None]
    for dtype in (BF16, F32, torch.float64):
        assert_same_bits(str(dtype), decoded(hi, scale, dtype).double(), wanted)


def test_a_weight_is_the_nearest_word_of_its_format():
    weight = torch.randn(70, 40_000, generator=torch.Generator().manual_seed(0))  # several pieces
    for name, got, want in zip(
        ["hi", "lo", "scale"], coded(weight), split(format_of("e4m3+int16"), weight), strict=True
    ):
        assert_same_bits(name, got, want)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_activations_are_rounded_once_to_the_nearest(dtype):
    x = activations(9, 40, dtype=dtype).detach()
    x[0] *= 2.0**-120
    x[1] *= 2.0**110
    x[2] = 0
    codes, unit = quantised(x)
    unit = unit.double()
    assert_same_bits("codes", codes, (x.double() / unit).to(E4M3))
    assert bool(((x.double().abs().amax(1) <= 448 * unit[:, 0]) & codes.float().isfinite().all(1)).all())
    assert bool((x.double().abs().amax(1) > 224 * unit[:, 0])[3:].all())  # of the smallest that fits
    assert bool(quantised(torch.tensor([[1.0, torch.inf], [torch.nan, 1.0]], dtype=dtype))[1].isnan().all())


# Products


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, F32, torch.float64])
def test_the_decoded_product_is_that_of_the_decoded_weights(shape, dtype, monkeypatch):
    """Within the accumulation: of n terms n half ulps of float32 (or float64) of their sizes, and one of the result."""
    tokens, rows, columns = shape
    monkeypatch.setitem(products.TILE, "cpu", 16 * 24)  # several tiles, the last one smaller
    own, x = layer(rows, columns, grad_dtype=F32), activations(tokens, columns, dtype=dtype)
    own.bias.data = own.bias.data.to(dtype)
    weight = decoded(own.weight, own.weight_scale, torch.float64)
    dy = torch.randn(tokens, rows, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = results(own, x)
    within(got["y"], x.double(), weight.t(), own.bias.double())
    within(got["dx"], dy.double(), weight)
    assert got["weight"].dtype == F32
    within(got["weight"], dy.double().t(), x.double(), computed=dtype)


def within(got, a, b, bias=0.0, computed=None):
    eps = torch.finfo(torch.float64 if got.dtype == torch.float64 else F32).eps
    sizes = a.abs() @ b.abs() + abs(bias)
    result = a @ b + bias
    rounding = torch.finfo(computed or got.dtype).eps / 2 * result.abs()
    assert bool(((got.double() - result).abs() <= (a.shape[1] + 2) * eps * sizes + 1.01 * rounding).all())


def test_a_tile_is_all_that_is_decoded(monkeypatch):
    sizes = []
    monkeypatch.setattr(products, "decoded", lambda hi, *rest: sizes.append(hi.numel()) or decoded(hi, *rest))
    monkeypatch.setitem(products.TILE, "cpu", 1 << 12)
    results(layer(128, 256), activations(3, 256))
    assert sizes == [1 << 12] * 16  # forward by rows, backward by columns


def test_float16_is_computed_in_float32():
    """A row of 2**20 is beyond float16, and so is its power of two; the output here is not."""
    own = layer(16, 32)
    own.weight_scale += 16
    x = (activations(4, 32).detach() * 2.0**-16).half().requires_grad_()
    own.bias.data = own.bias.data.half()
    y = own(x)
    weight = decoded(own.weight, own.weight_scale, F32)
    assert bool(weight.abs().max() > 65504)
    assert_same_bits("y", y, F.linear(x.float(), weight, own.bias.float()).half())
    y.backward(torch.full_like(y, 2.0**-16))
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] % 16 == s[2] % 16 == 0] + [(33, 128, 64)])
def test_scaled_mm_is_its_definition(shape):
    """Its float32 sums in any order: n half ulps of the terms' sizes. Inputs are rounded to e4m3 for each row."""
    tokens, rows, columns = shape
    own, x = layer(rows, columns, product="scaled_mm", grad_dtype=F32), activations(tokens, columns)
    assert own.missing() == ""
    got = results(own, x)
    weight = decoded(own.weight, own.weight_scale, torch.float64)
    dy = torch.randn(tokens, rows, generator=torch.Generator().manual_seed(2)).to(BF16)
    factors = torch.exp2(own.weight_scale.double() - 127)
    within(got["y"], dequantised(x.detach()), weight.t(), own.bias.double())
    within(got["dx"], dequantised((dy.double() * factors).to(BF16)), own.weight.detach().double())
    within(got["weight"], dy.double().t(), x.double(), computed=BF16)


def dequantised(x):
    codes, unit = quantised(x)
    return codes.double() * unit


def test_the_products_differ_by_the_rounding_of_activations():
    """A rounding to e4m3 is off by 2**-4 of a number, or half its row's smallest step: 2**-10 / 224 of the largest."""
    x = activations(16, 64)
    a, b = (results(layer(48, 64, product=product, grad_dtype=F32), x) for product in ("scaled_mm", "decoded"))
    own = layer(48, 64)
    weight = decoded(own.weight.detach(), own.weight_scale, torch.float64)
    off = x.detach().double().abs() * 2.0**-4 + x.detach().double().abs().amax(1, keepdim=True) * (2.0**-10 / 224)
    bound = off @ weight.t().abs() + 2.0**-7 * b["y"].double().abs() + 1e-6
    assert bool(((a["y"].double() - b["y"].double()).abs() <= bound).all())
    assert not torch.equal(a["y"], b["y"])
    assert_same_bits("dW", a["weight"], b["weight"])


def test_what_operands_of_hopper_look_like(monkeypatch):
    """Row-major by column-major, multiples of 16, scales [m, 1] and [1, n] of float32; other shapes are decoded."""
    calls = []

    def seen(a, b, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert a.dtype == b.dtype == E4M3
        assert scale_a.shape == (a.shape[0], 1)
        assert scale_b.shape == (1, b.shape[1])
        assert scale_a.dtype == scale_b.dtype == F32
        assert scale_a.stride(1) == scale_b.stride(1) == 1
        assert {size % 16 for size in b.shape} == {0}
        assert out_dtype == BF16
        assert not use_fast_accum
        calls.append(b.shape)
        return a.new_zeros(a.shape[0], b.shape[1], dtype=BF16)

    monkeypatch.setattr(torch, "_scaled_mm", seen)
    results(layer(48, 32, product="scaled_mm"), activations(5, 32))
    assert calls == [(32, 48), (48, 32)]
    odd = layer(40, 32, product="auto")
    odd.product = "scaled_mm"
    assert odd.missing() == "fp8 products take multiples of 16, and it is 40 x 32"
    results(odd, activations(5, 32))
    assert len(calls) == 2
    assert "bfloat16, and activations are torch.float32" in layer(16, 16, product="scaled_mm").missing(F32)
    assert "cpu" in layer(16, 16).missing()
    assert "asked for" in layer(16, 16, product="decoded").missing()


def test_inputs_of_any_shape():
    own = layer(16, 24)
    x = activations(6, 24)
    y = own(x)
    assert_same_bits("3-d", own(x.view(2, 3, 24)), y.view(2, 3, 16))
    assert own(x[:0]).shape == (0, 16)
    assert own(x[0]).shape == (16,)
    own(x[:0]).sum().backward()
    assert not own.weight.grad.any()


def test_dtypes_mix_under_autocast_alone():
    own = layer(16, 24)
    x = activations(6, 24, dtype=F32)
    with pytest.raises(TypeError, match=r"x is torch\.float32 and the bias torch\.bfloat16; cast one"):
        own(x)
    with torch.autocast("cpu", BF16):
        y = own(x)
    assert_same_bits("y", y, own(x.bfloat16()))
    y.sum().backward()
    assert x.grad.dtype == F32
    with torch.autocast("cpu", torch.float16):
        assert own(x).dtype == torch.float16


@pytest.mark.parametrize("grad_dtype", [BF16, F32])
def test_gradients_have_their_dtype_and_only_what_trains_has_one(grad_dtype):
    own, x = layer(16, 24, grad_dtype=grad_dtype), activations(6, 24)
    results(own, x)
    assert own.weight.grad.dtype == grad_dtype
    own.weight.requires_grad_(False)
    assert results(own, x)["weight"] is None
    own.weight.requires_grad_(True)
    assert results(own, x)["weight"].dtype == grad_dtype
    with torch.inference_mode():
        own(x)
    assert results(own, x)["weight"].dtype == grad_dtype


def test_what_is_saved_for_backward_is_no_decoded_weight():
    saved = []
    own, x = layer(64, 24), activations(6, 24)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        own(x)
    assert sum(t.numel() * t.element_size() for t in saved) == 6 * 24 * 2 + 64 * 24 + 64
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), own.weight.data_ptr(), own.weight_scale.data_ptr()}


# Graphs and compilers


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_have_the_same_gradients(reentrant):
    model, x = net(), activations(6, 24)
    want = results(model, x)
    model.zero_grad()
    x.grad = None
    y = checkpoint(model, x, use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    assert_same({"y": y.detach(), "dx": x.grad, **{n: p.grad for n, p in model.named_parameters()}}, want)


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + self.inner(2 * x)


# Dynamo looks for a .grad of the handle, and hides torch's warning on that, which "error" would have raised before.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("product", ["decoded", "scaled_mm"])
def test_a_compiled_model_has_the_same_bits(backend, product):
    """In one graph; a layer that is used twice; the second time, when there are gradients; of a copy."""
    torch._dynamo.reset()
    own, x = layer(32, 32, product=product), activations(6, 32)
    twice = [Twice(own)] if backend == "aot_eager" else []  # Inductor adds within the second product: a rounding less
    for module in (own, *twice, copy.deepcopy(own)):
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        want = results(module, x)
        for _ in range(2):
            got = results(compiled, x)
            assert_same({name.removeprefix("_orig_mod."): value for name, value in got.items()}, want)


# What is converted


def kinds(model):
    return {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def llama(**own):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=2, **sizes, **own))


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_keeps_its_embeddings_norms_and_head(tied):
    model = fp8.convert(llama(tie_word_embeddings=tied))
    assert len(kinds(model)) == 2 * 7
    assert {p.dtype for n, p in model.named_parameters() if "proj" not in n} == {BF16}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.model.rotary_emb.inv_freq.dtype == F32
    loss = model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {BF16}


def test_heads():
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    assert "classifier" not in kinds(fp8.convert(BertForSequenceClassification(config)))
    assert len(kinds(fp8.convert(llama().model))) == 14  # none is its head
    assert kinds(net()) == {"0", "2"}  # the last one is
    assert isinstance(layer(8, 8), Float8Linear)  # the only one is not


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["model.layers.0"], {"model.layers.0."}),
        (["*.down_proj", "model.layers.1.self_attn"], {"down_proj", "layers.1.self_attn"}),
        ("*.q_proj", {"q_proj"}),
        (["lm_head", "model.norm"], set()),
    ],
)
def test_what_skip_names_stays(skip, left):
    model = llama()
    every = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert kinds(fp8.convert(model, skip=skip)) == {n for n in every if not any(part in n for part in left)}
    assert model.model.layers[0].self_attn.q_proj.weight.dtype in (BF16, E4M3)


def test_other_classes_stay():
    torch.manual_seed(0)
    model = fp8.convert(nn.ModuleList([nn.MultiheadAttention(16, 2), nn.Linear(16, 16), nn.Linear(16, 2)]))
    assert kinds(model) == {"1"}
    assert model[0](*[torch.randn(3, 2, 16).bfloat16()] * 3)[0].dtype == BF16
    encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    assert kinds(fp8.convert(nn.Sequential(encoder, nn.Linear(16, 16), nn.Linear(16, 2)).eval())) == {"1"}
    with torch.no_grad():  # takes a path of its own past the forward of its layers
        assert bool(encoder(torch.randn(3, 2, 16).bfloat16()).isfinite().all())


def test_a_layer_stays_what_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[0].weight.requires_grad_(False)
    model[0].mine, calls = "mine", []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before, running = model[0], nn.BatchNorm1d(8)
    model.append(running)
    model.append(nn.Linear(8, 1))
    assert fp8.convert(model) is model
    assert model[0] is before
    assert before.mine == "mine"
    assert not before.training
    assert not before.weight.requires_grad
    assert running.weight.dtype == BF16
    assert running.running_mean.dtype == F32
    model[0](torch.zeros(1, 8).bfloat16())
    assert calls == [1]
    assert "e4m3" in repr(model)
    assert "in_features=8" in repr(model)


def tied():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[2].weight = model[1].weight
    return model


def spoilt(change):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    change(model)
    return model


def poke(value, index=1):
    return lambda model: model[index].weight.data[0, 0].fill_(value)


@pytest.mark.parametrize(
    ("model", "own", "error", "match"),
    [
        (tied, {}, ValueError, r"'1': shares its weight with '2.weight'; skip=\['1'\]"),
        (lambda: spoilt(poke(torch.nan)), {}, ValueError, "'1': its weight is not finite"),
        (lambda: spoilt(lambda m: poke(1e39)(m.double())), {}, ValueError, "'1': its weight is not finite"),
        (lambda: net(), {}, ValueError, "'0': is converted already"),
        (lambda: spoilt(lambda m: weight_norm(m[1])), {}, ValueError, "'1': its weight is made of others"),
        (lambda: spoilt(lambda m: m.to("meta")), {}, ValueError, "'0': its weight has no numbers yet"),
        (lambda: spoilt(lambda m: setattr(m[1], "forward", id)), {}, ValueError, "'1': its forward was replaced"),
        (
            lambda: spoilt(lambda m: m[1].weight.data.to(torch.complex64)),
            {"skip": ["one"]},
            ValueError,
            "'one'.*0, 1, 2",
        ),
        (lambda: spoilt(lambda m: None), {"product": "fp8"}, ValueError, "'fp8' is none of 'auto'"),
        (lambda: spoilt(lambda m: None), {"product": "scaled_mm"}, ValueError, "'0': .*multiples of 16.*8 x 8"),
        (lambda: spoilt(lambda m: None), {"grad_dtype": E4M3}, ValueError, "grad_dtype"),
        (lambda: spoilt(lambda m: None), {"skip": ["*"]}, ValueError, "none of its layers is left"),
        (lambda: spoilt(lambda m: m.insert(0, nn.Linear(0, 8))), {}, ValueError, "'0': its weight has no elements"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_cannot_be_converted_says_why_and_stays(model, own, error, match):
    made = model()
    before = [(name, id(p), type(m)) for name, m in made.named_modules() for p in m.parameters(recurse=False)]
    with pytest.raises(error, match=match):
        fp8.convert(made, **own)
    assert before == [(name, id(p), type(m)) for name, m in made.named_modules() for p in m.parameters(recurse=False)]


def test_a_bias_that_bfloat16_has_not_leaves_all_as_it_was():
    made = nn.Sequential(nn.Linear(8, 8).double(), nn.Linear(8, 2))
    made[0].bias.data[0] = 3.4e38
    made[0].bias.data = made[0].bias.data.float()
    with pytest.raises(ValueError, match=r"'0\.bias': .*beyond bfloat16"):
        fp8.convert(made)
    assert not kinds(made)


def test_tied_layers_are_converted_once_one_is_free():
    model = tied()
    model.insert(3, nn.Linear(8, 8))
    assert kinds(fp8.convert(model, skip=["1", "2"])) == {"3"}
    assert model[1].weight is model[2].weight


# Copies, casts, checkpoints


def copies(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = net()
    loaded.load_state_dict(model.state_dict())
    assigned = fp8.convert(
        nn.Sequential(
            *[
                copy.deepcopy(m) if i not in (0, 2, 4) else nn.Linear(m.in_features, m.out_features, m.bias is not None)
                for i, m in enumerate(model)
            ]
        )
    )
    assigned.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return copy.deepcopy(model), torch.load(stream, weights_only=False), loaded, assigned


def test_copies_are_whole():
    """Same results, gradients of the right dtype, and scales that are found and their own."""
    model, x = net(), activations(6, 24)
    want = results(model, x)
    for made in copies(model):
        assert_same(results(made, x), want)
        assert scale_of(made[0].weight) is made[0].weight_scale
        assert made[0].weight_scale.data_ptr() != model[0].weight_scale.data_ptr()


@pytest.mark.parametrize(
    "cast",
    [nn.Module.bfloat16, nn.Module.float, nn.Module.half, nn.Module.double, lambda m: m.to(BF16), collage.to_fp16],
)
def test_a_cast_leaves_the_codes(cast):
    model = net()
    hi, scale = (model[0].weight.clone(), model[0].weight_scale.clone())
    cast(model)
    assert_same_bits("hi", model[0].weight.detach(), hi.detach())
    assert_same_bits("scale", model[0].weight_scale, scale)
    x = activations(6, 24, dtype=model[0].bias.dtype)
    assert results(model, x)["0.weight"].dtype == BF16


def test_it_goes_to_meta_and_back():
    model = net()
    state = model.state_dict()
    model.to("meta")
    assert model[0].weight.dtype == E4M3
    assert model[0].weight.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert_same(results(model, activations(6, 24)), results(net(), activations(6, 24)))


def test_safetensors_hold_it(tmp_path):
    model = net()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded["0.weight"].dtype == E4M3
    assert loaded["0.weight_scale"].dtype == torch.uint8
    other = fp8.convert(
        nn.Sequential(
            *[nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 32, bias=False), nn.LayerNorm(32), nn.Linear(32, 5)]
        )
    )
    other.load_state_dict(loaded)
    assert_same(results(other, activations(6, 24)), results(model, activations(6, 24)))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_what_is_exported_is_plain(dtype):
    model = net()
    state = fp8.export(model, dtype)
    torch.manual_seed(5)
    other = nn.Sequential(
        nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 32, bias=False), nn.LayerNorm(32), nn.Linear(32, 5)
    )
    other.to(dtype).load_state_dict(state)
    assert_same_bits(
        "0.weight", other[0].weight.detach(), decoded(model[0].weight.detach(), model[0].weight_scale, dtype)
    )
    again = fp8.convert(other)
    assert_same_bits("hi", again[0].weight.detach(), model[0].weight.detach())
    assert not again[0].remainder.any()
    loaded = net()
    loaded.load_state_dict(fp8.export(model.state_dict(), dtype))
    assert_same_bits("hi", loaded[0].weight.detach(), model[0].weight.detach())
    assert loaded[0].remainder is None


# What e4m3 cut off


@pytest.mark.parametrize(("bits", "name"), [(16, "e4m3+int16"), (8, "e4m3+int8")])
def test_the_remainder_is_taken_once(bits, name):
    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    weight = plain.weight.detach().clone()
    own = copy.deepcopy(fp8.convert(plain))
    low, planes = taken_remainder(own.weight), (own.weight.detach(), torch.empty(0), own.weight_scale)
    value = format_of(name).value(format_of(name).continued(planes, low))
    step = torch.exp2(own.weight_scale.float() - 127)[:, None] * 2.0 ** (-9 - bits)  # of a row's smallest numbers
    assert bool(((value - weight).abs() <= (weight.abs() * 2.0 ** (-3 - bits)).clamp(min=step)).all())
    assert taken_remainder(own.weight) is None
    assert own.remainder is None


@pytest.mark.parametrize("change", [lambda w: w.data.copy_(w.data), lambda w: w.detach().view(torch.uint8).add_(0)])
def test_a_remainder_of_other_weights_is_not_taken(change):
    own = layer(16, 16)
    change(own.weight)
    assert (taken_remainder(own.weight) is None) == (own.weight._version > 0)


@pytest.mark.parametrize(("strategy", "bits"), [("collage-fp8", 16), ("collage-fp8-lean", 8), ("fp8-master", 16)])
def test_an_optimizer_begins_with_the_weights_that_were_converted(strategy, bits):
    """And not with what e4m3 shows of them: its first step is of no size here, so that it only makes its state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2))
    weight = model[0].weight.detach().clone()
    opt = collage.AdamW(fp8.convert(model).named_parameters(), lr=0.0, weight_decay=0.0, strategy=strategy)
    results(model, activations(6, 64))
    opt.step()
    got = collage.high_precision_state_dict(model, opt)["0.weight"]
    shown = fp8.export(model, F32)["0.weight"]
    assert float((got - weight).norm()) < 2.0 ** (1 - bits) * float((shown - weight).norm())
    assert model[0].remainder is None


# What models do with a layer


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48)])
def test_an_output_can_be_written_to(shape):
    """As a linear layer's: torch refuses that of a view that a function of ours gives."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    ends = []
    for act in (nn.ReLU(inplace=True), nn.ReLU()):
        own = layer(40, 48)
        y = act(own(x))
        (y.float() ** 2).sum().backward()
        ends.append((y.detach(), own.weight.grad))
    for ours, theirs in zip(*ends, strict=True):
        assert_same_bits("in place", ours, theirs)


@pytest.mark.parametrize("dtype", [E4M3, torch.int64])
def test_activations_of_a_dtype_that_has_no_product_are_refused(dtype):
    own = layer(40, 48)
    with pytest.raises(TypeError, match=rf"x is {dtype}, and needs 16 bits or more; .* name the layer in skip="):
        own(torch.ones(2, 48).to(dtype))


def test_skip_takes_names():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(TypeError, match="skip: needs names of modules or patterns of names, got Linear"):
        fp8.convert(net, skip=[net[0]])
    assert net[0].weight.dtype == torch.float32


def begun(model: nn.Module) -> torch.Tensor:
    """The first layer's weight as an optimizer that is made now begins with it."""
    opt = collage.AdamW(model.named_parameters(), strategy="collage-fp8")
    return collage.high_precision_state_dict(model, opt)["0.weight"]


def loaded(state: dict, assign: bool = False) -> nn.Module:
    torch.manual_seed(1)
    model = fp8.convert(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2)))
    model.load_state_dict(state, assign=assign)
    return model


@pytest.mark.parametrize("assign", [False, True])
def test_what_e4m3_cuts_off_of_weights_that_are_loaded_stays(assign):
    """As of those that are converted; after torch.save too. A write, or codes of other weights, and it is dropped."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2)).bfloat16()
    weight, state = plain[0].weight.detach().float(), plain.state_dict()
    wanted = begun(fp8.convert(copy.deepcopy(plain)))
    assert ((wanted - weight).abs() <= 2.0**-21 * weight.abs().amax()).all()
    for dtype in (BF16, F32):
        model = loaded({key: x.to(dtype if key == "0.weight" else BF16) for key, x in state.items()}, assign)
        assert_same_bits("loaded", begun(model), wanted)
    model = loaded(state, assign)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same_bits("saved", begun(torch.load(file, weights_only=False)), wanted)
    model.load_state_dict(model.state_dict(), assign=assign)
    assert_same_bits("its own", begun(copy.deepcopy(model)), wanted)
    other = copy.deepcopy(model)
    other[0].weight.detach().view(torch.uint8)[0, 0] ^= 1
    assert_same_bits("written", begun(copy.deepcopy(other)), fp8.export(other, F32)["0.weight"])
    model.load_state_dict(loaded(fp8.export(model)).state_dict() | {"0.weight_scale": model[0].weight_scale + 1})
    assert_same_bits("scaled", begun(model), fp8.export(model, F32)["0.weight"])


def test_an_optimizer_says_what_is_kept_beside_its_e4m3_weights():
    model = fp8.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)))
    shown = repr(collage.AdamW(model.named_parameters(), strategy="fp8-master"))
    assert "e4m3+fp32, fp32, fp32; bfloat16 parameters keep bf16+fp32; so do 3 of its 4" in shown
    assert "keep bf16:sr, bf16x2:sr; so do 3 of its 4" in repr(
        collage.AdamW(model.named_parameters(), strategy="collage-fp8")
    )
