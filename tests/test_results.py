"""docs/results.md is what its records say, and its records are what the runs give."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from collage.harness.cli import main
from collage.harness.compare import command as compare
from collage.harness.machine import machine
from collage.harness.results import judged
from collage.harness.results.command import RECORDS, text_of
from collage.harness.results.page import Section, experiments
from collage.harness.results.plots import write_plots
from collage.harness.results.records import Records
from collage.harness.results.studies import EVIDENCE, Evidence
from collage.harness.sweep import command as sweep
from collage.harness.sweep.store import Asked, Store, Stored, machine_class
from collage.harness.sweep.study import Study
from collage.harness.train.config import RunConfig

# Nats. On another machine class matrix products are added up in another order, and training carries a last bit a long
# way: 200 steps of tiny-resnet with torch's AVX2 instead of its AVX-512 kernels end 0.0006 apart.
ELSEWHERE = 0.005

DOCS = Path(__file__).parent.parent / "docs"


def recorded(evidence: Evidence, folder: Path, losses: dict[str, list[float]]) -> None:
    """Made-up records of a study without an axis: strategy -> loss by seed."""
    made = {"machine": {"cpu": "Some CPU", "threads": "1", "torch": "2.13.0", "kernels": "avx2", "compute": "float32"}}
    records = Records()
    for job in evidence.study().jobs():
        name, seed = job.config.strategy, job.config.seed
        run = {
            "strategy": name, "seed": seed, "last_step": 300, "val_loss": losses[name][seed], "initial_loss": 5.6,
            "score": None, "initial_score": None, "edq_ratio": 0.9876543219, "lost": 0.25, "v_ratio": 1.0,
            "bytes_per_param": 12.0, "seconds": 60.0,
        }  # fmt: skip
        records.add(Stored(job.asked, run, 61.0, {**made, "version": "0.1.0"}))
    records.write(folder / f"{evidence.name}.json")


TOY = Evidence("toy", "A toy", "pretrain", 3, "What it is.", strategies=("bf16", "collage-plus", "fp32-master"))
LOSSES = {"bf16": [2.5, 2.61, 2.4], "collage-plus": [2.001, 2.1, 1.999], "fp32-master": [2.0, 2.1, 2.0]}


def test_the_page_is_what_its_records_say() -> None:
    page = text_of(DOCS, [Section.of(evidence, DOCS / RECORDS) for evidence in EVIDENCE])
    assert page == (DOCS / "results.md").read_text(encoding="utf-8"), "`collage results --no-runs` writes it anew"


def test_plots_of_the_page_are_there() -> None:
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (DOCS / "results.md").read_text(encoding="utf-8"))
    assert [path for path in shown if not (DOCS / path).is_file()] == []


def test_no_record_is_of_a_run_that_is_not_wanted() -> None:
    for evidence in EVIDENCE:
        wanted = {job.asked.name for job in evidence.study().jobs()}
        assert Records.read(DOCS / RECORDS / f"{evidence.name}.json").runs.keys() <= wanted, evidence.name


def test_every_experiment_of_the_paper_that_a_study_stands_for_is_one() -> None:
    names = [name for name, _ in experiments((DOCS / "paper.md").read_text(encoding="utf-8"))]
    assert len(names) > 8
    for evidence in EVIDENCE:
        assert len([name for name in names if name.startswith(evidence.paper)]) == 1 or not evidence.paper


@pytest.mark.parametrize("evidence", EVIDENCE, ids=lambda evidence: evidence.name)
def test_the_command_of_a_section_makes_its_very_runs(evidence: Evidence) -> None:
    _, name, *argv = shlex.split(evidence.command())
    parser = argparse.ArgumentParser()
    command = {"compare": compare, "sweep": sweep}[name]
    command.add_arguments(parser)
    args = parser.parse_args(argv)
    if name == "sweep":
        study = sweep.study_of(args)
    else:
        asked = compare.comparison_of(args)
        study = Study(asked.plan, asked.strategies, asked.seeds)
    assert [job.asked for job in study.jobs()] == [job.asked for job in evidence.study().jobs()]


def test_a_section(tmp_path: Path) -> None:
    recorded(TOY, tmp_path, LOSSES)
    section = Section.of(TOY, tmp_path)
    page = text_of(DOCS, [section])
    assert "| bf16 | 2.5033 ± 0.1050 | +0.4700 ± 0.0608 | +0.3189 … +0.6211 | 0.006 | 0.9877 | 25 % | 12 |" in page
    assert "| fp32-master | 2.0333 ± 0.0577 | – | – | – | 0.9877 | 25 % | 12 |" in page
    assert (
        "`collage-plus` loses no more than 0.01 nats, with all of the interval; `bf16` loses more than 0.01 nats, and "
        "than twice the standard error." in page
    )
    assert "collage compare --task pretrain --strategies bf16,collage-plus,fp32-master --seeds 3" in page
    assert "9 runs, 9 min, on Some CPU, avx2 kernels, float32, threads 1, torch 2.13.0." in page
    write_plots(section, tmp_path / "plots")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["differences.png"]


def test_what_the_seeds_do_not_settle_is_said(tmp_path: Path) -> None:
    recorded(TOY, tmp_path, {**LOSSES, "collage-plus": [2.2, 2.1, 1.9], "bf16": [math.nan, 2.1, 2.0]})
    page = text_of(DOCS, [Section.of(TOY, tmp_path)])
    assert "`bf16` diverges under some seed; these seeds do not settle it for `collage-plus`." in page
    assert "| bf16 | diverged | – |" in page


def test_records_of_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    recorded(TOY, tmp_path, LOSSES)
    other = dataclasses.replace(TOY, settings={"lr": 2e-3})
    assert Section.of(other, tmp_path).runs is None
    assert "Not run yet: `make results` does" in text_of(DOCS, [Section.of(other, tmp_path)])


def test_what_is_missing_is_run_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, of which a record is what a run gives; what is recorded is not run again."""
    small = {"steps": 3, "batch_size": 2, "seq_len": 16, "every": 2, "eval_sequences": 2}
    toy = dataclasses.replace(TOY, seeds=1, strategies=("bf16", "fp32-master"), settings=small)
    monkeypatch.setattr("collage.harness.results.command.EVIDENCE", (toy,))
    (tmp_path / "paper.md").write_text((DOCS / "paper.md").read_text(encoding="utf-8"), encoding="utf-8")
    line = ["results", "--docs", str(tmp_path), "--store", str(tmp_path / "store")]
    assert main(line) == 0
    runs = json.loads((tmp_path / "results" / "toy.json").read_text())["runs"]
    assert [run["strategy"] for run in runs] == ["bf16", "fp32-master"]
    assert {run["val_loss"] for run in runs} == {one.run["val_loss"] for one in Store(tmp_path / "store").all()}
    assert "2 runs" in (tmp_path / "results.md").read_text(encoding="utf-8")
    monkeypatch.setattr("collage.harness.experiment.Experiment.run", None)
    assert main(line) == 0


def test_a_study_that_lacks_a_package_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vision = next(evidence for evidence in EVIDENCE if evidence.task == "vision")
    monkeypatch.setattr("collage.harness.results.command.EVIDENCE", (vision,))
    monkeypatch.setattr("collage.harness.tasks.registry.find_spec", lambda module: None)
    (tmp_path / "paper.md").write_text((DOCS / "paper.md").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["results", "--docs", str(tmp_path), "--store", str(tmp_path / "store")]) == 0
    told = capsys.readouterr().out
    assert f"{vision.title}: left out, task 'vision': needs the package sklearn" in told
    assert "Not run yet: `make results` does, where `[vision]` is installed." in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("lost", [False, True])
def test_the_advice_is_judged(lost: bool, tmp_path: Path) -> None:
    losses = {"fp32-master": 2.0, "collage-plus": 2.5 if lost else 2.0, "bf16": 2.5}
    stored = []
    for name, loss in losses.items():
        for seed in (0, 1):
            config = RunConfig.of("tiny-llama", "x", strategy=name, seed=seed)
            run = {"strategy": name, "seed": seed, "val_loss": loss}
            stored.append(Stored(Asked.of("pretrain", config), run, 1.0, {}))
    records = judged.judge(stored, lambda _: {"bf16": "loses", "collage-plus": "safe", "fp32-master": "safe"})
    assert [(r["strategy"], r["verdict"], r["outcome"]) for r in records] == [
        ("collage-plus", "safe", "lost" if lost else "kept"),
        ("bf16", "loses", "lost"),
    ]
    judged.write(records, tmp_path / "advice.json")
    text = judged.text(judged.read(tmp_path / "advice.json"))
    assert f"| safe | {int(not lost)} | {int(lost)} |" in text
    assert "| loses | 0 | 1 |" in text
    assert "| pretrain | tiny-llama | 0.001 | 0.9 0.999 | 0.1 |" in text
    assert ("1: collage-plus " in text, "bf16 +0.5000" in text) == (True, True)
    assert ("Called safe, and lost: collage-plus on pretrain (tiny-llama) at lr 0.001, betas 0.9 0.999" in text) == lost


def test_a_folder_without_runs_is_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "paper.md").write_text("")
    (tmp_path / "results" / "advice.json").write_text('{"cells": []}')
    assert main(["results", "--docs", str(tmp_path), "--judge", str(tmp_path / "nosuchdir")]) == 2
    assert "nosuchdir': holds no runs of a sweep" in capsys.readouterr().err
    assert (tmp_path / "results" / "advice.json").read_text() == '{"cells": []}'


def test_runs_without_a_reference_are_not_judged() -> None:
    config = RunConfig.of("tiny-llama", "x", strategy="bf16")
    run = {"strategy": "bf16", "seed": 0, "val_loss": 2.0}
    assert judged.judge([Stored(Asked.of("pretrain", config), run, 1.0, {})], lambda _: {"bf16": "safe"}) == []


def quickest() -> tuple[Any, Any] | None:
    """The recorded run of the fewest seconds that is judged by nats, and its job."""
    found = [
        (run, job)
        for evidence in EVIDENCE
        if evidence.of_task.loss.unit == "nats"
        for job in evidence.study().jobs()
        if (run := Records.read(DOCS / RECORDS / f"{evidence.name}.json").runs.get(job.asked.name))
    ]
    return min(found, key=lambda pair: pair[0]["seconds"], default=None)


def test_a_number_of_the_page_is_what_its_run_gives() -> None:
    """To the last bit on the machine class of the record; on another, sums are added in another order."""
    found = quickest()
    if found is None:
        pytest.skip("nothing is recorded")
    run, job = found
    job.experiment().plan.task.require()
    result, _ = job.run(lambda name, steps: lambda done: None)
    if machine_class(machine(job.config.compute_dtype())) == run["machine"]:
        assert (result.val_loss, result.score) == (run["val_loss"], run["score"])
    else:
        assert result.val_loss == pytest.approx(run["val_loss"], abs=ELSEWHERE)
