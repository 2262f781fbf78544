"""Triton's kernels without a GPU: bits in the interpreter, code by compilation. The whole grid: test_backends.py."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers import (
    BARE,
    REGIMES,
    Case,
    assert_same_bits,
    assert_same_rows,
    batch_of,
    case_of,
    cases,
    copy_of,
    reshaped,
    row_of,
    strided,
)
from test_backends import REGIONS, STRIDED, assert_same, interpreted
from test_backends import test_broken_planes_are_counted as check_broken
from test_backends import test_decoding_and_encoding as check_decoding_and_encoding
from test_rows import row_of as rows_of
from test_rows import test_broken_planes_are_counted as check_broken_rows
from test_rows import test_decoding_and_encoding as check_rows

import collage
from collage import backends
from collage.backends import Region, Row, reference
from collage.formats import FORMATS, Master, format_of
from collage.layout import zeros
from collage.rng import bases, signed
from collage.rules import RULES
from collage.strategies import STRATEGIES, Strategy

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TABLE = ("bf16", "collage-light", "collage-plus", "collage-plus-sr", "collage-exact", "collage-exact-lean")
TABLE += (
    "collage-8bit-plus",
    "collage-8bit",
    "collage-fp8",
    "collage-fp8-lean",
    "fp8-master",
    "fp32-master",
    "paper-plus",
)
IN_ROWS = tuple(name for name in STRATEGIES if name not in BARE)
OTHERS = ("collage-plus-sr", "lion:collage-fp16", "adam_amsgrad:(fp16+fp32 bf16x3:sr fp16x2:sr fp16:sr)", "apply:(toy)")
OTHERS += ("average:(bf16x2:sr bf16+kahan)", "momentum_nesterov:(bf16:sr fp32)", "sgd_momentum:paper-plus")
OTHERS += ("adamw_amsgrad:collage-8bit-plus", "momentum:(int8/128:sr fp32)", "apply:(fp16+int8:sr)")
OTHERS += ("average:(uint8/128 fp16+int8)", "apply:(e4m3+int16:sr)")
SIZES = (0, 1, 31, 1000, 1024, 1025)
CASES = [pytest.param(k, case, id=str(case)) for k, case in enumerate(cases())]


KERNELS = {name for name, rule in RULES.items() if rule.elementwise}  # others are made of these


@pytest.fixture
def triton():
    yield from interpreted()


@pytest.mark.parametrize(("k", "case"), CASES)
def test_every_rule_and_strategy(k, case, triton):
    """Each tensor at a step and in a regime of its own; planes and the monitor's sums are the reference's."""
    regimes = REGIMES[k % 8 :] + REGIMES[: k % 8]
    rows = [row_of(case, regime, n, step=1 + n % 3) for regime, n in zip(regimes, (31, 0, 40, 1), strict=False)]
    assert_same(triton, case, rows, maximize=k % 2 == 1, scale=(1.0, 1024.0)[k % 3 == 1])


@pytest.mark.parametrize("rule", ["adamw", "lion"])
@pytest.mark.parametrize("name", ["collage-plus-sr", "fp32-master", "paper-plus"])
def test_some_sizes_in_one_launch(rule, name, triton):
    case = case_of(name, rule)
    rows = [row_of(case, REGIMES[k % len(REGIMES)], n, step=1 + k % 3) for k, n in enumerate(SIZES)]
    assert_same(triton, case, rows + [row_of(case, regime, 65) for regime in REGIMES])


def test_every_rule_and_format_has_a_row(triton):
    assert set(triton.RULES) == KERNELS
    assert triton.FORMATS.keys() == FORMATS.keys()
    for name, rule in triton.RULES.items():
        assert rule.columns == RULES[name].constants
    for name, fmt in triton.FORMATS.items():
        assert len(fmt.words) == len(FORMATS[name].planes)


@pytest.mark.parametrize("name", ["bf16x2", "fp16:sr", "bf16x3:sr", "fp16+fp32"])
def test_decoding_and_encoding(name, triton):
    check_decoding_and_encoding(name, triton)


@pytest.mark.parametrize("name", ["bf16x2", "fp16x2:sr", "bf16x3:sr", "bf16+kahan", "fp16+fp32", "bf16"])
def test_broken_planes_are_counted(name, triton):
    check_broken(name, triton)


@pytest.mark.parametrize("shape", [(3, 1100), (2, 2048), (7, 33), (5,)], ids=str)
def test_a_format_with_a_scale_per_block(shape, triton, monkeypatch):
    """Blocks of elements and of the walk stay inside rows; a format is given all numbers of a block."""
    toy = import_module("triton_toy")
    monkeypatch.setitem(FORMATS, "toy", toy.Toy())
    monkeypatch.setitem(triton.FORMATS, "toy", toy.ROW)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found, wanted = zeros(FORMATS["toy"], x), zeros(FORMATS["toy"], x)
    triton.encode("toy", [x], [found])
    reference.encode("toy", [x], [wanted])
    for rule, formats in (("apply", ("toy",)), ("adamw", ("bf16x2", "toy", "bf16")), ("sgd_momentum", ("fp32", "toy"))):
        case = Case(RULES[rule], formats, torch.float32, torch.float32)
        others = [tuple(torch.zeros(shape, dtype=d) for d in format_of(name).dtypes) for name in formats]
        slots = [tuple(wanted) if name == "toy" else other for name, other in zip(formats, others, strict=True)]
        assert_same(triton, case, [Row(tuple(slots), x * 0.01, 3)])
    out = [torch.empty(shape) for _ in range(2)]
    triton.decode("toy", [found], out[:1])
    reference.decode("toy", [wanted], out[1:])
    for got, want in zip((*found, out[0]), (*wanted, out[1]), strict=True):
        assert_same_bits("toy", got, want)


@pytest.mark.parametrize("shape", [(3, 5, 7), (5, 300), (4, 512), (2, 1040), (2, 1100)], ids=str)
def test_blocks_of_rows(shape, triton):
    """Where rows are multiples of a block, all are walked as one; but sums are of rows."""
    case = case_of("collage-8bit")
    row = rows_of(case, "spread", shape)
    for own in (row, row._replace(sums=None)):
        assert_same(triton, case, [own])


@pytest.mark.parametrize(("name", "columns"), [("int8/128:sr", 33), ("uint8/128", 33), ("e4m3+int16:sr", 33)])
def test_encoding_rows(name, columns, triton):
    check_rows(name, columns, triton)
    check_broken_rows(name, columns, triton)


@pytest.mark.parametrize("name", ["e4m3+int16", "e4m3+int8:sr", "e4m3+fp32"])
def test_rows_longer_than_a_block(name, triton):
    """Their scale is that of the largest of all blocks."""
    x = rows_of(case_of("fp32"), "spread", (2, 2100)).slots[0][0]
    found, wanted = zeros(FORMATS[name], x), zeros(FORMATS[name], x)
    triton.encode(name, [x], [found])
    reference.encode(name, [x], [wanted])
    for got, want in zip(found, wanted, strict=True):
        assert_same_bits(name, got, want)
    assert triton.broken(name, [found]) == 0


WHOLE_ROWS = [case_of("collage-fp8"), case_of("collage-fp8-lean", "sgd"), case_of("collage-fp8-lean", "lion")]
WHOLE_ROWS += [case_of("fp8-master"), case_of("fp8-master", "sgd_momentum")]
WHOLE_ROWS += [Case(RULES["average"], ("e4m3+int16", "e4m3+int8"), torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("case", WHOLE_ROWS, ids=str)
def test_a_step_of_whole_rows(case, triton):
    """Several tensors in one launch. A row's scale is that of all its blocks' new numbers, and decodes the old ones."""
    shapes = [(3, 300), (2, 1025), (0, 5), (4, 1), (3, 0), (1, 2100)]
    rows = [rows_of(case, "spread", shape, step=1 + k % 2) for k, shape in enumerate(shapes)]
    rows += [rows_of(case, regime, (2, 40)) for regime in ("nan", "infinite", "bits")]
    assert_same(triton, case, rows, maximize=True, scale=1024.0)


@pytest.mark.parametrize("name", ["collage-8bit", "fp32-master"])
def test_streaming_leaves_planes_as_they_are(name, triton):
    rows = [rows_of(case_of(name), "normal", shape) for shape in ((3, 1100), (2, 1024), (5, 7))]
    before = [copy_of(row) for row in rows]
    planes = [plane for row in rows for own in row.slots for plane in own]
    triton.stream(case_of(name).formats, planes, [row.grad for row in rows])
    assert_same_rows(rows, before)


@pytest.mark.parametrize("kind", ["transposed", "spread"])
@pytest.mark.parametrize("case", STRIDED[:1] + STRIDED[-2:], ids=str)
def test_strides(case, kind, triton):
    plain, row = row_of(case, "normal", 70), reshaped(row_of(case, "normal", 17 * 73), (17, 73))
    row = row._replace(slots=tuple(tuple(strided(p, kind) for p in planes) for planes in row.slots))
    assert not copy_of(row).slots[0][0].is_contiguous()
    assert_same(triton, case, [row, plain])


@pytest.mark.parametrize("region", REGIONS[1:4:2])
def test_shards_draw_the_bits_of_the_whole(region, triton):
    case = case_of("stochastic", "adamw_amsgrad")
    assert_same(triton, case, [reshaped(row_of(case, "normal", 2100), region.sizes, region)])


def test_elements_beyond_32_bits(triton, monkeypatch):
    """Tables that put 2**32 elements before those there are: they are reached, and draw the bits of their place."""
    case, before = case_of("collage-plus-sr"), 2**32
    row = row_of(case, "normal", 2100)._replace(sums=None)
    ours, theirs = copy_of(row), copy_of(row)._replace(region=Region((2100,), (before,), (1,)))
    tables = import_module("collage.backends.triton.tables")
    launching = import_module("collage.backends.triton.launching")

    def shifted(layout, fronts, which):
        rows = tables.rows_of(layout, fronts, which)
        rows[:, tables.ADDRESSES :] -= torch.tensor([p.element_size() for p in (*fronts, *batch.planes)]) * before
        rows[:, tables.NUMEL] += before
        rows[:, tables.FIRST] -= before // tables.BLOCK
        return rows

    monkeypatch.setattr(launching, "rows_of", shifted)
    batch = batch_of(case, [ours])
    triton.step(batch)
    reference.step(batch_of(case, [theirs]))
    for got, want in zip(itertools.chain(*ours.slots), itertools.chain(*theirs.slots), strict=True):
        assert_same_bits("plane", got, want)


def test_a_table_follows_its_tensors(triton):
    """What is kept between steps is made anew where addresses, strides or gradients' alignment have changed."""
    case = case_of("collage-plus")
    row = row_of(case, "normal", 1024)
    for shift in (0, 1, 0):
        memory = torch.zeros(1025, dtype=torch.bfloat16)
        memory[shift : shift + 1024] = row.grad
        ours = copy_of(row)._replace(grad=memory[shift : shift + 1024])
        theirs = copy_of(row)
        triton.step(batch_of(case, [ours]))
        reference.step(batch_of(case, [theirs]))
        assert_same_bits("theta", ours.slots[0][1], theirs.slots[0][1])
    row = reshaped(row, (32, 32))
    assert_same(triton, case, [row])
    for planes in row.slots:
        for plane in planes:
            plane.data = plane.data.t()  # the same address
    assert_same(triton, case, [row])


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_scale_and_skip_are_read_on_the_device(skip, triton):
    """As torch.amp.GradScaler hands them over."""
    for case in (case_of("collage-fp16"), case_of("collage-plus", "sgd")):
        ours, theirs = row_of(case, "normal", 1100), row_of(case, "normal", 1100)
        given = {"scale": torch.tensor(65536.0), "skip": torch.tensor(skip)}
        triton.step(batch_of(case, [ours], **given))
        if not skip:
            reference.step(batch_of(case, [theirs], scale=65536.0))
        for got, want in zip(itertools.chain(*ours.slots), itertools.chain(*theirs.slots), strict=True):
            assert_same_bits(f"skip {skip}", got, want)
        if skip:
            assert not ours.sums.any()


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_folding_on_the_device(name, narrow, triton):
    """Bits of the host's constants and streams, for lr, betas and eps of every size, at steps up to a billion."""
    rule, register = RULES[name], torch.bfloat16 if narrow else torch.float32
    case = next(case for case in cases() if case.rule is rule)._replace(register=register)
    steps, keys, cpu = (1, 2, 3, 1000, 999_999_937), (0, 1, 2**64 - 1, 5, 2**63), torch.device("cpu")
    count = sum(setting.numbers for setting in rule.settings)
    for lr, hyper in (
        (1e-3, (0.9, 0.999, 1e-8, 0.1)), (3e-39, (0.0, 0.95, 10.0, 10.0)), (1e30, (0.5, 1 - 2**-30, 0, 0)),
    ):  # fmt: skip
        batch = batch_of(case, [], hyper=hyper[:count])
        on_host = replace(batch, lr=lr, steps=steps, keys=keys, seed=2**63 + 5)
        counters = [torch.tensor(step) for step in steps]
        on_device = replace(on_host, lr=torch.tensor(lr, dtype=torch.float64), steps=(), counters=counters)
        wanted, streams, _ = triton.folded_on_host(on_host, cpu)
        found, their_streams, which = triton.folded_on_device(on_device, cpu)
        assert list(which) == [0, 1, 2, 3, 4]
        assert_same_bits(f"lr {lr}, {hyper}", found, wanted)
        assert_same_bits("streams", their_streams, streams)
    assert streams.tolist() == list(map(signed, bases(2**63 + 5, steps, keys)))


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


@pytest.mark.parametrize("name", ["collage-plus-sr", "paper-plus", "fp32-master"])
def test_a_capturable_step_has_the_same_bits(name, triton):
    """capturable: t, lr and the stream of random bits are read on the device; later replays run no host code."""
    wanted = trained(name, backend="reference")
    for settings in ({"backend": "triton", "capturable": True}, {"backend": "triton"}, {"capturable": True}):
        for k, (got, want) in enumerate(zip(trained(name, **settings), wanted, strict=True)):
            assert_same_bits(f"{settings}, tensor {k}", got, want)


def converted(name: str, **settings) -> list[torch.Tensor]:
    """What a converted layer and its states hold after some steps, of which one is skipped."""
    torch.manual_seed(3)
    net = collage.fp8.convert(torch.nn.Sequential(torch.nn.Linear(160, 26), torch.nn.Linear(26, 2)).bfloat16())
    lr, g = torch.tensor(1e-3), torch.Generator().manual_seed(1)
    opt = collage.AdamW(net.named_parameters(), lr=lr, strategy=name, skip_nonfinite=True, **settings)
    for t in range(3):
        lr.fill_(1e-2 / (t + 1))
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=g).bfloat16()
            p.grad.view(-1)[1] = torch.inf if t == 1 else 0.5
        opt.step()
    assert opt.skipped_steps == 1
    return [*net.state_dict().values(), *(x for p in net.parameters() for x in opt.state[p].values())]


@pytest.mark.parametrize(
    "name",
    ["collage-fp8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("collage-fp8-lean", "fp8-master"))],
)
def test_steps_of_a_converted_layer(name, triton):
    """Its scales are the module's. Capturable, and skipped because of a gradient."""
    wanted, found = converted(name, backend="reference"), converted(name, backend="triton", capturable=True)
    for k, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert_same_bits(f"tensor {k}", got, want)


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
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("triton.__version__", "3.5.1+git0")
    with pytest.raises(
        RuntimeError, match=r"'triton' is not available: Triton 3.5.1.* is too old: the kernels need 3.6"
    ):
        collage.AdamW([w], backend="triton")
    assert backends.choose("auto", torch.device("cuda")).__name__ == "collage.backends.reference"
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


def least_accesses(strategy: Strategy, elements: int) -> tuple[int, int, int]:
    """(loads, stores) of 16 bytes by a thread that has so many elements, and stores of 8.

    Of a master's narrow copy only writes. Scales come in bytes: a word for many elements. Whole rows are read twice.
    """
    planes = [plane for name in strategy.formats() for plane in format_of(name).planes if plane.per == 1]
    sizes = [plane.dtype.itemsize * elements for plane in planes]
    unread = sizes[0] if isinstance(format_of(strategy.param), Master) else 0
    stores = sum(size // 16 for size in sizes)
    loads = stores - unread // 16 + gradient_bytes(strategy) * elements // 16
    return loads * (2 if in_whole_rows(strategy) else 1), stores, sizes.count(8)


def gradient_bytes(strategy: Strategy) -> int:
    return case_of(strategy).gradient.itemsize


def in_whole_rows(strategy: Strategy) -> bool:
    """Whether a plane has a word for a row."""
    return any(plane.per is None for name in strategy.formats() for plane in format_of(name).planes)


def bytes_moved(strategy: Strategy) -> float:
    """Of a step, for each parameter: every plane is read and written once, but a master's copy is not read."""
    unread = strategy.dtype.itemsize if isinstance(format_of(strategy.param), Master) else 0
    planes = strategy.bytes_per_param(gradient_bytes=0)
    return round(2 * planes - unread + gradient_bytes(strategy), 2)


def check(found: dict, widths: bool = True) -> None:
    for key, facts in found.items():
        assert facts["spills"] == facts["local"] == 0, key
        assert facts["contracted"] == facts["flushed"] == facts["approximate"] == 0, key
        assert not key.startswith("stream") or facts["stores"] + facts["halves"] > 0, key
        if widths and len(key.split()) == 2:
            name, target = key.split()
            loads, stores, halves = least_accesses(Strategy.parse(name), facts["elements"])
            assert (facts["stores"], facts["halves"]) == (stores, halves), key
            more = 4 * (target == "gfx942")  # there constants and addresses are loaded in fours too
            more *= 2 if in_whole_rows(Strategy.parse(name)) else 1
            assert loads <= facts["loads"] <= loads + more, key


def test_compiled_code_and_the_table_in_the_docs():
    """No spills, no local memory, 16 bytes per access, nothing contracted; registers and bytes as docs/gpu.md says."""
    found = compiled(TARGETS, TABLE)
    check(found)
    check(compiled(("sm_90", "gfx942"), OTHERS, "others", "scaled"), widths=False)
    assert [bytes_moved(STRATEGIES[name]) for name in ("collage-light", "collage-plus")] == [18, 22]
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    if version("triton") not in page:
        pytest.skip("the page's registers are those of another Triton")
    for name in TABLE:
        row = re.search(rf"^\| `{name}` \| (.*) \|$", page, re.M)
        assert row, name
        registers = [found[f"{name} {target}"]["registers"] for target in TARGETS]
        assert [float(cell) for cell in row[1].split(" | ")] == [bytes_moved(STRATEGIES[name]), *registers]


def test_compiled_kernels_are_named_by_their_sources():
    """Triton keeps them on disk, and does not look into tuples for functions that were edited."""
    script = (
        "from dataclasses import replace; from collage.backends.triton import FORMATS, slots_of, walk\n"
        "a = FORMATS['bf16x2']; b = replace(a, decode=FORMATS['bf16'].decode)\n"
        "assert repr(a) == repr(replace(a)) != repr(b)\n"
        "plans = [walk.Plan((walk.Slot(x, 1),), 11, 0) for x in (a, b)]\n"
        "assert repr(plans[0]) != repr(plans[1])\n"
        "a.encode.hash = 'an edit'\n"
        "assert repr(replace(a)) != repr(a)\n"
    )
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"TRITON_INTERPRET": "0"}, check=True)


def test_the_check_for_contraction_can_fail():
    """What Triton does unless it is told not to."""
    assert compiled(("sm_90",), ("collage-light",), "contract")["collage-light sm_90"]["contracted"] > 0


@pytest.mark.slow
def test_compiled_code_of_every_strategy_measured_and_strided():
    """But for whole rows on AMD's, where they need more scalar registers than there are (docs/gpu.md)."""
    check(compiled(TARGETS, BARE, "others"))
    check(compiled(("sm_90", "gfx942"), BARE, "strided"))
    check(compiled(("sm_90", "gfx942"), BARE, "measured"), widths=False)
    check(compiled(("sm_80", "sm_90"), IN_ROWS, "strided"))
    check(compiled(("gfx942",), IN_ROWS, "strided"), widths=False)  # 2 elements a thread
    check(compiled(("sm_80", "sm_90", "gfx942"), IN_ROWS, "measured"), widths=False)
    check(compiled(("sm_80", "gfx942"), IN_ROWS, "measured", "strided"), widths=False)
