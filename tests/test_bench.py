"""`collage bench`: what its tables say of bytes, shapes and planes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from collage.formats import format_of
from collage.harness.bench import contestants, wrapped
from collage.harness.bench.command import TIMING, shapes_of
from collage.harness.bench.contestants import KINDS, limit, ours
from collage.harness.bench.gradients import accumulate, clip, release
from collage.harness.bench.measure import compare, per_dtensor
from collage.harness.bench.rows import EXTRA, arrived
from collage.harness.cli import main
from collage.harness.ledger import peak_of
from collage.layout import zeros
from collage.strategies import STRATEGIES

CPU = torch.device("cpu")
SHAPES = [(64, 300), (1000,), (1, 4096), (8, 2, 260)]


@pytest.mark.parametrize("params", [4_000, 16_000, 10**6, 64 * 10**6, 64_000_001])
def test_even_are_four_matrices_of_about_so_many_elements(params: int) -> None:
    shapes = shapes_of("even", params)
    assert len({*shapes}) == 1
    assert len(shapes) == 4
    assert len(shapes[0]) == 2
    assert sum(map(math.prod, shapes)) == pytest.approx(params, abs=4 * 2048)


@pytest.mark.parametrize("name", ["bf16", "collage-plus", "fp32-master", "fp32", "collage-exact", "collage-8bit"])
@pytest.mark.parametrize("optimizer", KINDS)
def test_bytes_are_those_of_the_tensors(name: str, optimizer: str) -> None:
    kind, strategy = KINDS[optimizer], STRATEGIES[name]
    opt = kind.make(contestants.parameters(SHAPES, CPU, strategy.dtype), 1e-3, strategy)
    alive = 0
    for parameter in opt.parameters():
        formats = kind.formats(opt.strategy_of(parameter), parameter.tensor.shape)
        planes = [plane for name in formats for plane in zeros(format_of(name), parameter.tensor)]
        alive += sum(tensor.nbytes for tensor in (*planes, parameter.tensor.grad))
    row = ours(kind, name)
    assert row.kept(SHAPES) == alive
    gradient = strategy.dtype.itemsize * sum(map(math.prod, SHAPES))
    unread = 2 * sum(map(math.prod, SHAPES)) if name == "fp32-master" else 0
    assert row.moved(SHAPES) == 2 * (alive - gradient) - unread + gradient
    assert limit(kind, name).moved(SHAPES) == 2 * alive - gradient


def test_bytes_per_parameter_of_large_and_of_small_tensors() -> None:
    row = ours(KINDS["adamw"], "collage-8bit")
    assert row.kept([(16, 4096)]) / 65536 == STRATEGIES["collage-8bit"].bytes_per_param(gradient_bytes=2)
    assert row.kept([(1000,)]) / 1000 == 11  # bf16+int8:sr, bf16:sr, bf16x2:sr, and the gradient
    torchao = EXTRA[-1]
    assert (torchao.kept([(16, 4096)]) / 65536, torchao.kept([(1000,)]) / 1000) == (6 + 8 / 256, 8)


def test_the_limit_streams_the_planes_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[str, ...], list[torch.Size]] = {}

    class Watching:
        def stream(self, formats: tuple[str, ...], planes: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
            seen[formats] = [grad.shape for grad in grads]
            width = sum(len(format_of(name).planes) for name in formats)
            assert len(planes) == width * len(grads)
            assert all(planes[k * width].shape == grad.shape for k, grad in enumerate(grads))

    monkeypatch.setattr(contestants, "choose", lambda name, device: Watching())
    limit(KINDS["adamw"], "collage-8bit-plus").build(SHAPES, 1e-3, CPU).step()
    assert seen == {
        ("bf16x2:sr", "int8/128:sr", "uint8/128:sr"): [(64, 300), (1, 4096), (8, 2, 260)],
        ("bf16x2:sr", "bf16:sr", "bf16x2:sr"): [(1000,)],
    }


@pytest.mark.parametrize(("name", "least", "most"), [("bf16", 0.0, 0.9), ("collage-plus", 0.999, 1.001)])
def test_what_arrives(name: str, least: float, most: float) -> None:
    share = arrived("adamw", ours(KINDS["adamw"], name), CPU)
    assert share is not None
    assert least <= share <= most


def test_small_tensors_say_their_own_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--params 3K --shapes small --rounds 2 --no-others --no-monitor --strategies collage-plus-sr"
    assert main(["bench", *options.split(), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [row["bytes_kept"] for row in result["rows"]] == [12, 12]
    assert result["parameters"] == 3000
    assert "3,000 parameters in 3 tensors" in capsys.readouterr().out


def test_vectors_alone_leave_nothing_to_convert(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--params 3K --shapes small --plan --strategies collage-plus,fp8-master"
    assert main(["bench", *options.split()]) == 2
    assert "--shapes: small has only vectors, and fp8-master trains e4m3 matrices" in capsys.readouterr().err


@pytest.mark.parametrize("name", TIMING)
def test_accuracy_takes_no_flag_of_a_timing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"shapes": ["even"], "device": ["cpu"], "optimizer": ["adamw"]}
    values |= {switch: [] for switch in ("plan", "no_monitor", "extra", "sharded")}
    flag = f"--{name.replace('_', '-')}"
    assert (
        main(["bench", "--accuracy", flag, *values.get(name, ["0" if name in ("threads", "bandwidth") else "9"])]) == 2
    )
    error = capsys.readouterr().err
    assert f"{flag}: means nothing to --accuracy" in error
    assert "leave it out" in error


def test_gradients_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accumulate, "NUMEL", 20_000)
    monkeypatch.setattr(clip, "NUMEL", 1000)
    monkeypatch.setattr(release, "SHAPES", {"three": (3, 1 << 20)})
    assert main(["bench", "--gradients", "--rounds", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gradients.json").read_text())
    sums = result["accumulate"]
    assert sums["bf16: autograd"]["error"] > 1000 * sums["bf16x2: two components"]["error"]
    assert sums["bf16x2: two components"]["error"] > 100 * sums["fp32: GradientAccumulator"]["error"] > 0
    more = [row["bytes_more"] for row in sums.values()]
    assert more == pytest.approx([2, 6, 2, 2], abs=0.01)  # the gradient, or also a cast of it; and some scalars
    ours, torchs = (result["clip"][f"{where}.clip_grad_norm_"]["error"] for where in ("collage", "torch.nn.utils"))
    assert ours < 1e-7 < torchs
    (row,) = result["release"].values()
    assert (row["alive_after"], row["alive_inside"]) == pytest.approx((1.0, 1 / 3), abs=1e-4)  # and some scalars
    assert "release_gradients" in capsys.readouterr().out


def test_wrapped_optimizers_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--wrapped", "--params", "40K", "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "wrapped.json").read_text())["rows"]
    assert rows.keys() == wrapped.KINDS.keys()
    assert all(row["ratio"] == pytest.approx(row["collage-plus"] / row["master"]) for row in rows.values())
    few = 0.5  # beside numbers of theirs own, of 40,000 weights: step counters, and factored moments
    assert rows["AdamW"]["kept"] == pytest.approx(12, abs=few)
    assert rows["AdamW"]["kept_master"] == pytest.approx(16, abs=few)
    decoded = 4 * 4 * 40_000 / 2**20  # theta, gradient and two moments in float32, and a temporary of one tensor or two
    assert decoded <= rows["AdamW(fused=True)"]["more_mb"] <= rows["AdamW"]["more_mb"] < 1.5 * decoded
    assert "AdamW(fused=True)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag", ["--params 4K", "--accuracy", "--wrapped", "--strategies bf16", "--no-others", "--threads 1"]
)
def test_gradients_refuse_what_means_nothing_to_them(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--gradients", *flag.split()]) != 0
    assert "--gradients" in capsys.readouterr().err


def test_the_peak_counts_what_is_alive_at_once() -> None:
    def call() -> None:
        kept = torch.zeros(1000)
        for _ in range(3):
            kept.add_(torch.ones(1000) * 2.0)  # two of them, beside what is kept
        kept.view(10, 100).mul_(2.0)

    assert peak_of(call) == 12_000


def test_a_rank_is_measured_by_what_it_has() -> None:
    rows = [
        {"name": "limit of bf16", "ns_per_param": 2.0, "gb_per_s": 4.0, "bytes_moved": 8.0, "ms": 6.0},
        {"name": "bf16", "ns_per_param": 4.0, "gb_per_s": 2.0, "bytes_moved": 8.0, "ms": 10.0},
        {"name": "bf16, sharded", "ns_per_param": 2.0, "gb_per_s": 2.0, "bytes_moved": 4.0, "ms": 6.0},
    ]
    compare(rows)
    assert [row["of_limit"] for row in rows[1:]] == [0.5, 0.5]
    assert per_dtensor(rows, 1000) == {"bf16": {"times": 0.6, "us": -4.0}}


def test_muon_is_timed_beside_torchs_and_its_orthogonalisation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--optimizer muon --params 1200K --rounds 1 --strategies collage-plus --no-monitor"
    assert main(["bench", *options.split(), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    names = ["limit of collage-plus", "collage-plus", "orthogonalisation alone"]
    assert result["failed"] == {}
    assert [row["name"] for row in result["rows"]] == [*names, "A: torch bf16", "torch fp32", "D: torch + master"]
    assert [row["bytes_kept"] for row in result["rows"]] == [8, 8, 2, 6, 12, 16]
    assert result["orthogonalisation"].keys() == {"collage-plus"}
    assert [row["to_d"] is not None for row in result["rows"]] == [True] * 6
    # In bfloat16 or float32, the orthogonalised update is the same to 1e-3
    assert [row["edq_ratio"] for row in result["rows"][-2:]] == pytest.approx([1.0, 1.0], abs=1e-2)
    assert result["rows"][1]["edq_ratio"] == pytest.approx(1.0, abs=1e-2)
    assert "Of a step's time the orthogonalisation takes: collage-plus" in capsys.readouterr().out


def test_what_is_no_hidden_matrix_is_adamws() -> None:
    kind = KINDS["muon"]
    assert [kind.rule(shape).name for shape in ((64, 300), (50257, 768), (1000,), (8, 2, 260))] == [
        "muon", "adamw", "adamw", "adamw",
    ]  # fmt: skip
