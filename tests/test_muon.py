"""Muon: against torch's own, its matrices and blocks, whose parameters are whose, and all that works around a step."""

import contextlib
import copy
import logging
from typing import Any

import pytest
import torch
from helpers import BARE, assert_same_bits, assert_same_planes, planes_of, refused
from torch import Tensor, nn

import collage
from collage.harness.ledger import peak_of
from collage.optimizers import orthogonal
from collage.strategies import STRATEGIES

theirs = pytest.importorskip("torch.optim._muon", reason="torch 2.9 has the first Muon")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = ((64, 32), (48, 96), (1, 8), (33, 40))  # tall, wide, a vector, neither
LR, STEPS = 2e-2, 30


def matrices(dtype: torch.dtype, shapes: Any = SHAPES) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=g) * 0.1).bfloat16().to(dtype)) for shape in shapes]


def give(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    """Gradients that do not depend on the weights, with a part that stays and one that comes and goes."""
    g, h = torch.Generator().manual_seed(step), torch.Generator().manual_seed(12345)
    for p in params:
        stays, goes = torch.randn(p.shape, generator=h), torch.randn(p.shape, generator=g)
        p.grad = ((stays + goes) * scale).bfloat16().to(p.dtype)


def run(params: list[nn.Parameter], opt: Any, start: int = 0, stop: int = STEPS) -> None:
    for step in range(start, stop):
        give(params, step)
        for group in opt.param_groups:
            group["lr"] *= 0.99
        opt.step()


def make(strategy: str = "collage-plus", shapes: Any = SHAPES, **settings: Any) -> tuple[list[nn.Parameter], Any]:
    params = matrices(STRATEGIES[strategy].dtype, shapes)
    named = [(f"w{k}", p) for k, p in enumerate(params)]
    return params, collage.Muon(named, strategy=strategy, **{"lr": LR, **settings})


def values(params: list[nn.Parameter], opt: Any) -> list[Tensor]:
    full = collage.high_precision_state_dict(nn.ParameterList(params), opt)
    return [full[str(k)] for k in range(len(params))]


def went(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().double() - q.detach().double() for p, q in zip(params, matrices(torch.float32), strict=True)]


def apart(some: list[Tensor], others: list[Tensor]) -> list[float]:
    """By how much two runs end apart, of how far the second went."""
    pairs = zip(went(some), went(others), strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


# Against torch's own


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48), (1, 8), (8, 1), (3, 1000)])
def test_in_bfloat16_a_matrix_has_torchs_bits(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for eps, steps in ((1e-7, 5), (1e3, 2), (1e-7, 0)):
        want = theirs._zeropower_via_newtonschulz(x, COEFFICIENTS, steps, eps)
        assert_same_bits(f"{shape}", orthogonal.newton_schulz(x.bfloat16(), COEFFICIENTS, steps, eps), want)


@pytest.mark.parametrize("rows", [1, 8, 64, 1000])
@pytest.mark.parametrize("columns", [1, 8, 64, 1000])
@pytest.mark.parametrize("name", [None, "original", "match_rms_adamw"])
def test_the_scale_of_a_shape_is_torchs(rows, columns, name):
    want = theirs._adjust_lr(1.0, name, torch.Size((rows, columns)))
    assert orthogonal.scale_of(name, rows, columns) == want


def torchs(monkeypatch: Any, multiplied: torch.dtype | None, **settings: Any) -> list[Tensor]:
    """Where torch.optim.Muon ends on float32 masters; with multiplications of another dtype than its bfloat16."""

    def ours(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
        return orthogonal.newton_schulz(grad.to(multiplied), coefficients, steps, eps)

    params = matrices(torch.float32)
    with monkeypatch.context() as patched:
        if multiplied is not None:
            patched.setattr(theirs, "_zeropower_via_newtonschulz", ours)
        run(params, torch.optim.Muon(params, lr=LR, **settings))
    return list(params)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
def test_under_master_weights_it_follows_torchs_as_far_as_multiplications_round(
    nesterov, adjust_lr_fn, monkeypatch, record_property
):
    """With both multiplying in float32 some ulps are left, of the order of operations around it: 3e-6 is 25 of them.

    In bfloat16 such an ulp of the direction now and then moves its rounding to bfloat16, and so what all later
    multiplications round. What that may make is what these do by themselves: how far torch's own run in bfloat16 ends
    from that in float32.
    """
    settings = {"nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    low, full = torchs(monkeypatch, None, **settings), torchs(monkeypatch, torch.float32, **settings)
    for dtype, want, bounds in (
        ("float32", full, [3e-6] * len(SHAPES)),
        ("bfloat16", low, apart(low, full)),
    ):
        params, opt = make("fp32-master", ns_dtype=dtype, **settings)
        run(params, opt)
        differences = apart(values(params, opt), want)
        record_property(f"{dtype}: differences and bounds", (differences, bounds))
        for difference, bound in zip(differences, bounds, strict=True):
            assert difference <= max(bound, 3e-6)


@pytest.mark.parametrize("strategy", ["fp32", "fp32-master", "collage-plus"])
def test_a_state_of_torchs_goes_on_as_torchs(strategy):
    params = matrices(torch.float32)
    other = torch.optim.Muon(params, lr=LR, momentum=0.9, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    run(params, other, 0, 5)
    mine = [nn.Parameter(p.detach().to(STRATEGIES[strategy].dtype)) for p in params]
    opt = collage.Muon(mine, lr=0.5, strategy=strategy, ns_dtype="bfloat16")
    full = {str(k): p.detach() for k, p in enumerate(params)}
    collage.load_high_precision_state_dict(nn.ParameterList(mine), opt, full)
    opt.load_state_dict(other.state_dict())
    for key in ("lr", "momentum", "ns_steps", "adjust_lr_fn", "ns_coefficients", "weight_decay"):
        assert opt.param_groups[0][key] == other.param_groups[0][key]
    run(params, other, 5, 15)
    run(mine, opt, 5, 15)
    # Multiplications in bfloat16 round as above; collage-plus rounds its momentum to bfloat16 beside
    assert max(apart(values(mine, opt), list(params))) <= (1e-2 if strategy == "collage-plus" else 2e-3)
    assert {int(opt.state[p]["step"]) for p in mine} == {11}  # torch's Muon counts none


def test_states_of_other_optimizers_are_refused():
    params, opt = make("fp32")
    run(params, opt, 0, 1)
    for kind, settings, message in (
        (torch.optim.SGD, {"momentum": 0.9}, "not one of torch.optim.Muon: it has no settings ns_steps"),
        (torch.optim.AdamW, {}, "not one of torch.optim.Muon: it needs momentum_buffer, and has exp_avg"),
    ):
        own = matrices(torch.float32)
        other = kind(own, **settings)
        run(own, other, 0, 1)
        with refused(opt, ValueError, message):
            opt.load_state_dict(other.state_dict())
    for kind, settings, message in (
        (collage.SGD, {"momentum": 0.9, "nesterov": True}, "saved with dampening=0.0, this optimizer has no such"),
        (collage.Lion, {}, "its state has step, exp_avg"),
        (collage.AdamW, {}, "saved with decoupled_weight_decay=True, this optimizer has no such"),
    ):
        own = matrices(torch.float32)
        other = kind([(f"w{k}", p) for k, p in enumerate(own)], strategy="fp32", **settings)
        run(own, other, 0, 1)
        with refused(opt, ValueError, message):
            opt.load_state_dict(other.state_dict())
        with pytest.raises(ValueError, match=r"saved with (use_muon|nesterov)=True"):
            other.load_state_dict(opt.state_dict())


# Blocks, convolutions


def test_blocks_of_rows_are_orthogonalised_by_themselves():
    """As weights of their own. Equal ones are multiplied together, in torch's batched product, which may add in
    another order: some ulps of float32, as everything else is the same."""
    for split, rows in ((16, [16, 16, 16, 16]), ((16, 16, 16, 16), [16] * 4), ((40, 8, 16), [40, 8, 16]), (64, [64])):
        ends = []
        for shapes, settings in ((((64, 32),), {"split": split}), ([(n, 32) for n in rows], {})):
            params, opt = make("fp32", shapes, adjust_lr_fn="original", ns_dtype="float32", **settings)
            whole = matrices(torch.float32, ((64, 32),))[0].detach()
            for p, part in zip(params, whole.split([len(p) for p in params]), strict=True):
                p.data.copy_(part)
            for step in range(3):
                grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
                for p, part in zip(params, grad.split([len(p) for p in params]), strict=True):
                    p.grad = part.clone()
                opt.step()
            ends.append(torch.cat([p.detach() for p in params]))
        if len(set(rows)) > 1 or len(rows) == 1:
            assert_same_bits(f"{split}", *ends)
        assert float((ends[0] - ends[1]).abs().max()) <= 1e-6


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (7, r"param 'w0': split: asks for blocks of 7, and there are 64 rows"),
        ((32, 31), r"param 'w0': split: asks for \(32, 31\), which add up to 63, and there are 64 rows"),
        (0, "split: needs the rows of each block, or of all blocks, each > 0; got 0"),
        ((32, -32, 64), "each > 0; got"),
        (True, "each > 0; got True"),
        (32.0, "each > 0; got 32.0"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(split, message):
    with pytest.raises(ValueError, match=message):
        make(split=split)
    params, opt = make(shapes=SHAPES[:1])
    run(params, opt, 0, 1)
    give(params, 1)
    opt.param_groups[0]["split"] = split
    with refused(opt, ValueError, message):
        opt.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_seen_as_a_matrix_on_request(layout):
    conv = nn.Conv2d(4, 8, 3, bias=False).bfloat16()
    conv.weight.data = conv.weight.data.to(memory_format=layout)
    flat = nn.Parameter(conv.weight.detach().reshape(8, -1).clone())
    opts = collage.Muon([("w", conv.weight)], lr=LR, flatten=True), collage.Muon([("w", flat)], lr=LR)
    for step in range(3):
        give([flat], step)
        conv.weight.grad = flat.grad.view(conv.weight.shape).to(memory_format=layout)
        for opt in opts:
            opt.step()
    assert_same_bits("theta", conv.weight.detach().reshape(8, -1), flat.detach())
    for key in ("param_lo", "momentum_buffer"):
        assert_same_bits(key, opts[0].state[conv.weight][key].reshape(8, -1), opts[1].state[flat][key])


# Whose parameters are whose


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(16, 8)
        self.patch_embed = nn.Conv2d(3, 8, 2)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8)])
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.output = nn.Linear(8, 16, bias=False)
        self.lm_head = nn.Linear(8, 16, bias=False)


def kinds(opt: Any) -> dict[bool, list[str]]:
    return {group["use_muon"]: group["param_names"] for group in opt.param_groups}


def matched(params: Any, **settings: Any) -> Any:
    return collage.Muon(params, **{"lr": 1e-3, "adjust_lr_fn": "match_rms_adamw", **settings})


def test_named_parameters_are_sorted_by_shape_and_name(caplog):
    model = Model().bfloat16()
    outer = ["wte.weight", "patch_embed.weight", "patch_embed.bias", "blocks.0.bias", "blocks.1.weight"]
    outer += ["blocks.1.bias"]
    with caplog.at_level(logging.INFO, logger="collage"):
        opt = matched(model.named_parameters(), adamw={"weight_decay": 0.0, "betas": (0.9, 0.95)})
    assert "Muon: 1 matrices; AdamW: 9 others" in caplog.text
    assert kinds(opt) == {True: ["blocks.0.weight"], False: [*outer, "conv.weight", "output.weight", "lm_head.weight"]}
    muons, adamws = opt.param_groups
    assert (muons["eps"], adamws["eps"]) == (1e-7, 1e-8)
    assert (muons["weight_decay"], adamws["weight_decay"]) == (0.1, 0.0)
    assert (muons["lr"], adamws["lr"], adamws["betas"]) == (1e-3, 1e-3, (0.9, 0.95))
    flattened = matched(model.named_parameters(prefix="module"), flatten=True)
    assert kinds(flattened)[True] == ["module.blocks.0.weight", "module.conv.weight"]
    assert "module.output.weight" in kinds(flattened)[False]


def test_a_group_added_later_is_sorted_too_and_takes_the_same_settings():
    model = Model().bfloat16()
    opt = matched([("first", nn.Parameter(torch.ones(4, 4).bfloat16()))], adamw={"lr": 5e-4})
    opt = copy.deepcopy(opt)
    opt.add_param_group({"params": list(model.named_parameters()), "lr": 2e-3})
    assert [group["use_muon"] for group in opt.param_groups] == [True, True, False]
    assert [group["lr"] for group in opt.param_groups] == [1e-3, 2e-3, 2e-3]
    opt.add_param_group({"params": [("norm", nn.Parameter(torch.ones(4).bfloat16()))], "use_muon": False})
    assert (opt.param_groups[3]["lr"], opt.param_groups[3]["eps"]) == (5e-4, 1e-8)


def test_what_is_no_matrix_is_refused_with_the_fix():
    model = Model().bfloat16()
    with pytest.raises(ValueError, match=r"shape \(8, 3, 2, 2\), and Muon is for hidden.*model.named_parameters\(\)"):
        collage.Muon(model.parameters())
    for name, p, fix in (
        ("norm", model.blocks[1].weight, r"its shape is \(8,\); give it to AdamW, in a group with use_muon=False"),
        ("conv", model.conv.weight, r"its shape is \(4, 2, 3, 3\); flatten=True sees it as a matrix .*; or give it to"),
    ):
        with pytest.raises(ValueError, match=f"param '{name}': Muon is for matrices, and {fix}"):
            collage.Muon([{"params": [(name, p)], "use_muon": True}])
    opt = matched(model.named_parameters())
    groups = copy.copy(opt.param_groups)
    more = {"params": [("a", nn.Parameter(torch.ones(4, 4).bfloat16())), ("b", model.wte.weight)]}
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group(more)
    assert opt.param_groups == groups


def test_matrices_without_names_are_all_muons_as_torchs():
    params = matrices(torch.bfloat16)
    assert [group["use_muon"] for group in collage.Muon(params).param_groups] == [True]
    assert [group["use_muon"] for group in collage.Muon(iter(params), lr=1e-3).param_groups] == [True]


def test_one_lr_for_both_is_warned_of_where_they_are_scaled_otherwise():
    named = [("w", nn.Parameter(torch.ones(4, 4).bfloat16())), ("b", nn.Parameter(torch.ones(4).bfloat16()))]
    with pytest.warns(
        RuntimeWarning, match=r"lr: AdamW's groups take Muon's, 0.0217, .*adamw=\{'lr': 3e-4\}, or adjust"
    ):
        collage.Muon(named, lr=0.0217)
    opt = collage.Muon(named, lr=0.0217, adamw={"lr": 3e-4})
    assert [group["lr"] for group in opt.param_groups] == [0.0217, 3e-4]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ns_coefficients": (1.0, 2.0)}, ValueError, "ns_coefficients: needs three finite numbers, got"),
        ({"ns_coefficients": 3.0}, ValueError, "ns_coefficients: needs three finite numbers, got 3.0"),
        ({"ns_coefficients": (1.0, 2.0, float("nan"))}, ValueError, "ns_coefficients: needs three finite"),
        ({"ns_steps": 100}, ValueError, r"ns_steps: needs an integer in \[0, 100\), got 100"),
        ({"ns_steps": 5.0}, ValueError, "ns_steps: needs an integer"),
        ({"eps": -1.0}, ValueError, "eps: needs a finite number >= 0, got -1"),
        ({"momentum": 1.0}, ValueError, r"momentum: needs a finite number in \[0, 1\), got 1"),
        ({"adjust_lr_fn": "rms"}, ValueError, "adjust_lr_fn: unknown 'rms'; known: None, original, match_rms_adamw"),
        ({"ns_dtype": "float16"}, ValueError, "ns_dtype: unknown 'float16'; known: None, float32, bfloat16"),
        ({"nesterov": 1}, TypeError, "nesterov: needs True or False, got 1"),
        ({"flatten": None}, TypeError, "flatten: needs True or False, got None"),
        ({"adamw": {"beta": (0.9, 0.95)}}, TypeError, "adamw: cannot take beta; it is unknown"),
        ({"amsgrad": True}, TypeError, "Muon: cannot take amsgrad=True"),
        ({"dampening": 0.1}, TypeError, "Muon: cannot take dampening; it is unknown"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


# Around a step


@pytest.mark.parametrize("strategy", BARE)
def test_the_reference_has_the_bits_of_the_kernels(strategy):
    """Large enough for blocks with scales, and not; monitored and not."""
    shapes, ends = ((64, 160), (33, 40)), []
    for backend, watched in (("auto", False), ("reference", True)):
        params, opt = make(strategy, shapes, backend=backend)
        mon = collage.monitor(opt, every=1) if watched else None
        run(params, opt, 0, 4)
        ends.append(planes_of(opt))
    assert_same_planes(*ends)
    assert mon is not None
    assert mon.report().total.nonzero > 0


@pytest.mark.parametrize("capturable", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gpu_kernels_have_the_bits_of_the_others_and_fold_and_skip_where_they_are(capturable):
    """In Triton's interpreter. There the host reads neither lr nor the counters nor whether a step is skipped."""
    shapes, ends = ((16, 8), (24, 40)), []
    for backend, settings in (
        ("auto", {}),
        ("triton", {"capturable": capturable, "lr": torch.tensor(LR, dtype=torch.float64)}),
    ):
        params, opt = make("collage-plus-sr", shapes, backend=backend, **settings)
        for step in range(3):
            give(params, step, 8.0)
            opt.grad_scale = torch.tensor(8.0)
            opt.found_inf = torch.tensor(float(step == 1))
            if capturable and backend == "triton":
                opt._is_skipped = lambda: False  # as on a GPU
            opt.step()
        ends.append(planes_of(opt))
    assert_same_planes(*ends)


def test_what_arrives_is_measured():
    """At a small lr plain bfloat16 drops nearly all of the update and its decay, and a second component none."""
    reports = {}
    for strategy in ("bf16", "collage-plus"):
        params, opt = make(strategy, lr=1e-5)
        mon = collage.monitor(opt, every=1)
        run(params, opt, 0, 5)
        reports[strategy] = mon.report()
    assert reports["bf16"].total.edq_ratio < 0.2 < 0.9 < reports["bf16"].total.lost
    assert reports["collage-plus"].total.edq_ratio == pytest.approx(1.0, abs=1e-3)
    assert reports["collage-plus"].unfollowed == ["w0", "w1", "w2", "w3"]


@pytest.mark.parametrize(
    "ambient", [lambda: torch.device("meta"), lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode]
)
def test_what_is_around_a_step_changes_no_bit(ambient):
    ends = []
    for context in (contextlib.nullcontext, ambient):
        params, opt = make("collage-plus", ns_dtype="float32", split=1)
        for step in range(2):
            give(params, step)
            with context():
                opt.step()
        ends.append(planes_of(opt))
    assert_same_planes(*ends)


def test_a_released_step_has_the_bits_of_a_whole_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48)).bfloat16()
    ends = []
    for released in (False, True):
        own = copy.deepcopy(net)
        opt = matched(own.named_parameters(), strategy="collage-plus-sr")
        if released:
            collage.release_gradients(own, opt)
        for step in range(3):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
            own(x).square().sum().backward()
            opt.step()
            opt.zero_grad()
        ends.append(planes_of(opt))
    assert_same_planes(*ends)


def test_scaled_gradients_make_the_same_step_and_a_step_that_is_not_finite_none():
    """A power of two: no bit is lost by it."""
    (params, opt), (others, other) = make("collage-fp16"), make("collage-fp16", skip_nonfinite=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(6):
        give(params, step, 1.0)
        give(others, step, 1.0)
        for p in params:
            p.grad = p.grad * 8.0
        if step in (0, 3):
            for own in (params, others):
                own[1].grad[0, 0] = torch.inf
        scaler.scale(torch.ones(()))
        scaler.step(opt)
        scaler._per_optimizer_states.clear()
        other.step()
    assert other.skipped_steps == 2
    assert_same_planes(planes_of(opt), planes_of(other))
    assert {int(opt.state[p]["step"]) for p in params} == {4}


def test_matrices_without_elements_step():
    params, opt = make(shapes=((0, 8), (4, 0), (4, 8)))
    run(params, opt, 0, 2)
    assert [int(opt.state[p]["step"]) for p in params] == [2, 2, 2]


def test_a_matrix_of_zeros_stays_and_no_gradient_is_no_step():
    params, opt = make(weight_decay=0.0)
    before = [p.detach().clone() for p in params]
    for p in params[:2]:
        p.grad = torch.zeros_like(p)
    opt.step()
    for p, was in zip(params, before, strict=True):
        assert_same_bits("w", p.detach(), was)
    assert [len(opt.state[p]) for p in params] == [3, 3, 0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(128, 128), (64, 256), (256, 64)])
def test_a_step_has_temporaries_of_one_matrix(shape, dtype):
    """Of 40 equal ones; all their directions alone would be 160 bytes for each element of one."""
    params, opt = make(shapes=(shape,) * 40, ns_dtype=dtype)
    run(params, opt, 0, 1)
    give(params, 1)
    assert 4 <= peak_of(opt.step) / torch.Size(shape).numel() <= 20.1
