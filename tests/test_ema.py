"""Weight averages: the same problem as the weights, solved by the same three verbs."""

import copy
import logging
import pickle
from contextlib import ExitStack

import pytest
import torch
from helpers import assert_same_bits, assert_same_planes
from torch import nn

import collage
from collage import layout
from collage.optimizers import edits
from collage.strategies import STRATEGIES


def model_of(value=0.0, n=2000):
    model = nn.Module()
    model.w = nn.Parameter(torch.full((n,), value).bfloat16())
    return model


def moved(format, decay=0.9999, steps=1000):
    """Error of the average's movement, relative to float64, while the weights stand away from it."""
    torch.manual_seed(0)
    model = model_of()
    start = torch.randn(2000).bfloat16()
    model.w.data.copy_(start)
    ema = collage.EMA(model, decay, format=format)
    exact = start.double()
    for step in range(steps):
        with torch.no_grad():
            model.w.copy_(start + torch.sin(torch.tensor(step / 50.0)) + 1)
        ema.update()
        exact = exact * decay + (1 - decay) * model.w.detach().double()
    movement = exact - start.double()
    return ((ema.value("w").double() - exact).norm() / movement.norm()).item()


def test_bf16x2_follows_where_bf16_stands_still():
    """Measured: bf16 1.0 (never moves), bf16x2 a few per cent at most, fp32 exact to its ulp."""
    assert moved("bf16") > 0.95
    assert moved("bf16x2") < 0.03
    assert moved("bf16x2:sr") < 0.03
    assert moved("fp32") < 1e-3


def test_the_default_follows_all_the_way_where_nearest_stands_still():
    """From 1.0 towards the next bf16, 2000 updates at 0.999: exactly, 1 - 0.999**2000 = 0.865 of the way."""

    def way(**format):
        model = model_of(1.0)
        ema = collage.EMA(model, decay=0.999, **format)
        model.w.data.fill_(1.0 + 2.0**-7)
        for _ in range(2000):
            ema.update()
        return (ema.value("w").double() - 1.0).mean().item() * 2.0**7

    assert way(format="bf16x2") < 0.3
    assert way() == pytest.approx(1 - 0.999**2000, abs=0.01)


def test_no_update_while_the_average_is_lent():
    ema = collage.EMA(model_of(1.0), decay=0.9)
    with ema.averaged():
        with ema.averaged():
            pass
        with pytest.raises(RuntimeError, match=r"update\(\) inside averaged\(\)"):
            ema.update()
    assert ema.steps == 0
    ema.update()
    assert ema.steps == 1


def test_averaged_lends_the_average_and_gives_the_weights_back():
    model = model_of(1.0)
    opt = collage.AdamW(model.named_parameters(), lr=0.1)
    mon = collage.monitor(opt, every=1)
    ema = collage.EMA(model, decay=0.5)
    model.w.grad = torch.ones_like(model.w)
    opt.step()
    ema.update()
    own = model.w.detach().clone()
    with ema.averaged():
        assert model.w[0].item() == pytest.approx((1 + own[0].item()) / 2, rel=2.0**-8)
    assert_same_bits("w", model.w.detach(), own)
    with pytest.raises(ZeroDivisionError), ema.averaged():
        _ = 1 / 0
    assert_same_bits("w", model.w.detach(), own)
    opt.step()  # the planes still belong together
    assert mon.report().total.steps == 2


def test_state_dict_round_trip(tmp_path):
    ema = collage.EMA(model_of(1.0), decay=0.9, format="bf16x2:sr")
    for _ in range(3):
        ema.update()
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other_model = model_of(1.0)
    other = collage.EMA(other_model, decay=0.9, format="bf16x2:sr")
    other.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    ema.update()
    other.update()
    assert_same_bits("w", other.value("w"), ema.value("w"))


def test_errors():
    with pytest.raises(ValueError, match=r"decay: needs a number in \[0, 1\), got 1.0"):
        collage.EMA(model_of(), decay=1.0)
    with pytest.raises(ValueError, match="unknown format 'bf32'; known formats"):
        collage.EMA(model_of(), decay=0.9, format="bf32")
    with pytest.raises(ValueError, match="format: 'bf16\\+fp32' is a format for trained weights"):
        collage.EMA(model_of(), decay=0.9, format="bf16+fp32")
    with pytest.raises(ValueError, match=r"'w' is of another shape .*\(4,\).*\(3,\)"):
        collage.EMA(model_of(n=3), decay=0.9).load_state_dict(collage.EMA(model_of(n=4), decay=0.9).state_dict())
    with pytest.raises(ValueError, match=r"state_dict: \['steps', 'planes'\] missing"):
        collage.EMA(model_of(), decay=0.9).load_state_dict({})


class Net(nn.Module):
    """A batch norm, a weight under two names, one that is frozen, and one with strides."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.mixed = nn.Parameter(torch.randn(4, 3).t())
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        for p in self.parameters():
            p.data = p.data.to(dtype)


def step(model, opt, k):
    g = torch.Generator().manual_seed(k)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
    opt.step()


def trained(strategy="collage-plus", steps=3, lr=1e-4, **settings):
    model = Net(STRATEGIES[strategy].dtype)
    opt = collage.AdamW(model.named_parameters(), lr=lr, strategy=strategy)
    ema = collage.EMA(model, decay=0.9, optimizer=opt, **settings)
    for k in range(steps):
        step(model, opt, k)
        ema.update()
    return model, opt, ema


def state_of(model, opt):
    found = {f"{name} {key}": x.clone() for name, p in model.named_parameters() for key, x in opt.state[p].items()}
    return found | {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("format", ["fp32", "bf16x2:sr"])
@pytest.mark.parametrize("strategy", ["collage-plus", "collage-plus-sr", "fp32-master", "kahan", "bf16", "fp32"])
def test_with_the_optimizer_it_follows_full_values(strategy, format):
    """Bit for bit the average of a float32 model that has the exported values after every step."""
    model = Net(STRATEGIES[strategy].dtype)
    opt = collage.AdamW(model.named_parameters(), lr=1e-5, strategy=strategy)
    for k in range(2):  # the average starts at a full value, too
        step(model, opt, k)
    full = Net(torch.float32)
    full.load_state_dict(collage.high_precision_state_dict(model, opt))
    ema = collage.EMA(model, decay=0.9, format=format, optimizer=opt)
    want = collage.EMA(full, decay=0.9, format=format)
    for k in range(5):
        step(model, opt, k)
        full.load_state_dict(collage.high_precision_state_dict(model, opt))
        ema.update()
        want.update()
    for name in want.planes:
        assert_same_bits(name, ema.value(name), want.value(name))
    assert list(ema.planes) == ["mixed", "embed.weight", "norm.weight", "norm.bias"]


def test_without_it_follows_the_visible_weights_and_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="collage"):
        model = Net()
        ema = collage.EMA(model, decay=0.9)
        assert "visible weights of 4 of 4 parameters; with optimizer= it follows" in caplog.messages[0]
        assert "follows 0 full values, 4 visible weights" in repr(ema)
        opt = collage.AdamW(list(model.named_parameters())[:3])  # one of them frozen
        assert "follows 2 full values, 2 visible weights" in repr(collage.EMA(model, 0.9, optimizer=opt))
        rest = collage.AdamW(list(model.named_parameters())[3:])
        collage.EMA(model, 0.9, optimizer=[opt, rest])
        assert "follows 4 full values, 0" in repr(collage.EMA(Net(torch.float32), decay=0.9))  # visible is full
    said = [message for message in caplog.messages if message.startswith("EMA")]
    assert len(said) == 2
    assert "visible weights of 2 of 4 parameters" in said[1]


def test_it_follows_a_weight_that_others_changed_as_it_is_now():
    model, _, ema = trained("fp32-master", format="fp32")
    with torch.no_grad():
        model.mixed.fill_(5.0)
    before = ema.value("mixed")
    ema.update()
    moved = torch.tensor(0.1) * (5.0 - before)
    assert_same_bits("mixed", ema.value("mixed"), before + moved)


def test_only_trainable_parameters_unless_asked():
    model = Net()
    assert list(collage.EMA(model, 0.9).planes) == ["mixed", "embed.weight", "norm.weight", "norm.bias"]
    assert "frozen" in collage.EMA(model, 0.9, frozen=True).planes
    with pytest.raises(ValueError, match="no trainable parameter to average; frozen=True"):
        collage.EMA(Net().requires_grad_(False), 0.9)


def test_a_parameter_unfrozen_later_joins_and_one_frozen_later_stays():
    model = Net(torch.float32)
    ema = collage.EMA(model, decay=0.5, format="fp32")
    ema.update()
    model.frozen.requires_grad_(True)
    model.mixed.requires_grad_(False)
    ema.update()
    assert_same_bits("the average of a constant", ema.value("frozen"), model.frozen.detach())
    start = model.frozen.detach().clone()
    with torch.no_grad():
        for name in ("frozen", "mixed"):
            getattr(model, name).add_(1.0)
    ema.update()
    assert_same_bits("one more", ema.value("frozen"), start + 0.5 * ((start + 1.0) - start))
    assert (ema.value("mixed") != model.mixed).all()
    resumed = collage.EMA(Net(torch.float32), decay=0.5, format="fp32")
    resumed.load_state_dict(ema.state_dict())  # where that parameter is frozen still
    assert_same_bits("frozen", resumed.value("frozen"), ema.value("frozen"))


def test_inside_averaged_an_export_gives_the_average_and_steps_are_refused():
    model, opt, ema = trained()
    before = state_of(model, opt)
    state = opt.state_dict()
    full = collage.high_precision_state_dict(model, opt)
    with ema.averaged():
        inside = collage.high_precision_state_dict(model, opt)
        for name in ema.planes:
            assert_same_bits(name, inside[name], ema.value(name))
            assert_same_bits("visible", model.get_parameter(name).detach(), ema.value(name).bfloat16())
        assert_same_bits("tied", inside["head.weight"], ema.value("embed.weight"))
        assert (inside["mixed"] != inside["mixed"].bfloat16().float()).any()
        for act, what in (
            (opt.step, "step"), (opt.resync, "resync"), (ema.update, "update"),
            (lambda: opt.load_state_dict(state), "load_state_dict"),
            (lambda: ema.load_state_dict(ema.state_dict()), "load_state_dict"),
            (lambda: collage.load_high_precision_state_dict(model, opt, full), "load_high_precision_state_dict"),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=rf"^{what}\(\) inside averaged\(\): the model has the average now"):
                act()
    assert_same_planes(state_of(model, opt), before)
    assert_same_planes(collage.high_precision_state_dict(model, opt), full)
    assert not edits.LENT
    step(model, opt, 9)  # says nothing of changed weights: warnings are errors


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_step_inside_averaged_is_refused():
    model, opt, ema = trained(lr=torch.tensor(1e-4))
    other = Net()
    others = collage.AdamW(other.named_parameters())
    step(other, others, 0)
    compiled, unrelated = torch.compile(opt.step, fullgraph=True), torch.compile(others.step, fullgraph=True)
    compiled()
    before = state_of(model, opt)
    with ema.averaged():
        unrelated()
        with pytest.raises(RuntimeError, match=r"step\(\) inside averaged\(\)"):
            compiled()
    assert_same_planes(state_of(model, opt), before)
    assert not edits.LENT_AT
    compiled()


def test_an_average_of_averages_is_not_begun():
    model, _, ema = trained()
    with ema.averaged(), pytest.raises(RuntimeError, match="beginning an average of 'mixed' inside averaged"):
        collage.EMA(model, 0.9)


def test_one_average_inside_another():
    """The innermost is seen, whatever the order in which they leave; then the weights are the own ones again."""
    model, opt, slow = trained(format="fp32")
    fast = collage.EMA(model, decay=0.1, optimizer=opt, format="fp32")
    for k in range(3, 6):
        step(model, opt, k)
        slow.update()
        fast.update()
    before = state_of(model, opt)

    def has(ema):
        exported = collage.high_precision_state_dict(model, opt)
        for name in ema.planes:
            assert_same_bits(name, exported[name], ema.value(name))
            assert_same_bits(name, model.get_parameter(name).detach(), ema.value(name).bfloat16())

    def fails_inside():
        with fast.averaged(), slow.averaged(), fast.averaged():
            has(fast)
            _ = 1 / 0

    with slow.averaged():
        with pytest.raises(ZeroDivisionError):
            fails_inside()
        has(slow)
    assert_same_planes(state_of(model, opt), before)
    first, second = slow.averaged(), fast.averaged()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as two callbacks do, one after the other
    has(fast)
    with pytest.raises(RuntimeError, match="inside averaged"):
        opt.step()
    second.__exit__(None, None, None)
    assert_same_planes(state_of(model, opt), before)
    assert not edits.LENT


def test_an_average_that_cannot_be_lent_leaves_nothing_behind():
    model, opt, ema = trained()
    before = state_of(model, opt)
    ema.planes["norm.bias"][1] = ema.planes["norm.bias"][1][:1].expand(2)  # of another shape than the weight
    with pytest.raises((RuntimeError, ValueError)), ema.averaged():
        pytest.fail("lent")
    assert_same_planes(state_of(model, opt), before)
    assert not edits.LENT
    assert not edits.LENT_AT


def test_what_is_written_inside_is_dropped_with_a_warning():
    model, opt, ema = trained()
    before = state_of(model, opt)

    def write():
        with ema.averaged(), torch.no_grad():
            model.norm.weight.fill_(7.0)
            model.mixed[0, 0] = 9.0  # a few are what Embedding(max_norm=) does: logged only

    with pytest.warns(RuntimeWarning, match=r"'norm.weight': 3 of its 3 weights were written to inside averaged\(\)"):
        write()
    assert_same_planes(state_of(model, opt), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alone(copied):
    model, opt, ema = trained()
    with ema.averaged():
        lent, _, other = copied((model, opt, ema))
    model2, opt2, ema2 = copied((model, opt, ema))
    for a, b, c in ((model, opt, ema), (model2, opt2, ema2)):
        step(a, b, 5)
        c.update()
    for name in ema.planes:
        assert_same_bits(name, ema2.value(name), ema.value(name))
    assert_same_bits("a copy of the average", lent.mixed.detach(), other.value("mixed").bfloat16())
    other.update()  # nobody stands in for the copy's weights
    model2.mixed.data.fill_(3.0)
    assert (model.mixed != 3.0).all()


def test_replaced_weights_are_followed():
    model = Net()
    ema = collage.EMA(model, decay=0.0, format="fp32")
    model.mixed.data = torch.full((3, 4), 2.0).bfloat16()
    ema.update()
    assert (ema.value("mixed") == 2.0).all()
    model.load_state_dict({k: torch.full_like(v, 3.0) for k, v in model.state_dict().items()}, assign=True)
    ema.update()
    assert (ema.value("mixed") == 3.0).all()
    with ema.averaged():
        assert (model.mixed == 3.0).all()
    model.float()
    ema.update()
    assert (ema.value("mixed") == 3.0).all()
    model.mixed = nn.Parameter(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"param 'mixed': has shape \(2, 4\), its average has shape \(3, 4\)"):
        ema.update()
    del model.mixed
    with pytest.raises(ValueError, match="param 'mixed': is not in the model any more"):
        ema.update()


def test_an_optimizer_of_replaced_weights_is_noticed():
    model, opt, ema = trained()
    model.mixed = nn.Parameter(model.mixed.detach().clone())
    for act in (ema.update, lambda: ema.averaged().__enter__(), ema.high_precision_state_dict):
        with pytest.raises(ValueError, match="param 'mixed': the optimizer has the one that the model had before"):
            act()
    assert ema.steps == 3
    opt.add_param_group({"params": [("new", model.mixed)]})
    ema.update()


def test_release_has_every_key_of_the_model_in_float32():
    model, _, ema = trained()
    model.norm.running_mean.add_(1.0)
    released = ema.high_precision_state_dict()
    assert list(released) == list(model.state_dict())
    for name, p in model.named_parameters():
        assert_same_bits(name, released[name], ema.value(name) if name in ema.planes else p.detach().float())
    assert_same_bits("buffer", released["norm.running_mean"], model.norm.running_mean)
    assert released["norm.num_batches_tracked"].dtype == torch.int64
    Net(torch.float32).load_state_dict(released, strict=True)
    assert_same_bits("tied", released["head.weight"], released["embed.weight"])
    model.register_state_dict_post_hook(lambda module, state, *_: state.update(mixed=state["mixed"] + 0))
    with pytest.raises(ValueError, match="other tensors in the place of 'mixed'"):
        ema.high_precision_state_dict()


def test_missing_and_unexpected_averages_are_named():
    ema = collage.EMA(Net(), 0.9)
    saved = ema.state_dict()
    saved["planes"]["no.such"] = saved["planes"].pop("mixed")
    with pytest.raises(ValueError, match=r"missing averages \['mixed'\], unexpected \['no.such'\]"):
        collage.EMA(Net(), 0.9).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"another .* format than this average's 'fp32': \[\(\(3, 4\), 'bfloat16'\)"):
        collage.EMA(Net(), 0.9, format="fp32").load_state_dict(ema.state_dict())


@pytest.mark.parametrize("format", ["bf16x2:sr", "fp32"])
def test_walking_in_pieces_changes_no_bit(format, monkeypatch):
    """Strided weights and empty ones too."""

    def run():
        model, _, ema = trained(format=format, steps=2)
        model.empty = nn.Parameter(torch.zeros(0, 3).bfloat16())
        model.scalar = nn.Parameter(torch.tensor(1.5).bfloat16())
        ema.update()
        return {f"{name} {k}": p for name, planes in ema.planes.items() for k, p in enumerate(planes)}

    want = run()
    monkeypatch.setattr(layout, "PIECE", 2)
    assert_same_planes(run(), want)
    assert want["mixed 0"].stride() == (1, 3)


def test_ambient_defaults_do_not_matter():
    want = trained(format="fp32")[2]
    with ExitStack() as ambient:
        ambient.callback(torch.set_default_dtype, torch.get_default_dtype())
        model, opt, ema = trained(format="fp32", steps=0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            for k in range(3):
                with torch.device("cpu"):
                    torch.set_default_dtype(torch.float32)
                    step(model, opt, k)
                    torch.set_default_dtype(torch.bfloat16)
                ema.update()
            with ema.averaged():
                assert_same_bits("visible", model.mixed.detach(), want.value("mixed").bfloat16())
    for name in want.planes:
        assert_same_bits(name, ema.value(name), want.value(name))
