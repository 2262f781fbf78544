"""Gradients used in backward: the bits of a step after it, in every combination that is offered."""

import copy
import math

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import collage
from collage.gradients.clip import coefficient, scale_, squares_of, total

STEPS = 4


class Net(nn.Module):
    """Large and small weights, one tied, one that some steps do not use, one in float32."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9000, 64)  # more than a megabyte in bf16
        self.mix = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.rare = nn.Linear(64, 64, bias=False)
        self.dropout = nn.Dropout(dropout)
        collage.to_bf16(self)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens, rare=True):
        x = self.norm(self.dropout(checkpoint(self.mix, self.embed(tokens), use_reentrant=False)))
        x = self.rare(x) if rare else x
        return (x @ self.embed.weight.T).float() * self.scale


def loss_of(model, step, micro=0):
    tokens = torch.randint(9000, (2, 8), generator=torch.Generator().manual_seed(100 * step + micro))
    return nn.functional.cross_entropy(model(tokens, rare=step != 1).flatten(0, 1), tokens.flatten())


def make(strategy="collage-plus", optimizer=collage.AdamW, dropout=0.0, **settings):
    model = Net(dropout)
    named = list(model.named_parameters())
    groups = [{"params": named[:3], "lr": 3e-3}, {"params": named[3:], "weight_decay": 0.0}]
    return model, optimizer(groups, lr=1e-3, weight_decay=0.1, strategy=strategy, **settings)


def assert_same(name, got, want):
    (model, opt), (other, control) = got, want
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_same_bits(f"{name}: {key}", p.detach(), q.detach())
        assert opt.state[p].keys() == control.state[q].keys()
        for plane, value in opt.state[p].items():
            assert_same_bits(f"{name}: {key} {plane}", value, control.state[q][plane])


def run(model, opt, released=None, micro=1, schedule=True, clip=None):
    """Training as a user would write it; released: what the loop is told of."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1.0 / (1 + k))
    for step in range(STEPS):
        for k in range(micro):
            if released is not None and k < micro - 1:
                with released.paused():
                    loss_of(model, step, k).backward()
            else:
                loss_of(model, step, k).backward()
        if released is not None:
            assert all(p.grad is None for p in model.parameters() if p.numel() > 2**19)
        elif clip is not None:
            clip(model, step)
        opt.step()
        if schedule:
            scheduler.step()
        opt.zero_grad()


@pytest.mark.parametrize("strategy", ["bf16", "collage-plus", "collage-plus-sr", "collage-exact", "collage-8bit"])
@pytest.mark.parametrize("micro", [1, 3])
def test_release_has_the_bits_of_a_step(strategy, micro):
    got, want = make(strategy), make(strategy)
    run(*got, released=collage.release_gradients(*got), micro=micro)
    run(*want, micro=micro)
    assert_same(strategy, got, want)
    assert all(p.grad is None for p in got[0].parameters())


@pytest.mark.parametrize("optimizer", [collage.Adam, collage.SGD, collage.Lion])
def test_release_with_other_rules(optimizer):
    got, want = make(optimizer=optimizer), make(optimizer=optimizer)
    run(*got, released=collage.release_gradients(*got))
    run(*want)
    assert_same(optimizer.__name__, got, want)


def test_release_can_begin_and_end_between_steps():
    got, want = make("collage-plus-sr"), make("collage-plus-sr")
    for k in range(3):
        released = collage.release_gradients(*got) if k == 1 else None
        run(*got, released=released, schedule=False)
        run(*want, schedule=False)
        if released:
            released.remove()
    assert_same("on and off", got, want)


def test_a_monitor_sees_the_same():
    got, want = make("collage-light"), make("collage-light")
    monitors = [collage.monitor(opt, every=2, shadow=64, strategies=["bf16"]) for _, opt in (got, want)]
    run(*got, released=collage.release_gradients(*got))
    run(*want)
    assert_same("monitored", got, want)
    mine, control = (monitor.report() for monitor in monitors)
    assert mine.by_parameter == control.by_parameter
    assert mine.total.nonzero == control.total.nonzero > 0
    assert mine.total.steps == control.total.steps == 2
    # sums of the same numbers, parameter by parameter or in another order
    assert mine.total.edq == pytest.approx(control.total.edq, rel=1e-12)
    assert mine.beside["bf16"].lost == pytest.approx(control.beside["bf16"].lost, rel=1e-12)


def test_closures():
    got, want = make(), make()
    collage.release_gradients(*got)
    for model, opt in (got, want):
        for step in range(2):

            def closure(model=model, opt=opt, step=step):
                opt.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            assert opt.step(closure) > 0
    assert_same("closure", got, want)


def test_a_clip_by_the_previous_norm():
    got, want = make(), make()
    released = collage.release_gradients(*got, max_norm=0.5)
    norms = []  # in float64, as a release keeps them

    def clipped(model, step):
        params = [p for p in model.parameters() if p.grad is not None]
        norm = total(squares_of(params))
        scale_([p.grad for p in params], coefficient(norms[-1], 0.5) if norms else torch.ones(()))
        norms.append(norm)

    run(*got, released=released)
    run(*want, clip=clipped)
    assert_same("previous", got, want)
    assert released.norm == norms[-1]
    assert norms[-1] > 0.5, "nothing was clipped"


def passes(model, opt, released, micro=1):
    for step in range(STEPS):
        for _ in released.passes():
            for k in range(micro - 1):
                with released.paused():
                    loss_of(model, step, k).backward()
            loss_of(model, step, micro - 1).backward()
        opt.step()


@pytest.mark.parametrize("micro", [1, 2])
def test_an_exact_clip_has_the_bits_of_clip_grad_norm(micro):
    got, want = make("collage-plus-sr", dropout=0.1), make("collage-plus-sr", dropout=0.1)
    torch.manual_seed(7)
    passes(*got, collage.release_gradients(*got, max_norm=0.5, clip="exact"), micro)
    torch.manual_seed(7)
    run(*want, micro=micro, schedule=False, clip=lambda model, _: collage.clip_grad_norm_(model.parameters(), 0.5))
    assert_same("exact", got, want)


def test_the_previous_norm_is_in_the_checkpoint(tmp_path):
    got, want = make(), make()
    run(*want, released=collage.release_gradients(*want, max_norm=0.5), schedule=False)
    run(*want, schedule=False)
    run(*got, released=collage.release_gradients(*got, max_norm=0.5), schedule=False)
    torch.save([got[0].state_dict(), got[1].state_dict()], tmp_path / "saved.pt")
    again = make()
    released = collage.release_gradients(*again, max_norm=0.5)
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    again[0].load_state_dict(weights)
    again[1].load_state_dict(state)
    run(*again, released=released, schedule=False)
    assert_same("resumed", again, want)


def test_an_exact_clip_skips_steps_that_are_not_finite():
    model, opt = make(skip_nonfinite=True)
    released = collage.release_gradients(model, opt, clip="exact")
    monitor = collage.monitor(opt, every=1)
    before = copy.deepcopy(model.state_dict())
    for bad in (True, False):
        for _ in released.passes():
            (loss_of(model, 0) + (math.nan * model.norm.bias.sum() if bad else 0.0)).backward()
        opt.step()
        if bad:
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            assert opt.skipped_steps == 1
            assert not any(opt.state.values())
    assert opt.skipped_steps == 1
    report = monitor.report()
    assert {name for name, quality in report.by_parameter.items() if quality.skipped} == {"norm.bias"}
    assert report.total.skipped == 1
    assert report.total.steps == 1


def test_what_release_refuses():
    model, opt = make()
    with pytest.raises(ValueError, match="clip: unknown 'both'; known: previous, exact"):
        collage.release_gradients(model, opt, clip="both")
    with pytest.raises(ValueError, match="max_norm: needs a number >= 0"):
        collage.release_gradients(model, opt, max_norm=-1.0)
    with pytest.raises(TypeError, match=r"optimizer: needs one of this package"):
        collage.release_gradients(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="skip_nonfinite: in one pass"):
        collage.release_gradients(*make(skip_nonfinite=True))
    released = collage.release_gradients(model, opt)
    with pytest.raises(RuntimeError, match=r"released already; opt.in_backward.remove\(\)"):
        collage.release_gradients(model, opt)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"param '.*': it has a gradient, and gets another .*paused\(\)"):
        loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="give max_norm to release_gradients"):
        collage.clip_grad_norm_(model.parameters(), 1.0)
    opt.zero_grad()  # of the second backward
    opt.step()
    opt.param_groups[0]["skip_nonfinite"] = True  # later, as by a loaded state
    with pytest.raises(ValueError, match="skip_nonfinite: in one pass"):
        loss_of(model, 0).backward()
    opt.param_groups[0]["skip_nonfinite"] = False
    opt.zero_grad()
    opt.grad_scale = torch.ones(())
    with pytest.raises(RuntimeError, match="GradScaler: released gradients"):
        opt.step()
    del opt.grad_scale
    released.remove()
    with pytest.raises(TypeError, match="call release_gradients once for each"):
        collage.release_gradients(model, [opt, opt])
    with pytest.raises(ValueError, match="max_norm: needs a number >= 0, got 'x'"):
        collage.release_gradients(model, opt, max_norm="x")


def test_frozen_parameters_and_removals_in_any_order():
    got, want = make(), make()
    for model, _ in (got, want):
        model.mix.requires_grad_(False)
    stale = collage.release_gradients(*got, max_norm=0.5)
    stale.remove()
    assert "released_norm" not in got[1].param_groups[0]
    released = collage.release_gradients(*got)
    stale.remove()  # of an earlier one: the later goes on
    run(*got, released=released)
    run(*want)
    assert_same("frozen", got, want)


def test_an_exact_clip_of_gradients_that_are_all_there():
    """Kept by `paused`, by DDP, or set by hand, as torch.distributed.checkpoint does to make a state."""
    got, want = make(), make()
    released = collage.release_gradients(*got, max_norm=0.5, clip="exact")
    for step in range(STEPS):
        with released.paused():
            loss_of(got[0], step).backward()
        loss_of(want[0], step).backward()
        collage.clip_grad_norm_(want[0].parameters(), 0.5)
        for _, opt in (got, want):
            opt.step()
        assert all(p.grad is None for p in got[0].parameters())
        want[1].zero_grad()
    assert_same("all there", got, want)


def test_a_first_pass_that_was_broken_off_leaves_nothing():
    got, want = make(), make()
    released, other = (collage.release_gradients(*pair, max_norm=0.5, clip="exact") for pair in (got, want))
    for _ in released.passes():
        loss_of(got[0], 3).backward()
        break
    got[1].zero_grad()
    passes(*got, released)
    passes(*want, other)
    assert_same("begun anew", got, want)


def test_an_exact_clip_looks_at_the_groups_that_ask():
    w, v = (torch.nn.Parameter(torch.ones(4).bfloat16()) for _ in range(2))
    net = nn.Module()
    net.w, net.v = w, v
    opt = collage.SGD([{"params": [("w", w)], "skip_nonfinite": True}, {"params": [("v", v)]}], lr=0.1)
    released = collage.release_gradients(net, opt, clip="exact")
    for bad, skipped in ((v, 0), (w, 1)):
        for _ in released.passes():
            (w.sum() + v.sum() + math.inf * bad.sum()).backward()
        opt.step()
        assert opt.skipped_steps == skipped
        opt.state.clear()


def test_an_exact_clip_needs_its_passes():
    model, opt = make()
    released = collage.release_gradients(model, opt, max_norm=1.0, clip="exact")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"needs two passes"):
        loss_of(model, 0).backward()
    opt.zero_grad()
    for _ in released.passes():
        loss_of(model, 0).backward()
        break
    with pytest.raises(RuntimeError, match=r"after one pass of two"):
        opt.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_wrong_gradient_is_named():
    model = collage.to_bf16(nn.Embedding(4, 2, sparse=True))
    opt = collage.SGD(model.named_parameters(), lr=0.1)
    collage.release_gradients(model, opt)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"param 'weight': its gradient is sparse"):
        opt.step()


@pytest.mark.parametrize("settings", [{}, {"max_norm": 1.0}, {"max_norm": 1.0, "clip": "exact"}])
def test_the_step_that_makes_states_to_load_into(settings):
    """torch.distributed.checkpoint makes it with gradients of zero and lr 0, which arrive through no backward."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, opt = make()
    before = copy.deepcopy(model.state_dict())
    collage.release_gradients(model, opt, **settings)
    assert get_optimizer_state_dict(model, opt)["state"].keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
