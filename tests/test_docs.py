"""Every command and example of README and docs runs, with a reduced number of steps."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from published import RATED, archive, tiny_minilm, tiny_smollm2
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from collage.harness.bench.accuracy import moments
from collage.harness.bench.gradients import accumulate, clip, release
from collage.harness.cli import COMMANDS, main
from collage.harness.report import page as reports
from collage.harness.tasks.pretrained import reviews

ROOT = Path(__file__).parent.parent
# test_results.py follows the commands of its own page, which make the very runs that it records.
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "results.md")]
SHORT = "--steps 4 --batch-size 2 --every 2 --eval-sequences 2"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands():
    """Every `collage …` in a shell block or in backquotes, once."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
        for line in [*lines, *re.findall(r"`(collage [a-z][^`\n]*)`", text)]:
            command = line.partition("#")[0].strip()
            if command.startswith("collage "):
                found[command] = None
    return list(found)


def test_the_pages_show_every_command():
    assert {shlex.split(command)[1] for command in commands()} == set(COMMANDS)


@pytest.fixture
def in_a_folder_with_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("STEADY", "DROPPED"):  # of `collage bench --accuracy`
        monkeypatch.setattr(moments, name, 0.1)
    monkeypatch.setattr(accumulate, "NUMEL", 1000)
    monkeypatch.setattr(clip, "NUMEL", 1000)
    monkeypatch.setattr(release, "SHAPES", {"two": (2, 1000)})
    save_file({"layers.0.norm.weight": torch.ones(64), "layers.0.mlp.weight": torch.randn(8, 8)}, "model.safetensors")
    save_file({"w": torch.ones(4)}, "MODEL.safetensors")
    tiny_minilm(tmp_path / "minilm", monkeypatch)  # the packages of published weights
    tiny_smollm2(tmp_path / "smollm2", monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "collage").mkdir()
    archive(tmp_path / "collage" / reviews.SDIST, RATED * 5)
    Path("mine.tsv").write_text("1\ta good film\n0\ta bad film\n" * 10, encoding="utf-8")
    Path("my.txt").write_text("It is a truth universally acknowledged. " * 500, encoding="utf-8")


@pytest.fixture(autouse=True)
def pages_once(monkeypatch):
    """Drawing a page takes longer than the runs it is of: the first one is drawn; test_report.py has the others."""
    draw = reports.write_report

    def first(out):
        return out / "report.html" if DRAWN else DRAWN.append(out) or draw(out)

    monkeypatch.setattr(reports, "write_report", first)


DRAWN: list[Path] = []
MEASURED: list[str] = []  # what `collage plan --measure` has run of

SMALLER = {"gpt2-xl": "gpt2", "llama-3-8b": "gpt2"}

# Too large to build: the full-size recipes. A test builds them on the meta device.
BIG = ("bert-base", "bert-large", "roberta-base", "gpt-", "openllama-7b")


@pytest.mark.parametrize("command", commands())
@pytest.mark.usefixtures("in_a_folder_with_a_model")
def test_a_command_runs(command, capsys):
    argv = shlex.split(command)[1:]
    if argv[0] in ("compare", "train"):
        argv += shlex.split(SHORT)
        argv += shlex.split("--pretrain-steps 3") if {"--finetune", "finetune"} & {*argv} else []
        argv += shlex.split("--strategies bf16,fp32-master") if argv[0] == "compare" and len(command) > 20 else []
        argv += shlex.split("--seeds 1" if "--optimizer" in argv else "--seeds 2") if "--seeds" in argv else []
    if argv[0] == "sweep":
        argv += shlex.split(f"{SHORT} --strategies bf16,fp32-master --seeds 1")
        argv += shlex.split("--pretrain-steps 3") if "finetune" in argv else []
    if argv[0] == "results":
        argv = ["results", "--help"]  # test_results.py makes runs by it
    if argv[0] == "bench":
        instead = {"--gradients", "--wrapped"} & {*argv}
        argv += [] if instead else shlex.split("--strategies collage-plus --no-others")
        argv += [] if {"--accuracy", "--gradients"} & {*argv} else shlex.split("--params 4K")
        argv += [] if "--accuracy" in argv else shlex.split("--rounds 2")
    if argv[0] == "advise":
        argv += shlex.split("--steps 5 --bandwidth 20 --strategies bf16,collage-plus")  # test_advise.py has real ones
    if argv[0] == "plan" and "--measure" in argv:
        argv.remove("--measure")  # real steps of one small model are enough: each is a process of its own
        measured = ["plan tiny-gpt --sequences 1 --length 16 --strategies bf16 --measure --steps 1"] * (not MEASURED)
        MEASURED.extend(measured)
        assert all(main(shlex.split(line)) == 0 for line in measured), capsys.readouterr().err
    if argv[0] == "plan":
        argv = [SMALLER.get(name, name) for name in argv]  # test_plan.py has large ones
    if argv[0] == "plan" and "--ranks" in argv:
        argv += shlex.split("--sequences 0")
    if any(name.startswith(BIG) for name in argv) or "--help" in argv:
        argv = [argv[0] if "--help" in argv else "train", "--help"]
        with pytest.raises(SystemExit, match="0"):
            main(argv)
        return
    if argv[:2] == ["convert", "runs/mine"]:
        assert main(shlex.split(f"train --out runs/mine --save-every 2 {SHORT}")) == 0
    if argv[:1] == ["train"] and "--resume" in argv:
        assert main([a for a in argv if a != "--resume"]) == 0
    assert main(argv) == 0, capsys.readouterr().err


def python_examples():
    """Of all pages but the recipes, which test_extending.py follows: they add rows to tables."""
    for page in (page for page in PAGES if page.name != "extending.md"):
        for i, code in enumerate(blocks(page, "python")):
            whole = "import " in code and "import Trainer" not in code and "\n..." not in code
            if whole:
                yield pytest.param(code, id=f"{page.name}-{i}")


@pytest.mark.parametrize("page", ["README.md", "docs/frameworks.md"])
def test_the_trainer_example_runs(page, tmp_path):
    (code,) = (code for code in blocks(ROOT / page, "python") if "import Trainer" in code)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).bfloat16()
    args = TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, dataloader_pin_memory=False, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16
    names = {"model": model, "args": args, "data": data}
    exec(compile(code, "example", "exec"), names)
    first, second, _ = names["trainer"].state.log_history
    assert first["edq_ratio"] == pytest.approx(1.0, abs=0.01)
    assert "edq_ratio" not in second  # of every tenth step, and the first


@pytest.mark.parametrize("code", list(python_examples()))
def test_an_example_runs(code, capsys):
    others = re.findall(r"^(?:import|from) (lightning|peft|torchtitan)", code, re.M)
    for module in others:
        pytest.importorskip(module, reason="no dependency of this project: its examples were run by hand")
    with warnings.catch_warnings():
        if others or "torch.distributed.optim" in code:
            warnings.simplefilter("ignore")  # theirs
        exec(compile(code, "example", "exec"), {})
    for line in re.findall(r"print\(.*\)\s*#\s*(.*)", code):
        assert line in capsys.readouterr().out
