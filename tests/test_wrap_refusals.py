"""What `collage.wrap` refuses: in one sentence, with what to do instead, before anything is changed."""

import copy

import prodigyopt
import pytest
import pytorch_optimizer
import torch
from helpers import assert_same_bits
from torch import nn
from wrapped import assert_same_run, give, go_on, planes, weights

import collage

ALL_AT_ONCE = r"^wrap: {} needs all of its parameters at once.*use one that updates each by itself.*collage\.AdamW"
NO_STEP = r"^wrap: {} cannot make a step of its own on cpu.*gradients alone, no closure"


class Clips(torch.optim.SGD):
    """Its gradients are clipped by the norm of all of them, which no small one reaches."""

    def step(self):
        params = self.param_groups[0]["params"]
        nn.utils.clip_grad_norm_(params, 1e4)
        super().step()


class Draws(torch.optim.SGD):
    """Its update has noise."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.grad.add_(torch.randn_like(p))
        super().step()


class Holds(torch.optim.SGD):
    """It keeps its parameters in a list of its own, and changes those."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.mine = list(self.param_groups[0]["params"])

    def step(self):
        for p in self.mine:
            p.data.zero_()


class OnCuda(torch.optim.AdamW):
    """Its kernels are for one kind of device, as some fused ones' are."""

    def step(self):
        raise RuntimeError("fused=True needs CUDA tensors")


REFUSED = {
    "fused for CUDA": (OnCuda, {}, TypeError, "^wrap: OnCuda .* on cpu: RuntimeError: fused=True needs CUDA"),
    "LBFGS": (torch.optim.LBFGS, {}, TypeError, NO_STEP.format("LBFGS")),
    "SparseAdam": (torch.optim.SparseAdam, {}, TypeError, NO_STEP.format("SparseAdam")),
    "Prodigy": (prodigyopt.Prodigy, {}, ValueError, ALL_AT_ONCE.format("Prodigy")),
    "Prodigy of pytorch_optimizer": (pytorch_optimizer.Prodigy, {}, ValueError, ALL_AT_ONCE.format("Prodigy")),
    "DAdaptAdam": (pytorch_optimizer.DAdaptAdam, {}, ValueError, ALL_AT_ONCE.format("DAdaptAdam")),
    "SAM": (
        pytorch_optimizer.SAM, {"base_optimizer": torch.optim.SGD, "lr": 0.1}, TypeError,
        "'base_optimizer' is an optimizer; wrap that one",
    ),
    "Adan that clips": (pytorch_optimizer.Adan, {"max_grad_norm": 100.0}, ValueError, ALL_AT_ONCE.format("Adan")),
    "clips large ones": (Clips, {}, ValueError, ALL_AT_ONCE.format("Clips")),
    "draws": (Draws, {}, ValueError, "Draws .*draws random numbers"),
    "holds its parameters": (Holds, {}, TypeError, "'mine' has parameters beside those of its groups"),
    "ours": (collage.AdamW, {}, TypeError, "^wrap: AdamW keeps its weights in a strategy's formats already; use it"),
    "a module": (nn.Linear, {}, TypeError, r"^wrap: needs a torch\.optim\.Optimizer, or a class of one, got Linear"),
    "what is missing": (torch.optim.Adam, {"momentum": 0.9}, TypeError, "unexpected keyword argument 'momentum'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_wrapped_says_so_and_nothing_is_changed(name):
    kind, settings, error, match = REFUSED[name]
    params = weights()
    give(params, 0)
    before = [p.detach().clone() for p in params]
    drawn = torch.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        collage.wrap(kind, params, **settings)
    assert "\n" not in str(caught.value)
    assert_same_bits("random state", torch.get_rng_state(), drawn)
    for k, (p, x) in enumerate(zip(params, before, strict=True)):
        assert_same_bits(f"weight {k}", p.detach(), x)
        assert p.grad is not None


@pytest.mark.parametrize("kind", [pytorch_optimizer.Lookahead, torch.optim.LBFGS, Holds])
def test_a_constructed_one_that_is_refused_is_as_it_was(kind):
    params = weights()
    inner = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    go_on(params, inner, 0, 2, scheduled=False)
    base = kind(inner) if kind is pytorch_optimizer.Lookahead else kind(params)
    weights_before = [p.detach().clone() for p in params]
    states, settings = copy.deepcopy(list(base.state.values())), copy.deepcopy(base.param_groups)
    with pytest.raises(TypeError):
        collage.wrap(base)
    assert str(list(base.state.values())) == str(states)
    assert str(base.param_groups) == str(settings)
    for k, (p, x) in enumerate(zip(params, weights_before, strict=True)):
        assert_same_bits(f"weight {k}", p.detach(), x)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"strategy": "kahan"}, ValueError, "^strategy: 'kahan' adds increments in bfloat16 arithmetic, and Rprop"),
        ({"strategy": "paper-plus"}, ValueError, "^strategy: 'paper-plus' .* use 'collage-plus'"),
        ({"strategy": "collage"}, ValueError, "^strategy: unknown 'collage'; known: bf16"),
        ({"states": {"prev": "fp33"}}, ValueError, r"^states\['prev'\]: unknown format 'fp33'; known: fp32"),
        ({"states": {"prev": "bf16+kahan"}}, ValueError, r"^states\['prev'\]: 'bf16\+kahan' holds what grows"),
        ({"states": {"z": "fp32"}}, ValueError, r"^states\['z'\]: .*no such state; it keeps step, prev, step_size"),
        ({"states": ["prev"]}, TypeError, "^states: needs name -> format"),
        ({"bucket_mb": 0}, ValueError, "^bucket_mb: needs a number > 0, got 0"),
        ({"bucket_mb": "64"}, ValueError, "^bucket_mb: needs a number > 0, got '64'"),
        ({"backend": "cuda"}, ValueError, "^backend"),
        ({"seed": -1}, ValueError, "^seed"),
        ({"skip_nonfinite": 1}, TypeError, "^skip_nonfinite"),
    ],
)
def test_settings_that_are_wrong_are_named_before_anything_is_cast(settings, error, match):
    params = weights(dtype=torch.float32)
    base = torch.optim.Rprop(params)
    groups = base.param_groups
    with pytest.raises(error, match=match):
        collage.wrap(base, cast=True, **settings)
    assert base.param_groups is groups
    assert {p.dtype for p in params} == {torch.float32}


def test_a_constructed_one_takes_no_arguments():
    params = weights()
    with pytest.raises(TypeError, match=r"^wrap: lr: the optimizer is constructed already; give its class to give it"):
        collage.wrap(torch.optim.SGD(params), lr=0.1)


def test_a_group_that_cannot_be_added_is_not():
    params = weights(((8, 8), (4, 4), (6,)))
    opt = collage.wrap(torch.optim.Muon, params[:1])
    for group, error in (
        ({"params": params[1:2], "strategy": "kahan"}, ValueError),
        ({"params": params[2:]}, TypeError),
        ({"params": params[1:2], "backend": "cpu"}, ValueError),
    ):
        with pytest.raises(error):
            opt.add_param_group(group)
        assert len(opt.param_groups) == len(opt.base.param_groups) == 1
    opt.add_param_group({"params": params[1:2]})
    give(params[:2], 0)
    opt.step()
    assert {k.split(".")[0] for k, _ in planes(opt) if "momentum" in k} == {"0", "1"}


class Varies(torch.optim.SGD):
    """What it keeps in a group depends on its parameters, but only of some numbers."""

    def step(self):
        for group in self.param_groups:
            largest = max(float(p.grad.abs().max()) for p in group["params"] if p.grad is not None)
            group["seen"] = largest if largest == 12288.0 else 0.0
        super().step()


def test_one_that_is_found_out_in_a_step_says_what_is_left_of_it():
    params = weights()
    opt = collage.wrap(Varies, params, lr=0.1, momentum=0.9, strategy="collage-plus", bucket_mb=1e-6)
    give(params, 0)
    opt.step()
    saved, low = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    give(params, 1)
    params[2].grad[3] = 12288.0
    found = (
        "Varies needs all of its parameters at once .of its group 'seen'.*Some parameters have made this step; go on"
    )
    with pytest.raises(RuntimeError, match=found):
        opt.step()
    assert opt.param_groups[0]["seen"] == 0.0
    with torch.no_grad():
        for p, x in zip(params, low, strict=True):
            p.copy_(x)
    opt.load_state_dict(saved)
    give(params, 1)
    opt.step()
    control_params = weights()
    control = collage.wrap(Varies, control_params, lr=0.1, momentum=0.9, strategy="collage-plus")
    for step in range(2):
        give(control_params, step)
        control.step()
    assert_same_run(opt, control)
