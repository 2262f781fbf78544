"""Weight averages: the same problem as the weights, solved by the same three verbs."""

import pytest
import torch
from oracle import assert_same_bits
from torch import nn

import collage


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
    with pytest.raises(ValueError, match="'w' is missing, or of another shape"):
        collage.EMA(model_of(n=3), decay=0.9).load_state_dict(collage.EMA(model_of(n=4), decay=0.9).state_dict())
    with pytest.raises(ValueError, match=r"state_dict: \['steps', 'planes'\] missing"):
        collage.EMA(model_of(), decay=0.9).load_state_dict({})
