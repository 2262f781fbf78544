"""`collage compare` from the command line to its files, and the commands around it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from collage import STRATEGIES, __version__, floors
from collage.harness import options
from collage.harness.cli import COMMANDS, main
from collage.harness.compare import asking, verdict
from collage.harness.machine import PLAIN
from collage.harness.report.columns import floorless
from collage.harness.train import training
from collage.harness.train.config import RunConfig

SMALL = ["--batch-size", "4", "--seq-len", "16", "--every", "2", "--eval-sequences", "8", "--steps", "6"]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def comparison(out: Path, *options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run it; its summary and metrics."""
    assert main(["compare", "--out", str(out), *SMALL, *options]) == 0
    return json.loads((out / "summary.json").read_text()), lines(out)


def test_from_scratch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary, metrics = comparison(tmp_path)
    assert summary["strategies"] == list(asking.DEFAULT)
    assert summary["regime"] == "scratch"
    assert summary["tokens_per_step"] == 64
    assert {run["initial_loss"] for run in summary["runs"]} == {summary["initial_loss"]}
    for row in summary["table"]:
        assert row["bytes_per_param"] == STRATEGIES[row["strategy"]].bytes_per_param()
        assert row["difference_spread"] is None
    assert summary["table"][-1]["difference"] == 0.0
    assert sum(summary["update_histogram"]["counts"]) > 1000
    assert len(summary["update_histogram"]["edges"]) == len(summary["update_histogram"]["counts"]) + 1
    assert set(summary["floors"]["bf16"]) == {"up", "down"}
    for strategy in asking.DEFAULT:
        mine = [record for record in metrics if record["strategy"] == strategy]
        assert [r["step"] for r in mine if r["kind"] == "eval"] == [0, 1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in mine if r["kind"] == "train"] == [1, 2, 4, 6]
        assert all(0 < r["lr"] <= 1e-3 and r["grad_norm"] > 0 for r in mine if r["kind"] == "train")
    # The same weights, batches and arithmetic: before the first update the losses are the same.
    assert len({r["loss"] for r in metrics if r["kind"] == "train" and r["step"] == 1}) == 1
    assert "<html" in (tmp_path / "report.html").read_text()
    assert len(list((tmp_path / "plots").glob("*.png"))) >= 7
    out = capsys.readouterr().out
    assert "One seed cannot show" in out
    assert all(strategy in out for strategy in asking.DEFAULT)


def test_finetune_over_two_seeds(tmp_path: Path) -> None:
    options = ("--finetune", "--pretrain-steps", "3", "--seeds", "2", "--seed", "5", "--strategies", "A,collage-plus,D")
    summary, _ = comparison(tmp_path, *options, "--model", "tiny-bert")
    assert summary["regime"] == "finetune"
    assert summary["lr"] == 1e-5
    assert summary["settings"]["schedule"] == "constant"
    assert summary["seeds"] == [5, 6]
    assert summary["strategies"] == ["paper-bf16", "collage-plus", "fp32-master"]
    for seed in (5, 6):
        assert len({run["initial_loss"] for run in summary["runs"] if run["seed"] == seed}) == 1
    bf16, plus, master = summary["table"]
    assert bf16["edq_ratio"] < 0.5 < 0.99 < plus["edq_ratio"]
    assert bf16["lost"] > 0.5 > plus["lost"]
    assert bf16["frozen"] > 0 == plus["frozen"]
    assert all(row["difference_spread"] is not None for row in (bf16, plus, master))


def test_the_same_again(tmp_path: Path) -> None:
    one, other = (comparison(tmp_path / name, "--strategies", "collage-plus-sr")[1] for name in "ab")
    assert one == other


def test_own_text(tmp_path: Path) -> None:
    for name in ("novel", "code", "held"):
        (tmp_path / f"{name}.txt").write_text(f"some {name} text, again and again. " * 40)
    paths = {name: str(tmp_path / f"{name}.txt") for name in ("novel", "code", "held")}
    options = ["--finetune", "--pretrain-steps", "2", "--data", paths["novel"], "--finetune-data", paths["code"]]
    summary, _ = comparison(tmp_path / "run", *options, "--validation", paths["held"], "--strategies", "bf16")
    assert summary["table"][0]["kept"] is None
    assert "add fp32-master to --strategies" in summary["advice"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--strategies", "bf16,nope"], "--strategies: unknown 'nope'; known: bf16"),
        (["--strategies", "A,paper-bf16"], "--strategies: each once"),
        (["--model", "nope"], "model 'nope': no such recipe; known: tiny-gpt"),
        (["--seeds", "0"], "--seeds: needs a number above 0"),
        (["--data", "/nope.txt"], "data '/nope.txt': no such file"),
        (["--finetune", "--finetune-data", "/nope"], "data '/nope': no such file"),
        (["--finetune", "--pretrain-steps", "0"], "--pretrain-steps: needs a number above 0, got 0; to start"),
        (["--pretrain-steps", "3"], "only with --finetune"),
        (["--tokenizer", "/nope.json"], "tokenizer '/nope.json'"),
        (["--betas", "0.9", "1"], "--betas: both need to be in [0, 1), got 0.9 and 1"),
        (["--finetune", "--finetune-data", "SHORT"], "--finetune-data: 5 tokens do not fill one window of 16"),
        (["--data", __file__, "--validation", "SHORT"], "--validation: 5 tokens do not fill one window of 16"),
        (["--out", "/proc/nope"], "--out '/proc/nope': cannot be written to"),
    ],
)
def test_errors_are_one_line(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("brief")
    given = [str(tmp_path / "short.txt") if option == "SHORT" else option for option in given]
    assert main(["compare", "--out", str(tmp_path), *SMALL, *given]) == 2
    told, err = capsys.readouterr()
    assert told == ""  # no bar of a run
    assert message in err
    assert err.count("\n") == 1


def test_an_earlier_comparison_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison(tmp_path, "--strategies", "bf16")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    again = ["compare", "--out", str(tmp_path), *SMALL, "--strategies", "bf16,fp32"]
    assert main(again) == 2
    told, err = capsys.readouterr()
    assert told == ""
    assert "holds summary.json of an earlier comparison; choose another folder, delete this one, or add --over" in err
    assert f"--out '{tmp_path}': " in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "summary.json").unlink()  # as if interrupted
    assert main(again) == 2
    assert "holds metrics.jsonl of an earlier comparison" in capsys.readouterr().err


def test_overwrite_leaves_nothing_of_the_earlier_comparison(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    for name in ("summary.json", "metrics.jsonl", "report.html", "plots/gone.png"):
        (tmp_path / name).write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    summary, metrics = comparison(tmp_path, "--strategies", "bf16", "--overwrite")
    assert summary["strategies"] == ["bf16"]
    assert {row["strategy"] for row in metrics} == {"bf16"}
    assert not (tmp_path / "plots" / "gone.png").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_is_not_of_a_comparison_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "mine.png").write_text("mine")
    comparison(tmp_path, "--strategies", "bf16", "--overwrite")
    assert (tmp_path / "plots" / "mine.png").read_text() == "mine"


def test_overwrite_does_not_replace_a_training_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.json").write_text("{}")
    assert main(["compare", "--out", str(tmp_path), *SMALL, "--overwrite"]) == 2
    assert "holds a run of collage train; choose another folder" in capsys.readouterr().err


def test_ctrl_c_says_where_the_results_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run", interrupted)
    assert main(["compare", "--out", str(tmp_path), *SMALL]) == 130
    assert "metrics.jsonl" in capsys.readouterr().out


# The verdict


def runs(losses: dict[str, list[float]], **fields: dict[str, float]) -> list[dict[str, Any]]:
    """Made-up runs: strategy -> loss by seed; `fields`: name -> strategy -> value."""
    usual = {"edq_ratio": 1.0, "v_ratio": 1.0, "lost": 0.0}
    return [
        {
            **dict.fromkeys(("edq_visible", "edq", "m_error", "edq_shadow", "optimizer_ms", "tokens_per_s")),
            "rescaled": None, "saturated": None,
            **usual, "strategy": strategy, "seed": seed, "val_loss": loss, "initial_loss": 3.0,
            "score": None, "initial_score": None, "mismatch": None, "frozen": [],
            "bytes_per_param": float(STRATEGIES[strategy].bytes_per_param()), "state_bytes": 1, "peak_rss_bytes": 7,
            "peak_device_bytes": None, **{name: of[strategy] for name, of in fields.items() if strategy in of},
        }
        for strategy, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]  # fmt: skip


def advised(found: list[dict[str, Any]], steps: int = 1000, beta2: float = 0.999) -> str:
    rows = verdict.table(list(dict.fromkeys(run["strategy"] for run in found)), found)
    return verdict.advice(rows, found, steps, beta2)


LOSSES = {"bf16": [2.5, 2.6], "collage-light": [2.0, 2.1], "collage-plus": [2.0, 2.1], "fp32-master": [2.0, 2.1]}


def test_table_is_paired_by_seed() -> None:
    rows = verdict.table(["bf16", "fp32-master"], runs({"bf16": [2.5, 2.7], "fp32-master": [2.0, 2.1]}))
    assert rows[0]["difference"] == pytest.approx(0.55)
    assert rows[0]["difference_spread"] == pytest.approx(0.05 * 2**0.5)
    assert rows[0]["kept"] == pytest.approx(0.8 / 1.9)
    assert (rows[1]["difference"], rows[1]["kept"]) == (0.0, 1.0)
    assert rows[0]["peak_memory_bytes"] == 7


def test_advice_is_the_cheapest_that_loses_nothing() -> None:
    assert advised(runs(LOSSES)).startswith("Use collage-light: the cheapest that loses nothing seen here, 10 b")
    poor = {"edq_ratio": {"bf16": 0.1}, "v_ratio": {"collage-light": 1.02}}
    assert advised(runs(LOSSES, **poor)).startswith("Use collage-plus: the cheapest that loses nothing seen here, 12 b")
    worse = {**LOSSES, "collage-plus": [2.3, 2.4]}
    assert advised(runs(worse, **poor)).startswith("Use fp32-master: ")
    nothing = {"edq_ratio": dict.fromkeys(LOSSES, 0.5)}
    assert advised(runs(LOSSES, **nothing)).startswith("None of these strategies")


def test_advice_says_what_it_cannot_know() -> None:
    assert advised(runs({name: losses[:1] for name, losses in LOSSES.items()})).endswith("add --seeds 3.")
    assert "add fp32-master to --strategies" in advised(runs({"collage-plus": [2.0, 2.1]}))
    unmeasured = {"edq_ratio": dict.fromkeys(LOSSES), "v_ratio": dict.fromkeys(LOSSES)}
    assert advised(runs(LOSSES, **unmeasured)).startswith("None of these strategies")
    followed = {name: LOSSES[name] for name in ("collage-light", "fp32-master")}
    assert "Use collage-light: the cheapest compared here" in advised(runs(followed))


def test_advice_calls_ties_of_e4m3_weights_no_merit() -> None:
    lower = {**LOSSES, "fp8-master": [1.5, 1.6], "collage-fp8": [1.6, 1.7], "collage-fp8-lean": [2.2, 2.3]}
    assert "Below fp32-master, which is no merit: fp8-master, collage-fp8; e4m3" in advised(runs(lower))
    within = {**LOSSES, "fp8-master": [1.99, 2.09]}  # the seeds' noise is 0.07
    assert "Below" not in advised(runs(within))
    assert "Below" not in advised(runs({**LOSSES, "bf16": [1.0, 1.1]}))


def test_strategies_without_a_floor_are_named() -> None:
    assert floorless(["bf16", "collage-fp8", "fp8-master"]).startswith("No floors of collage-fp8, fp8-master: ")
    assert not floorless(["bf16", "collage-8bit"])


def test_advice_does_not_judge_a_second_moment_it_has_not_seen() -> None:
    without_shadow = advised(runs(LOSSES, v_ratio=dict.fromkeys(LOSSES)), steps=20)
    assert without_shadow.startswith("Use collage-light: ")
    assert "second moment not measured" in without_shadow
    assert "fp32-master" in advised(runs(LOSSES, v_ratio={"collage-light": None, "collage-plus": None}))  # not finite
    short = "20 steps are too few to judge the second moment at β₂ = 0.999, an average over 1,000."
    assert short in advised(runs(LOSSES), steps=20)
    assert "too few" not in advised(runs(LOSSES), steps=20, beta2=0.95)


def test_advice_never_recommends_what_diverged() -> None:
    nan = float("nan")
    gone = {**LOSSES, "collage-light": [2.0, nan], "bf16": [float("inf"), nan]}
    assert advised(runs(gone)).startswith("Use collage-plus: ")
    assert "Diverged (validation loss not finite): bf16, collage-light." in advised(runs(gone))
    assert "Diverged (validation loss not finite): fp32-master." in advised(runs({**LOSSES, "fp32-master": [nan, nan]}))
    assert advised(runs({name: [nan, nan] for name in LOSSES})).startswith("All of these strategies diverged")


def test_caveats_name_the_kernels_that_were_timed() -> None:
    run = RunConfig.of("tiny-gpt", "x")
    with_kernels, without = (verdict.caveats(run, ["bf16"], 1, kernels) for kernels in ("avx512", PLAIN))
    assert with_kernels[1].startswith("Optimizer times are of avx512 on this machine, at this model's size")
    assert without[1].endswith("(`collage info` says why): they rank no strategy.")


def test_caveats_name_what_no_shadow_follows() -> None:
    run = RunConfig.of("tiny-gpt", "x")
    told = verdict.caveats(run, ["fp32-master"], 2, "avx512", ["h.0.weight", "h.1.weight"])
    assert any(line.startswith("No shadow follows 'h.0.weight' and 1 more, which step as whole") for line in told)
    assert not any("shadow follows" in line for line in verdict.caveats(run, ["fp32-master"], 2, "avx512"))


def test_a_comparison_that_diverges_is_told_and_stops_early(tmp_path: Path) -> None:
    summary, metrics = comparison(tmp_path, "--lr", "1e9", "--strategies", "bf16,fp32-master")
    assert summary["advice"].startswith("All of these strategies diverged")
    assert max(record["step"] for record in metrics) < 6
    assert "diverged" in (tmp_path / "report.html").read_text()


def test_specs_are_not_split_at_their_own_commas() -> None:
    assert options.split("bf16, param=bf16x2,variance=bf16x2,fp32") == ["bf16", "param=bf16x2,variance=bf16x2", "fp32"]


# The command


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for chosen in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit) as end:
            main([*chosen, "--help"])
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert "collage" in out
        assert not chosen or "examples:" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"collage {__version__}\n"


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "reference" in out
    assert all(name in out for name in STRATEGIES)
    assert "Under fp8-master bfloat16 parameters keep bf16+fp32." in " ".join(out.split())
    told = [line.split()[0] for line in out.split("Use it when you want\n")[1].splitlines()]
    assert sorted(told) == sorted(STRATEGIES)


def test_info_tells_the_floor_that_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    (line,) = re.findall(r"^  collage-plus .*default.*", capsys.readouterr().out, re.M)
    assert "increments below 2**-17 theta" in line
    assert len(line) <= 80
    ways = floors.floor(STRATEGIES["collage-plus"].param)
    assert [round(math.log2(way)) for way in ways] == [-17, -18]


@pytest.mark.parametrize(
    ("missing", "argv"),
    [
        ("rich", ["compare"]),
        ("transformers", ["compare"]),
        ("rich", ["preflight", "w.safetensors", "--lr", "1e-5"]),
        ("safetensors", ["preflight", "w.safetensors", "--lr", "1e-5"]),
    ],
)
def test_a_missing_extra_is_named(missing: str, argv: list[str], tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    code = "import sys; sys.modules[sys.argv[1]] = None; from collage.harness.cli import main"
    code += "; sys.exit(main(sys.argv[2:]))"
    line = [sys.executable, "-c", code, missing, *argv]
    run = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 2
    assert f"needs {missing}: pip install '.[train]'" in run.stderr
    assert run.stderr.count("\n") == 1
