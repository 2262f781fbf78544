"""Triton's kernels without a GPU: bits in the interpreter, code by compilation. The whole grid: test_backends.py."""

import json
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits
from test_backends import (
    GRID,
    HYPER,
    REGIMES,
    assert_same,
    batch_of,
    copy_of,
    interpreted,
    numbers,
    shard,
    share,
    strided,
)

import collage
from collage import backends
from collage.backends import Region, reference
from collage.backends.triton.formats import FORMATS as KERNEL_FORMATS
from collage.formats import FORMATS, Master
from collage.strategies import STRATEGIES, Strategy

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TABLE = ("bf16", "collage-light", "collage-plus", "collage-plus-sr", "fp32-master", "paper-plus")
SIZES = (0, 1, 31, 1000, 1024, 1025)


@pytest.fixture
def triton():
    yield from interpreted()


@pytest.mark.parametrize(("strategy", "dtype"), GRID)
def test_every_strategy_regime_and_some_sizes_in_one_launch(strategy, dtype, triton):
    """Each tensor at a step and in a regime of its own; planes and the monitor's sums are the reference's."""
    shares = [share(strategy, dtype, REGIMES[k % len(REGIMES)], n, step=1 + k % 3) for k, n in enumerate(SIZES)]
    shares += [share(strategy, dtype, regime, 65) for regime in REGIMES]
    assert_same(strategy, shares)


@pytest.mark.parametrize("name", ["collage-plus-sr", "paper-plus"])
def test_other_settings(name, triton):
    for hyper in HYPER:
        assert_same(STRATEGIES[name], [share(STRATEGIES[name], torch.bfloat16, "normal", 300)], hyper, maximize=True)


def test_every_format_has_a_row():
    assert KERNEL_FORMATS.keys() == FORMATS.keys()


@pytest.mark.parametrize("spec", ["param=fp16,momentum=fp16,variance=fp32", "param=bf16+fp32,momentum=bf16x2:sr"])
def test_formats_without_a_name(spec, triton):
    strategy = Strategy.parse(f"{spec},variance=bf16" if "variance" not in spec else spec)
    for regime in ("bits", "subnormal", "huge"):
        assert_same(strategy, [share(strategy, strategy.dtype, regime, 1100)])


@pytest.mark.parametrize("kind", ["transposed", "spread"])
def test_strides(kind, triton):
    strategy = STRATEGIES["collage-plus-sr"]
    s = share(strategy, torch.bfloat16, "normal", 37 * 53)
    slots = tuple(tuple(strided(p.view(37, 53), kind) for p in planes) for planes in s.slots)
    plain = share(strategy, torch.bfloat16, "normal", 70)
    s = s._replace(slots=slots, grad=s.grad.view(37, 53))
    assert not copy_of(s).slots[0][0].is_contiguous()
    assert_same(strategy, [s, plain])


@pytest.mark.parametrize(
    "region",
    [
        Region((70, 30), (2**32 // 30 - 40, 0), (30, 1)),  # one run, across 2**32
        Region((70, 30), (2**32 // 100, 40), (100, 1)),  # a run per row
        Region((7, 10, 30), (1, 2, 3), (5000, 100, 1)),
    ],
)
def test_shards_draw_the_bits_of_the_whole(region, triton):
    assert_same(STRATEGIES["stochastic"], [shard(STRATEGIES["stochastic"], region)])


def trained(strategy: str, steps: int = 6, **settings) -> list[torch.Tensor]:
    """Weights and states after some steps on a schedule, with a tensor lr."""
    lr, g = torch.tensor(1e-3), torch.Generator().manual_seed(1)
    params = {
        name: torch.nn.Parameter(torch.randn(n, generator=g).to(STRATEGIES[strategy].dtype))
        for name, n in {"a": 70, "b": 5}.items()
    }
    opt = collage.AdamW(params.items(), lr=lr, strategy=strategy, weight_decay=0.1, seed=2**63 + 5, **settings)
    for t in range(steps):
        lr.fill_(1e-3 / (t + 1))
        for name, p in params.items():
            p.grad = None if (t, name) == (2, "b") else torch.randn(p.shape, generator=g).to(p.dtype)
        opt.step()
    return [p.detach() for p in params.values()] + [x for p in params.values() for x in opt.state[p].values()]


@pytest.mark.parametrize("name", ["collage-plus", "fp32-master", "kahan", "bf16"])
def test_broken_planes_are_counted(name, triton):
    strategy, module = STRATEGIES[name], sys.modules["collage.backends.triton"]
    for regime in REGIMES:
        theta = share(strategy, torch.bfloat16, regime, 1100).slots[0]
        assert module.broken(strategy, [theta]) == 0
        theta[0][5:1050:3] = numbers(regime, 349, 9).bfloat16()
        theta[0][7:1050:9] = 0
        spread = [strided(plane.view(11, 100), "spread") for plane in theta]
        wanted = reference.broken(strategy, [theta, spread])
        assert module.broken(strategy, [theta, spread]) == wanted, regime


def test_elements_beyond_32_bits(triton, monkeypatch):
    """Tables that put 2**32 elements before those there are: they are reached, and draw the bits of their place."""
    module = sys.modules["collage.backends.triton"]
    strategy, before = STRATEGIES["collage-plus-sr"], 2**32
    s = share(strategy, torch.bfloat16, "normal", 2100)._replace(sums=None)
    ours, theirs = copy_of(s), copy_of(s)._replace(region=Region((2100,), (before,), (1,)))
    table = module._table

    def shifted(batch, first):
        rows, shapes = table(batch, first)
        rows[:, module.ADDRESSES :] -= 2 * before
        rows[:, module.NUMEL] += before
        rows[:, module.FIRST] -= before // module.BLOCK
        return rows, shapes

    monkeypatch.setattr(module, "_table", shifted)
    module.step(batch_of(strategy, [ours]))
    reference.step(batch_of(strategy, [theirs]))
    for got, want in zip(chain(*ours.slots), chain(*theirs.slots), strict=True):
        assert_same_bits("plane", got, want)


@pytest.mark.parametrize("name", ["collage-plus-sr", "paper-plus", "fp32-master"])
def test_constants_folded_on_the_device_are_the_hosts(name, triton):
    """capturable: t, lr and the stream of random bits are read on the device; later replays run no host code."""
    wanted = trained(name, backend="reference")
    for settings in ({"backend": "triton", "capturable": True}, {"backend": "triton"}, {"capturable": True}):
        for k, (got, want) in enumerate(zip(trained(name, **settings), wanted, strict=True)):
            assert_same_bits(f"{settings}, tensor {k}", got, want)


def test_states_move_between_capturable_and_not():
    """The loading optimizer's own setting holds; a checkpoint of before there was one loads."""
    w = torch.nn.Parameter(torch.ones(8).bfloat16())
    w.grad = torch.ones_like(w)
    saved = collage.AdamW([w], lr=1e-3)
    saved.step()
    state = saved.state_dict()
    del state["param_groups"][0]["capturable"]
    for capturable in (False, True):
        opt = collage.AdamW([w], lr=1e-3, capturable=capturable)
        opt.load_state_dict(state)
        assert opt.param_groups[0]["capturable"] is capturable
        opt.step()
        assert int(opt.state[w]["step"]) == 2
        state = opt.state_dict()
        saved.load_state_dict(state)
        state["state"][0]["step"] = torch.tensor(1)


@pytest.mark.parametrize("narrow", [False, True])
def test_folding_over_betas_and_steps(narrow, triton):
    """Bits of the host's constants, for lr, betas and eps of every size, at steps up to a billion."""
    from collage.backends.triton import fold, rules
    from collage.rules.adamw import ADAMW

    dtype = torch.bfloat16 if narrow else torch.float32
    for lr, hyper in (
        (1e-3, (0.9, 0.999, 1e-8, 0.1)),
        (3e-39, (0.0, 0.95, 1e-45, 1e3)),
        (1e30, (0.5, 1 - 2**-30, 0, 0)),
    ):
        for t in (1, 2, 3, 1000, 999_999_937):
            counter, constants = torch.tensor(t), torch.zeros(1, 9)
            fold.fold[(1,)](
                torch.tensor([counter.data_ptr()]), torch.zeros(1, dtype=torch.int64), torch.tensor([0]),
                torch.tensor(lr, dtype=torch.float64), torch.tensor(hyper, dtype=torch.float64), constants,
                torch.zeros(1, dtype=torch.int64), RULE=rules.RULES["adamw"], FOLD=fold.FOLDS["adamw"],
                NARROW=narrow, RANDOM=False,
            )  # fmt: skip
            wanted = torch.tensor([ADAMW.fold(lr, hyper, t, dtype).row()])
            assert_same_bits(f"lr {lr}, {hyper}, step {t}", constants, wanted)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_step_has_the_same_bits(triton):
    """The operator's fake is enough to trace it; Triton runs inside the opaque call."""
    params = [torch.nn.Parameter(torch.ones(40).bfloat16()) for _ in range(2)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    eager, compiled = (collage.AdamW([p], lr=torch.tensor(1e-3), backend="triton") for p in params)
    eager.step()
    torch.compile(compiled.step, fullgraph=True, backend="aot_eager")()
    assert_same_bits("weights", params[0], params[1])


def test_it_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    w = torch.nn.Parameter(torch.ones(3).bfloat16())
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="backend: 'triton' is not available: torch sees no GPU"):
            collage.AdamW([w], backend="triton")
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="Triton is not installed; torch's builds for GPUs bring it"):
        collage.AdamW([w], backend="triton")
    assert backends.choose("auto", torch.device("cuda")).__name__ == "collage.backends.reference"


def compiled(targets, strategies, *flags):
    """What came out of a compilation for GPUs that are not here."""
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "triton_targets.py", ",".join(targets), ",".join(strategies), *flags],
        env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def least_accesses(strategy: Strategy) -> tuple[int, int]:
    """(loads, stores) of 16 bytes by a thread that has 8 elements. Of a master's bf16 copy only writes."""
    sizes = [dtype.itemsize for fmt in strategy.formats for dtype in fmt.dtypes]
    unread = 1 if isinstance(strategy.formats[0], Master) else 0
    return sum(sizes) // 2 - unread + strategy.dtype.itemsize // 2, sum(sizes) // 2


def check(found: dict, widths: bool = True) -> None:
    for key, facts in found.items():
        assert facts["spills"] == facts["local"] == 0, key
        assert facts["contracted"] == facts["flushed"] == facts["approximate"] == 0, key
        if widths and len(key.split()) == 2:
            name, target = key.split()
            loads, stores = least_accesses(Strategy.parse(name))
            assert facts["stores"] == stores, key
            more = 4 if target == "gfx942" else 0  # there constants and addresses are loaded in fours too
            assert loads <= facts["loads"] <= loads + more, key


def test_compiled_code_and_the_table_in_the_docs():
    """No spills, no local memory, 16 bytes per access, nothing contracted; registers and bytes as docs/gpu.md says."""
    found = compiled(TARGETS, TABLE)
    check(found)
    check(compiled(("sm_90", "gfx942"), ("collage-plus-sr", "fp32-master"), "others"))
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for name in TABLE:
        row = re.search(rf"^\| `{name}` \| (.*) \|$", page, re.M)
        assert row, name
        registers = [found[f"{name} {target}"]["registers"] for target in TARGETS]
        bytes_moved = 2 * sum(least_accesses(STRATEGIES[name]))
        assert [int(cell) for cell in row[1].split(" | ")] == [bytes_moved, *registers]
    assert 2 * sum(least_accesses(STRATEGIES["collage-light"])) == 18
    assert 2 * sum(least_accesses(STRATEGIES["collage-plus"])) == 22


def test_the_check_for_contraction_can_fail():
    """What Triton does unless it is told not to."""
    assert compiled(("sm_90",), ("collage-light",), "contract")["collage-light sm_90"]["contracted"] > 0


@pytest.mark.slow
def test_compiled_code_of_every_strategy_measured_and_strided():
    check(compiled(TARGETS, STRATEGIES, "others"))
    check(compiled(("sm_90", "gfx942"), STRATEGIES, "strided"))
    check(compiled(("sm_90", "gfx942"), STRATEGIES, "measured"), widths=False)
