"""Clipping, accumulating and skipping: against float64, against torch, and where it does not change a bit."""

import copy
import gc
import math
import weakref
from functools import partial

import pytest
import torch
from helpers import REGIMES, assert_same_bits, numbers
from torch import nn

import collage
from collage.optimizers.guarded import Guarded

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def with_gradients(*grads):
    params = []
    for grad in grads:
        params.append(nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)))
        params[-1].grad = grad.clone()
    return params


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_float64(dtype, p):
    grads = [numbers("normal", n, seed=n).to(dtype) for n in (0, 1, 7, 5000)]
    grads[-1] = grads[-1].view(50, 100).T
    whole = torch.cat([g.double().flatten() for g in grads])
    want = torch.linalg.vector_norm(whole, p).float()
    got = collage.clip_grad_norm_(with_gradients(*grads), 1e9, norm_type=p)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2**-23, atol=0.0)  # a float64 sum in another order, rounded once


def test_torch_rounds_the_norms_of_bf16_gradients():
    """The reason for a clip of our own: if torch mends it, the docs have to say so."""
    params = with_gradients(numbers("normal", 5000, seed=1).bfloat16())
    exact = params[0].grad.double().norm()
    assert abs(nn.utils.get_total_norm([params[0].grad]).double() / exact - 1) > 1e-4
    assert abs(collage.clip_grad_norm_(params, 1e9).double() / exact - 1) < 2**-24


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_multiplied_in_float32_and_rounded_once(dtype):
    grads = [numbers("normal", n, seed=n).to(dtype) for n in (3, 1000)]
    params = with_gradients(*grads)
    norm = collage.clip_grad_norm_(params, 0.75).double()
    # the norm was rounded to float32 only on its way out, so the factor is within an ulp of this one
    factor = (0.75 / (norm + 1e-6)).float()
    for grad, param in zip(grads, params, strict=True):
        candidates = [
            (grad.float() * f).to(dtype)
            for f in (factor, torch.nextafter(factor, factor * 2), torch.nextafter(factor, factor * 0))
        ]
        assert any(torch.equal(param.grad, candidate) for candidate in candidates)


def test_a_norm_that_is_small_enough_changes_nothing():
    grads = [numbers("normal", 100, seed=1).bfloat16()]
    params = with_gradients(*grads)
    version = params[0].grad._version
    collage.clip_grad_norm_(params, 1e9)
    assert_same_bits("gradient", params[0].grad, grads[0])
    assert params[0].grad._version == version


def test_mixed_dtypes_one_tensor_and_none():
    params = with_gradients(torch.tensor([3.0]), torch.tensor([4.0]).bfloat16(), torch.tensor([12.0]).half())
    params.append(nn.Parameter(torch.ones(3)))
    assert collage.clip_grad_norm_(iter(params), 1.0) == 13.0
    assert collage.clip_grad_norm_(params[0], 1.0) < 1.0
    assert collage.clip_grad_norm_([], 1.0) == 0.0
    assert collage.clip_grad_norm_([nn.Parameter(torch.ones(1, dtype=torch.float64))], 1.0) == 0.0
    wide = with_gradients(torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert collage.clip_grad_norm_(wide, 5.0) == 5.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norms_that_are_not_finite(bad):
    params = with_gradients(torch.tensor([1.0, bad]).bfloat16())
    before = params[0].grad.clone()
    with pytest.raises(RuntimeError, match=r"norm of order 2.0 .* (nan|inf), so it cannot be clipped.*skip_nonfinite"):
        collage.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert_same_bits("gradient", params[0].grad, before)
    assert not collage.clip_grad_norm_(params, 1.0).isfinite()


def test_what_clipping_refuses():
    with pytest.raises(TypeError, match=r"parameters: got a module; give model.parameters\(\)"):
        collage.clip_grad_norm_(nn.Linear(1, 1), 1.0)
    for max_norm in (-1.0, math.nan, None, "a"):
        with pytest.raises(ValueError, match="max_norm: needs a number >= 0"):
            collage.clip_grad_norm_([], max_norm)
    with pytest.raises(ValueError, match="norm_type: needs a number > 0"):
        collage.clip_grad_norm_([], 1.0, norm_type=0)
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse; use a dense one"):
        collage.clip_grad_norm_(sparse.parameters(), 1.0)


def model():
    torch.manual_seed(0)
    return collage.to_bf16(nn.Sequential(nn.Linear(30, 20), nn.LayerNorm(20), nn.Linear(20, 1)))


def loss(net, micro):
    x = torch.randn(8, 30, generator=torch.Generator().manual_seed(micro)).bfloat16()
    return net(x).float().square().mean()


def micro_gradients(net, micros):
    """Each micro-batch's gradients, as backward rounds them."""
    for micro in micros:
        alone = copy.deepcopy(net)
        loss(alone, micro).backward()
        yield [p.grad for p in alone.parameters()]


def test_micro_batches_are_added_up_in_float32():
    net, want = model(), [torch.zeros(p.shape) for p in model().parameters()]
    for grads in micro_gradients(net, range(64)):
        for total, grad in zip(want, grads, strict=True):
            total += grad.float()
    accumulator = collage.GradientAccumulator(net)
    for _ in range(2):  # the sums are used again
        for micro in range(64):
            with accumulator:
                loss(net, micro).backward()
            assert all(p.grad is None for p in net.parameters())
        accumulator.finish()
        for (name, p), total in zip(net.named_parameters(), want, strict=True):
            assert_same_bits(name, p.grad, total)
        net.zero_grad()


def test_sums_that_are_not_zeroed_go_on():
    net = model()
    accumulator = collage.GradientAccumulator(net)
    for micros in ((0, 1), (2,)):  # without zero_grad between: as autograd, it adds
        for micro in micros:
            with accumulator:
                loss(net, micro).backward()
        accumulator.finish()
    again = model()
    other = collage.GradientAccumulator(again)
    for micro in range(3):
        loss(again, micro).backward()  # outside of the context it works too
    other.finish()
    for (name, p), q in zip(net.named_parameters(), again.parameters(), strict=True):
        assert_same_bits(name, p.grad, q.grad)


def test_an_optimizer_takes_the_sums_released_or_not():
    results = []
    for release in (False, True):
        net = model()
        opt = collage.AdamW(net.named_parameters(), lr=1e-2)
        released = collage.release_gradients(net, opt) if release else None
        accumulator = collage.GradientAccumulator(net)
        for step in range(3):
            for micro in range(4):
                with accumulator:
                    loss(net, 4 * step + micro).backward()
            accumulator.finish()
            if released is None:
                collage.clip_grad_norm_(net.parameters(), math.inf)
            opt.step()
            opt.zero_grad()
        results.append(
            [p.detach() for p in net.parameters()] + [x for p in net.parameters() for x in opt.state[p].values()]
        )
    for k, (one, other) in enumerate(zip(*results, strict=True)):
        assert_same_bits(str(k), one, other)


def test_an_accumulator_leaves_as_it_came():
    net = model()
    accumulator = collage.GradientAccumulator(net)
    with accumulator:
        loss(net, 1).backward()
    collage.GradientAccumulator(net).remove()  # takes over from the first
    accumulator.remove()
    loss(net, 0).backward()
    assert {p.grad.dtype for p in net.parameters()} == {torch.bfloat16}
    assert {p.grad_dtype for p in net.parameters()} == {torch.bfloat16}


def test_an_accumulator_that_is_dropped_takes_nothing():
    net = model()
    opt = collage.AdamW(net.named_parameters())
    collage.release_gradients(net, opt)
    accumulator = collage.GradientAccumulator(net)
    del accumulator
    loss(net, 0).backward()
    opt.step()
    assert all(p.grad is None for p in net.parameters())
    assert {int(opt.state[p]["step"]) for p in net.parameters()} == {1}


def test_a_step_can_be_begun_anew():
    nets = [model(), model()]
    accumulators = [collage.GradientAccumulator(net) for net in nets]
    with accumulators[0]:
        loss(nets[0], 5).backward()
    accumulators[0].reset()
    for net, accumulator in zip(nets, accumulators, strict=True):
        with accumulator:
            loss(net, 0).backward()
        accumulator.finish()
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert_same_bits(name, p.grad, q.grad)


def test_what_an_accumulator_takes():
    sparse = collage.to_bf16(nn.Embedding(4, 2, sparse=True))
    accumulator = collage.GradientAccumulator(sparse)
    with pytest.raises(TypeError, match="sparse; use a dense one"), accumulator:
        sparse(torch.tensor([1])).sum().backward()
    wide = nn.Linear(2, 1, dtype=torch.float64)
    accumulator = collage.GradientAccumulator(wide)
    for _ in range(3):
        with accumulator:
            (wide(torch.ones(1, 2, dtype=torch.float64)) / 3).sum().backward()
    accumulator.finish()
    third = torch.tensor(1 / 3, dtype=torch.float64)
    assert wide.bias.grad.dtype == torch.float64
    assert wide.bias.grad.item() == (third + third + third).item()


def test_an_old_torch_is_named(monkeypatch):
    monkeypatch.setattr("collage.gradients.accumulate.Tensor", object)
    with pytest.raises(RuntimeError, match=r"need a torch with Tensor.grad_dtype, got"):
        collage.GradientAccumulator(model())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "optimizer",
    [collage.AdamW, collage.Adam, collage.SGD, collage.Lion, partial(collage.Muon, adjust_lr_fn="match_rms_adamw")],
)
def test_a_step_that_is_not_finite_changes_nothing(optimizer, backend):
    net, control = model(), model()
    opt = optimizer(net.named_parameters(), lr=1e-2, skip_nonfinite=True, backend=backend)
    plain = optimizer(control.named_parameters(), lr=1e-2, backend=backend)
    monitor = collage.monitor(opt, every=1)
    for step in range(4):
        loss(net, step).backward()
        if step in (0, 2):  # the first step too, where there is no state yet
            net[1].weight.grad[3] = torch.nan if step else -torch.inf
        else:
            loss(control, step).backward()
            plain.step()
        opt.step()
        if step == 0:
            assert not any(opt.state.values())
        for made in (net, control):
            made.zero_grad()
        for (name, p), q in zip(net.named_parameters(), control.parameters(), strict=True):
            assert_same_bits(name, p.detach(), q.detach())
            assert len(opt.state[p]) == len(plain.state[q])
            for key, value in plain.state[q].items():
                assert_same_bits(f"{name} {key}", opt.state[p][key], value)
    assert opt.skipped_steps == 2
    report = monitor.report()
    assert report.total.skipped == report.by_parameter["1.weight"].skipped == 2
    assert max(own.skipped for own in report.by_group) == 2  # Muon's norm is in another group than its matrices
    assert report.total.steps == 2
    assert [name for name, quality in report.by_parameter.items() if quality.skipped] == ["1.weight"]


def test_on_a_gpu_the_step_itself_looks(monkeypatch):
    """As there, on tensors of the CPU: Triton's interpreter reads the finding, and the host never does."""
    monkeypatch.setattr(Guarded, "_looks_in_the_step", lambda *_: True)
    net = model()
    opt = collage.AdamW(net.named_parameters(), skip_nonfinite=True, capturable=True, backend="triton")
    for bad in (False, True, False):
        before = [p.detach().clone() for p in net.parameters()]
        loss(net, 0).backward()
        if bad:
            net[0].bias.grad[0] = torch.nan
        opt.step()
        opt.zero_grad()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)) == bad
    assert opt.skipped_steps == 1
    assert {int(opt.state[p]["step"]) for p in net.parameters()} == {2}


@pytest.mark.parametrize("regime", REGIMES)
def test_only_what_is_not_finite_is_skipped(regime):
    for dtype in (torch.bfloat16, torch.float32):
        grad = numbers(regime, 2000, seed=3).to(dtype)
        w = nn.Parameter(torch.ones(2000).bfloat16())
        w.grad_dtype = dtype
        w.grad = grad
        opt = collage.SGD([("w", w)], lr=0.0, skip_nonfinite=True)
        opt.step()
        assert opt.skipped_steps == int(not grad.isfinite().all())


def test_groups_that_are_not_asked_for_are_not_looked_at():
    a, b = (nn.Parameter(torch.ones(4).bfloat16()) for _ in range(2))
    opt = collage.SGD([{"params": [("a", a)]}, {"params": [("b", b)], "skip_nonfinite": True}], lr=0.1)
    for bad, skipped in ((a, 0), (b, 1)):
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        bad.grad[0] = torch.inf
        before = a.detach().clone()
        opt.step()
        assert opt.skipped_steps == skipped
        assert torch.equal(a, before) == bool(skipped)


def test_skip_nonfinite_survives_a_checkpoint_and_is_checked():
    w = nn.Parameter(torch.ones(4).bfloat16())
    opt = collage.AdamW([("w", w)], skip_nonfinite=True)
    other = collage.AdamW([("w", nn.Parameter(torch.ones(4).bfloat16()))])
    other.load_state_dict(opt.state_dict())
    assert other.skips_nonfinite
    with pytest.raises(TypeError, match="skip_nonfinite: needs True or False, got 1"):
        collage.AdamW([("w", w)], skip_nonfinite=1)
    saved = collage.AdamW([("w", w)]).state_dict()
    for group in saved["param_groups"]:
        del group["skip_nonfinite"]  # saved before there was one
    opt.load_state_dict(saved)
    assert opt.skips_nonfinite


def test_a_compiled_step_says_what_it_cannot():
    w = nn.Parameter(torch.ones(4).bfloat16())
    w.grad = torch.ones_like(w)
    for opt, what in (
        (collage.AdamW([("w", w)], skip_nonfinite=True), "skip_nonfinite: "),
        (collage.AdamW([("w", w)]), "release_gradients: "),
    ):
        if what.startswith("release"):
            net = nn.Module()
            net.w = w
            collage.release_gradients(net, opt)
        with pytest.raises(Exception, match=what):
            torch.compile(opt.step, backend="eager", fullgraph=True)()


@pytest.mark.parametrize("make", [collage.GradientAccumulator, collage.release_gradients])
def test_a_model_is_freed(make):
    net = model()
    opt = collage.AdamW(net.named_parameters())
    made = make(*((net, opt) if make is collage.release_gradients else (net,)))
    weight = weakref.ref(net[0].weight)
    del net, opt, made
    gc.collect()
    assert weight() is None


def test_under_accelerate():
    from accelerate import Accelerator

    results = []
    for prepared in (False, True):
        net = model()
        opt = collage.AdamW(net.named_parameters(), lr=1e-2)
        accelerator = Accelerator(gradient_accumulation_steps=4)
        made, stepper = accelerator.prepare(net, opt) if prepared else (net, opt)
        accumulator = collage.GradientAccumulator(made)
        for micro in range(8):
            if prepared:
                with accelerator.accumulate(made), accumulator:
                    accelerator.backward(loss(made, micro))
                    if accelerator.sync_gradients:
                        accumulator.finish()
                        collage.clip_grad_norm_(made.parameters(), 0.1)
                    stepper.step()
                    stepper.zero_grad()
            else:
                with accumulator:
                    (loss(made, micro) / 4).backward()
                if micro % 4 == 3:
                    accumulator.finish()
                    collage.clip_grad_norm_(made.parameters(), 0.1)
                    opt.step()
                    opt.zero_grad()
        results.append([p.detach() for p in net.parameters()])
    for k, (one, other) in enumerate(zip(*results, strict=True)):
        assert_same_bits(str(k), one, other)
