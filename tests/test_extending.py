"""docs/extending.md is followed to the letter: what it shows runs, on every backend that it shows it for."""

import importlib.util
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import REGIMES, Case, assert_same_bits, assert_same_rows, batch_of, copy_of, row_of
from torch import nn

import collage
from collage.backends import BACKENDS, Known, reference
from collage.formats import FORMATS
from collage.layout import as_rows
from collage.rules import RULES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def shown(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture
def rule(monkeypatch):
    """The rule and its optimizer, and the row they ask for."""
    names: dict = {"__name__": "toy"}
    for code in shown("python")[:2]:
        exec(compile(code, "extending", "exec"), names)
    monkeypatch.setitem(RULES, "signum", names["SIGNUM"])
    return names


@pytest.fixture
def scaled():
    names: dict = {"__name__": "toy"}
    before = dict(FORMATS)
    exec(compile(shown("python")[2], "extending", "exec"), names)
    yield "int8/64"
    FORMATS.clear()
    FORMATS.update(before)


@pytest.mark.parametrize("strategy", ["collage-plus", "collage-plus-sr", "paper-light", "fp32"])
def test_the_rule_trains_is_measured_saved_and_exported(rule, strategy, tmp_path):
    w = nn.Parameter(torch.ones(70).to(collage.STRATEGIES[strategy].dtype))
    opt = rule["Signum"]([("w", w)], lr=1e-4, strategy=strategy, backend="reference")
    mon = collage.monitor(opt, every=1, shadow=None)
    for _ in range(20):
        w.grad = torch.ones_like(w)
        opt.step()
    full = collage.high_precision_state_dict(nn.ParameterDict({"w": w}), opt)
    # An increment is rounded to the last component: half an ulp of it, 2**-17, may go at each of 20 steps.
    within = 1e-6 if strategy == "fp32" else 20 * 2.0**-18
    assert full["w"].tolist() == pytest.approx([1 - 20 * 1e-4] * 70, abs=within)
    assert mon.report().total.edq_ratio == pytest.approx(1.0, abs=0.05)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    again = rule["Signum"]([("w", w)], strategy=strategy, backend="reference")
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    assert again.param_groups[0]["momentum"] == 0.9


def test_the_rule_runs_in_triton_too(rule, monkeypatch, tmp_path):
    from collage.backends.triton import rules as theirs

    source = f"import triton\nimport triton.language as tl\n{shown('python triton')[0]}"
    names = {name: getattr(theirs, name) for name in ("minus", "sign", "Rule")} | {"Constants": rule["Constants"]}
    monkeypatch.setattr(theirs, "RULES", dict(theirs.RULES))
    module = loaded(tmp_path / "toy_kernels.py", source, names | {"RULES": theirs.RULES})
    monkeypatch.setattr(sys.modules["collage.backends.triton"], "RULES", module.RULES)
    for formats in (("bf16x2", "bf16"), ("bf16x2:sr", "bf16:sr")):
        case = Case(rule["SIGNUM"], formats, torch.float32, torch.bfloat16)
        rows = [row_of(case, regime, 70) for regime in REGIMES[:4]]
        ours, wanted = [copy_of(row) for row in rows], [copy_of(row) for row in rows]
        sys.modules["collage.backends.triton"].step(batch_of(case, ours))
        reference.step(batch_of(case, wanted))
        assert_same_rows(ours, wanted)


def loaded(path: Path, source: str, names: dict) -> types.ModuleType:
    """A module of a file: Triton reads the source of its functions."""
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("toy_kernels", path)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(names)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler, as the kernels do")
@pytest.mark.parametrize(
    ("language", "file", "before", "entry"),
    [
        ("cpp", "rules.hpp", "template <class... R>", ("using Rules = RuleList<", "Signum, ")),
        ("cpp format", "formats.hpp", "template <class... F>", ("using Formats = List<", "Scaled, ")),
    ],
)
def test_the_rule_and_the_format_compile_as_kernels(language, file, before, entry, tmp_path):
    """In the lists, for one instruction set; that their bits are right is what the grids are for."""
    (toy,) = shown(language)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = (tmp_path / "csrc" / file).read_text(encoding="utf-8")
    assert entry[0] in source
    source = source.replace(before, f"{toy}\n{before}", 1).replace(entry[0], "".join(entry))
    (tmp_path / "csrc" / file).write_text(source, encoding="utf-8")
    flags = ["-std=c++17", "-Wno-psabi", "-DCOLLAGE_ISA=portable", "-fsyntax-only"]
    done = subprocess.run(["g++", *flags, tmp_path / "csrc" / "isa.cpp"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("shape", [(6, 130), (3, 5, 7), (9,), (), (0, 5)])
def test_the_format_holds_a_momentum(scaled, shape, tmp_path):
    w = nn.Parameter(torch.ones(shape).bfloat16())
    strategy = collage.Strategy(param="bf16x2", momentum=scaled, variance="fp32")
    opt = collage.AdamW([("w", w)], lr=1e-3, strategy=strategy, backend="reference")
    for step in range(3):
        w.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step)).bfloat16()
        opt.step()
    rows, columns = as_rows(shape)
    assert opt.state[w]["exp_avg"].dtype == torch.int8
    assert opt.state[w]["exp_avg_scale"].shape == (rows, -(-columns // 64))
    assert (opt.state[w]["exp_avg_scale"] > 0).all()
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    again = collage.AdamW([("w", w)], strategy=strategy, backend="reference")
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    again.step()
    assert int(again.state[w]["step"]) == 4


def test_the_backend_is_a_row(monkeypatch):
    module = types.ModuleType("toy_backend")
    exec(compile(shown("python backend")[0], "extending", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "toy_backend", module)
    monkeypatch.setitem(BACKENDS, "toy", Known("toy_backend", (), lambda: ""))
    weights = [nn.Parameter(torch.ones(5).bfloat16()) for _ in range(2)]
    for w, backend in zip(weights, ("toy", "reference"), strict=True):
        w.grad = torch.ones_like(w)
        collage.AdamW([w], backend=backend).step()
    assert_same_bits("weights", *weights)
    with pytest.raises(ValueError, match="unknown 'toys'; known: auto, cpu, triton, reference, toy"):
        collage.AdamW(weights, backend="toys")
    monkeypatch.setitem(BACKENDS, "toy", Known("toy_backend", (), lambda: "it is only a toy"))
    with pytest.raises(RuntimeError, match="'toy' is not available: it is only a toy"):
        collage.AdamW(weights, backend="toy")
