"""e4m3 weights under an optimizer: their scales are their module's, and what holds of other weights holds of them."""

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from helpers import assert_same_bits, refused
from torch import Tensor, nn

import collage
from collage import fp8
from collage.formats import fitted, format_of
from collage.fp8.owning import scale_of
from collage.optimizers.planes import theta_of

STRATEGIES = ("collage-fp8", "collage-fp8-lean", "fp8-master")
OPTIMIZERS = {
    "adamw": lambda params, **own: collage.AdamW(params, lr=1e-2, **own),
    "adam": lambda params, **own: collage.Adam(params, lr=1e-2, **own),
    "sgd": lambda params, **own: collage.SGD(params, lr=1e-2, momentum=0.9, **own),
    "lion": lambda params, **own: collage.Lion(params, lr=1e-3, **own),
}
X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def model(seed: int = 0) -> nn.Sequential:
    """Two e4m3 layers, one of them small, with a norm and biases in bfloat16."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, 33), nn.Linear(33, 8)).bfloat16()
    fp8.convert(net, skip=["4"])
    return net


def backward(net: nn.Module, k: int) -> None:
    loss = (net(X * (1 + k % 3)).float() - k).square().mean()
    loss.backward()


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for k in steps:
        backward(net, k)
        opt.step()
        opt.zero_grad()


def tensors(net: nn.Module, opt: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    yield from net.state_dict().items()
    for name, p in net.named_parameters():
        yield from ((f"{name} {key}", x) for key, x in opt.state[p].items())


def assert_same(ours: tuple, theirs: tuple) -> None:
    for (name, x), (_, y) in zip(tensors(*ours), tensors(*theirs), strict=True):
        assert_same_bits(name, x, y)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_converted_model_is_taken_whole_on_every_backend(strategy, kind):
    """The state's scale is the module's tensor; weights beside are bf16x2:sr; backends have the same bits."""
    ends = []
    for backend in ("reference", "cpu"):
        net = model()
        opt = OPTIMIZERS[kind](net.named_parameters(), strategy=strategy, backend=backend)
        monitor = collage.monitor(opt, every=1)
        train(net, opt, range(4))
        assert opt.state[net[0].weight]["param_scale"] is net[0].weight_scale
        low = opt.state[net[4].weight][f"param_{'master' if strategy == 'fp8-master' else 'lo'}"]
        assert low.dtype == (torch.float32 if strategy == "fp8-master" else torch.bfloat16)
        assert opt.state[net[3].weight].keys() & {"exp_avg_scale", "momentum_buffer_scale"} == set()
        ends.append((net, opt, monitor.report().total))
    (ours, opt, quality), (theirs, other, wanted) = ends
    assert quality == wanted
    assert_same((ours, opt), (theirs, other))
    assert 0.9 < quality.edq_ratio < 1.1
    assert abs(quality.edq_visible) < 50  # of e4m3 steps 2**-4 of a weight each; without its scale it would be 1,000s


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_copied_model_and_optimizer_go_on_bit_for_bit(strategy):
    net = model()
    opt = collage.AdamW(net.named_parameters(), lr=1e-2, strategy=strategy)
    train(net, opt, range(2))
    file = io.BytesIO()
    torch.save((net, opt), file)
    file.seek(0)
    pairs = [(net, opt), copy.deepcopy((net, opt)), torch.load(file, weights_only=False)]
    for own, its in pairs:
        assert its.state[own[0].weight]["param_scale"] is own[0].weight_scale
        train(own, its, range(2, 4))
        assert its.state[own[0].weight]["param_scale"] is own[0].weight_scale
    for pair in pairs[1:]:
        assert_same(pairs[0], pair)


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_resumes_bit_for_bit(strategy, first):
    net = model()
    opt = collage.AdamW(net.named_parameters(), lr=1e-2, strategy=strategy)
    train(net, opt, range(2))
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(opt.state_dict())
    train(net, opt, range(2, 4))
    new = model(seed=1)
    other = collage.AdamW(new.named_parameters(), lr=1e-2, strategy=strategy)
    for which in (first, "optimizer" if first == "model" else "model"):
        new.load_state_dict(weights) if which == "model" else other.load_state_dict(state)
    train(new, other, range(2, 4))
    assert other.state[new[0].weight]["param_scale"] is new[0].weight_scale
    assert_same((new, other), (net, opt))


@pytest.mark.parametrize("then", ["step", "export", "save", "resync"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_loaded_under_an_optimizer_are_all_of_them(strategy, then, caplog):
    """As those an optimizer begins with, with no word about an old remainder; unless resync() drops what is below."""
    torch.manual_seed(7)
    weights = {"0.weight": torch.randn(96, 64).bfloat16()}
    net, new = model(), model(seed=1)
    opt = OPTIMIZERS["adamw"](net.named_parameters(), strategy=strategy)
    monitor = collage.monitor(opt, every=1)
    train(net, opt, range(2))
    for own in (net, new):
        own.load_state_dict(weights, strict=False)
    other = OPTIMIZERS["adamw"](new.named_parameters(), strategy=strategy)
    wanted = collage.high_precision_state_dict(new, other)
    with caplog.at_level("INFO"):
        if then == "resync":
            opt.resync()
            wanted["0.weight"] = fp8.export(new, torch.float32)["0.weight"]
        elif then == "save":
            ours, theirs = opt.state_dict()["state"][0], other.state_dict()["state"][0]
            for key in (key for key in ours if key.startswith("param")):
                assert_same_bits(key, ours[key], theirs[key])
        elif then == "step":
            opt.reset_moments()
            for own, its in ((net, opt), (new, other)):
                own[0].weight.grad = torch.ones(96, 64).bfloat16()
                its.step()
            wanted = collage.high_precision_state_dict(new, other)
            assert monitor.report().total.edited == 0
        got = collage.high_precision_state_dict(net, opt)
    assert_same_bits("0.weight", got["0.weight"], wanted["0.weight"])
    assert "remainder" not in caplog.text
    assert net[0].remainder is None


@pytest.mark.parametrize(("first", "below"), [("model", 0.0), ("optimizer", 0.0), ("model", 2.0**-10)])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_resumes_from_exported_weights(first, below, frozen):
    """e4m3 numbers have nothing below them to say, so that the state's stays; a state that comes last is right."""
    net = model()
    opt = collage.AdamW(net.named_parameters(), lr=1e-2, strategy="collage-fp8")
    train(net, opt, range(2))
    new = model(seed=1)
    new[0].weight.requires_grad_(not frozen)  # such begins no state, and keeps what was converted
    weights = fp8.export(net, torch.float32)
    weights |= {name: x * (1 + below) for name, x in weights.items() if name in ("0.weight", "3.weight")}
    other = collage.AdamW(new.named_parameters(), lr=1e-2, strategy="collage-fp8")
    for which in (first, "optimizer" if first == "model" else "model"):
        new.load_state_dict(weights) if which == "model" else other.load_state_dict(opt.state_dict())
    new[0].weight.requires_grad_(True)
    train(new, other, range(2, 4))
    train(net, opt, range(2, 4))
    assert_same((new, other), (net, opt))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_full_precision_goes_out_and_comes_back(strategy):
    """Without a key for scales: the dict is one of the model that was converted. A frozen layer takes part."""
    net = model()
    net[3].weight.requires_grad_(False)
    opt = collage.AdamW([(n, p) for n, p in net.named_parameters() if p.requires_grad], lr=1e-2, strategy=strategy)
    train(net, opt, range(3))
    full = collage.high_precision_state_dict(net, opt)
    plain = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, 33), nn.Linear(33, 8))
    plain.load_state_dict(full, strict=True)
    new = model(seed=1)
    new[3].weight.requires_grad_(False)
    other = collage.AdamW([(n, p) for n, p in new.named_parameters() if p.requires_grad], strategy=strategy)
    collage.load_high_precision_state_dict(new, other, plain.state_dict())
    for name, x in collage.high_precision_state_dict(new, other).items():
        assert_same_bits(name, x, full[name])
    for name, x in new.state_dict().items():
        if x.dtype != torch.bfloat16:  # whose ties may show the other neighbour
            assert_same_bits(name, x, net.state_dict()[name])


def values(net: nn.Module, opt: collage.AdamW) -> dict[str, Tensor]:
    return {name: x for name, x in collage.high_precision_state_dict(net, opt).items() if "weight" in name}


def test_states_go_to_other_strategies_and_back():
    """Between the two of them and from collage-plus, whose weights a model is loaded with: convert=True."""
    plain = nn.Sequential(
        nn.Linear(64, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, 33), nn.Linear(33, 8)
    ).bfloat16()
    for p in plain.parameters():
        p.data = p.data.clone()
    for source in ("collage-plus", "fp32-master"):
        opt = collage.AdamW(plain.named_parameters(), lr=1e-2, strategy=source)
        train(plain, opt, range(3))
        full, state = collage.high_precision_state_dict(plain, opt), opt.state_dict()
        net = model(seed=1)
        other = collage.AdamW(net.named_parameters(), lr=1e-2, strategy="collage-fp8")
        collage.load_high_precision_state_dict(net, other, full)
        other.load_state_dict(state, convert=True)
        for name, x in values(net, other).items():  # 20 bits of a weight; of those beside 16
            assert ((x - full[name]).abs() <= 2.0 ** (-19 if name[0] in "03" else -16) * full[name].abs().amax()).all()
        m, v = opt.state[plain[0].weight]["exp_avg"].float(), other.state[net[0].weight]["exp_avg"]
        assert v.dtype == torch.int8
        assert m.abs().max() > 0
        back = collage.AdamW(plain.named_parameters(), lr=1e-2, strategy=source)
        again = collage.high_precision_state_dict(net, other)
        collage.load_high_precision_state_dict(plain, back, again)
        back.load_state_dict(other.state_dict(), convert=True)
        for name, x in values(plain, back).items():
            assert ((x - again[name]).abs() <= 2.0**-15 * again[name].abs().amax()).all(), name
        train(plain, back, range(2))


@pytest.mark.parametrize("source", ["collage-plus", "fp32-master", "collage-exact", "bf16"])
def test_weights_and_state_of_another_strategy_make_whole_numbers(source):
    """The recipe: load the weights, make the optimizer, load its state. Codes alone get no low components of others."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, 33), nn.Linear(33, 8))
    opt = collage.AdamW(plain.bfloat16().named_parameters(), lr=1e-2, strategy=source)
    train(plain, opt, range(3))
    full = collage.high_precision_state_dict(plain, opt)
    for strategy, bits in (("collage-fp8", 20), ("collage-fp8-lean", 12), ("fp8-master", 20)):
        net = model(seed=1)
        net.load_state_dict(plain.state_dict())
        other = collage.AdamW(net.named_parameters(), lr=1e-2, strategy=strategy)
        other.load_state_dict(opt.state_dict(), convert=True)
        for name, x in values(net, other).items():
            error = float((x - full[name]).abs().max() / full[name].abs().max())
            assert error <= 2.0 ** (1 - bits if name[0] in "03" else -16)
    codes = fp8.export(net)
    net.load_state_dict(codes)
    other = collage.AdamW(net.named_parameters(), lr=1e-2, strategy="collage-fp8")
    other.load_state_dict(opt.state_dict(), convert=True)
    assert_same_bits("codes", values(net, other)["0.weight"], codes["0.weight"].float())


def test_low_bits_that_a_load_has_cut_are_told_of(caplog):
    net = model()
    opt = collage.AdamW(net.named_parameters(), strategy="collage-fp8")
    train(net, opt, range(1))
    plain = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, 33), nn.Linear(33, 8))
    plain.bfloat16().load_state_dict(fp8.export(net))
    with caplog.at_level("INFO"):
        collage.AdamW(plain.named_parameters()).load_state_dict(opt.state_dict(), convert=True)
    assert "'0.weight' and 1 more: saved in 'e4m3+int16', of which the model's load has kept what" in caplog.text


@pytest.mark.parametrize("how", ["fill", "one", "scale"])
def test_what_others_change_is_taken_as_it_is_now(how):
    """hi changed: where that shows, lo is 0 and the scale stays; a loaded scale is the module's, so the state's."""
    net = model()
    opt = collage.AdamW(net.named_parameters(), lr=1e-2, strategy="collage-fp8")
    train(net, opt, range(2))
    weight, rule = net[0].weight, opt.rule_of(opt.param_groups[0])
    with torch.no_grad():
        if how == "fill":
            weight.zero_()
        elif how == "one":
            weight[3, 5] = 0.0
        else:
            net[0].weight_scale += 1
    strategy = opt.strategy_of(next(opt.parameters()))
    theta = [plane.clone() for plane in theta_of(rule, strategy, weight, opt.state[weight])]
    fmt = format_of(strategy.param)
    wanted = fmt.value(fitted(fmt, theta)[0])
    assert_same_bits("value", collage.high_precision_state_dict(net, opt)["0.weight"], wanted)
    if how == "fill":  # what is left is below half of the least that e4m3 shows
        assert (wanted.abs() <= 2.0**-10 * torch.exp2(net[0].weight_scale.float() - 127)[:, None]).all()
    opt.resync()
    assert not opt.state[weight]["param_lo"].any()
    assert_same_bits("hi", weight.detach(), theta[0])
    assert_same_bits("scale", net[0].weight_scale, theta[2])


def test_bytes_of_a_converted_layer():
    """Weights, scales and moments: at most 5.03 and 4.03 per parameter, counted from live tensors."""
    for strategy, least in (("collage-fp8", 5.03), ("collage-fp8-lean", 4.03)):
        net = fp8.convert(nn.Sequential(nn.Linear(1024, 256, bias=False), nn.Linear(256, 8)).bfloat16(), skip=["1"])
        opt = collage.AdamW(net.named_parameters(), strategy=strategy)
        net(torch.ones(1, 1024).bfloat16()).sum().backward()
        opt.step()
        weight = net[0].weight
        held = {x.data_ptr(): x.nbytes for x in (weight, net[0].weight_scale, *opt.state[weight].values()) if x.dim()}
        assert sum(held.values()) <= least * weight.numel()


def test_an_unconverted_model_is_told_to_convert():
    net = nn.Linear(64, 64).bfloat16()
    with pytest.raises(
        ValueError, match=r"'collage-fp8' trains float8_e4m3fn weights, and there are none; call collage.fp8"
    ):
        collage.AdamW(net.named_parameters(), strategy="collage-fp8")
    bare = nn.Parameter(torch.ones(64, 64).to(torch.float8_e4m3fn))
    with pytest.raises(
        ValueError, match=r"param 'w': it is float8_e4m3fn, and no module has its row scales; collage.fp8"
    ):
        collage.AdamW([("w", bare)], strategy="collage-fp8")
    assert scale_of(bare) is None
    converted = model()
    with pytest.raises(
        TypeError, match=r"'0.weight': strategy 'collage-plus' needs bfloat16.*use strategy='collage-fp8'"
    ):
        collage.AdamW(converted.named_parameters())


def test_a_gradient_of_8_bits_is_refused():
    net = model()
    opt = collage.AdamW(net.named_parameters(), strategy="collage-fp8")
    backward(net, 0)
    weight = net[0].weight
    weight.grad = None
    weight.grad_dtype = torch.float8_e4m3fn
    weight.grad = torch.ones_like(weight)
    before = [x.clone() for _, x in tensors(net, opt)]
    with pytest.raises(TypeError, match=r"'0.weight': .*gradient float8_e4m3fn; use bfloat16 or float32.*grad_dtype"):
        opt.step()
    for (name, x), y in zip(tensors(net, opt), before, strict=True):
        assert_same_bits(name, x, y)


def test_a_float32_gradient_is_read_as_it_is():
    ends = []
    for dtype in (torch.bfloat16, torch.float32):
        net = model()
        opt = collage.AdamW(net.named_parameters(), lr=1e-2, strategy="collage-fp8")
        for p in net.parameters():
            p.grad_dtype = dtype
            p.grad = torch.ones(p.shape, dtype=dtype)
        opt.step()
        ends.append((net, opt))
    assert_same(*ends)


def test_muon_and_the_wrapped_take_it_or_say_why_not():
    net = model()
    opt = collage.Muon(
        [
            {"params": [("0.weight", net[0].weight)], "use_muon": True},
            {"params": [(n, p) for n, p in net.named_parameters() if n != "0.weight"], "use_muon": False},
        ],
        lr=1e-3, strategy="collage-fp8", adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    before = net[0].weight.detach().clone()
    train(net, opt, range(2))
    assert not torch.equal(before.view(torch.uint8), net[0].weight.view(torch.uint8))
    net = model()
    wrapped = collage.wrap(torch.optim.NAdam(net.parameters(), lr=1e-3), strategy="collage-fp8")
    train(net, wrapped, range(2))
    assert wrapped.state[net[0].weight]["param_scale"] is net[0].weight_scale


def test_an_average_follows_the_numbers():
    net = model()
    opt = collage.AdamW(net.named_parameters(), lr=1e-2, strategy="collage-fp8")
    ema = collage.EMA(net, decay=0.0, format="fp32", optimizer=opt)
    train(net, opt, range(2))
    start = ema.value("0.weight")
    ema.update()
    full = collage.high_precision_state_dict(net, opt)["0.weight"]
    assert (
        (ema.value("0.weight") - full).abs() <= 2.0**-23 * (start.abs() + full.abs())
    ).all()  # of its own arithmetic
    inside = net(X)
    with ema.averaged():
        assert ((net(X) - inside).abs() <= 2.0**-4 * inside.abs().max()).all()  # what e4m3 rounds


def test_an_average_goes_out_without_scales():
    """To a model that was not converted; a frozen layer, which has no average, as what its codes stand for."""
    net = model()
    net[3].weight.requires_grad_(False)
    full = collage.EMA(net, decay=0.9, format="fp32").high_precision_state_dict()
    plain = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, 33), nn.Linear(33, 8))
    plain.load_state_dict(full, strict=True)
    assert_same_bits("3.weight", full["3.weight"], fp8.export(net, torch.float32)["3.weight"])


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own, while it compiles
def test_torch_refuses_to_compile_a_step():
    """Of a weight whose gradient has another dtype (2.13 forgets grad_dtype in what it traces); no bit is changed."""
    net = model()
    backward(net, 0)
    opt = collage.AdamW(net.named_parameters(), strategy="collage-fp8")
    torch._dynamo.reset()
    with refused(opt, RuntimeError, "grad_dtype"):
        torch.compile(opt.step, backend="eager", fullgraph=True)()
    opt.step()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_capturable_step_has_the_same_bits(strategy):
    """And one that is skipped because of a gradient changes nothing, scales included."""
    ends = []
    for settings in ({}, {"capturable": True}, {"skip_nonfinite": True, "capturable": True}):
        net, lr = model(), torch.tensor(1e-2)
        opt = collage.AdamW(net.named_parameters(), lr=lr, strategy=strategy, **settings)
        for k in range(3):
            lr.fill_(1e-2 / (k + 1))
            train(net, opt, range(k, k + 1))
            if "skip_nonfinite" in settings:
                backward(net, 0)
                net[3].weight.grad[1, 2] = torch.nan
                opt.step()
                opt.zero_grad()
        ends.append((net, opt))
    assert ends[2][1].skipped_steps == 3
    for other in ends[1:]:
        for (name, x), (_, y) in zip(tensors(*other), tensors(*ends[0]), strict=True):
            assert_same_bits(name, x.to(y.dtype) if name.endswith("step") else x, y)


def test_gradients_accumulate_clip_and_release():
    net = model()
    opt = collage.AdamW(net.named_parameters(), lr=1e-2, strategy="collage-fp8", skip_nonfinite=True)
    accumulator = collage.GradientAccumulator(net)
    for k in range(2):
        with accumulator:
            backward(net, k)
    accumulator.finish()
    assert net[0].weight.grad.dtype == torch.float32
    collage.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    accumulator.remove()
    opt.zero_grad()
    backward(net, 0)
    net[0].weight.grad[0, 0] = torch.inf
    before = net[0].weight.detach().clone()
    opt.step()
    assert opt.skipped_steps == 1
    assert_same_bits("weight", net[0].weight.detach(), before)
    ends = []
    for released in (False, True):
        net = model()
        opt = collage.AdamW(net.named_parameters(), lr=1e-2, strategy="collage-fp8")
        if released:
            collage.release_gradients(net, opt)
        train(net, opt, range(3))
        ends.append((net, opt))
    assert_same(*ends)
