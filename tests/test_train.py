"""`collage train` and the run behind it: precision, checkpoints, resume."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BARE, assert_same_bits
from safetensors.torch import save_file
from torch import nn

import collage
from collage import STRATEGIES, fp8
from collage.formats import format_of
from collage.harness.cli import main
from collage.harness.tasks import recipes
from collage.harness.tasks.recipes import RECIPES, build
from collage.harness.tasks.weights import read
from collage.harness.text import to_json
from collage.harness.train import building, checkpoints, training
from collage.harness.train.command import add_arguments, settings_of
from collage.harness.train.config import RunConfig
from collage.harness.train.meters import UpdateSizes
from collage.harness.train.recording import label
from collage.harness.train.trainer import PrecisionTrainer, arguments
from collage.monitor.shadow import Shadow

TINY = ("tiny-llama", "tiny-gpt", "tiny-bert", "tiny-roberta")


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Twenty windows of 16 bytes, so that five steps of four sequences are an epoch; and a validation text."""
    (tmp_path / "train.txt").write_text("".join(chr(97 + (k * k) % 26) for k in range(320)))
    (tmp_path / "validation.txt").write_text("abcdefghijklmnop" * 8)
    return str(tmp_path)


def config(text: str, out: Path | str, model: str = "tiny-llama", **given: Any) -> RunConfig:
    files = {"data": (f"{text}/train.txt",), "validation": (f"{text}/validation.txt",)}
    small = {"steps": 6, "batch_size": 4, "seq_len": 16, "every": 2, "lr": 1e-3}
    return RunConfig.of(model, out, **{**files, **small, **given})


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: the weights, and the optimizer's planes."""
    weights = {entry.name: entry.tensor for entry in read(path / "model.safetensors") if entry.tensor is not None}
    state = torch.load(path / "optimizer.pt", weights_only=True)["state"]
    return weights | {f"{i}.{key}": plane for i, planes in state.items() for key, plane in planes.items()}


def assert_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        same = tensor.contiguous().reshape(-1).view(torch.uint8) == other[name].contiguous().reshape(-1).view(
            torch.uint8
        )
        assert bool(same.all()), f"{name}: {int((~same).sum())} of {same.numel()} bytes differ"


def test_a_difference_is_found() -> None:
    with pytest.raises(AssertionError, match="w: 1 of 8 bytes differ"):
        assert_identical({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, -0.0])})


# What is built


@pytest.mark.parametrize("model", TINY)
def test_parameters_are_cast_and_buffers_are_not(text: str, model: str) -> None:
    built = building.model_of(config(text, "x", model), config(text, "x", model).corpus())
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in built.buffers() if b.is_floating_point()} <= {torch.float32}


def test_every_strategy_starts_from_the_same_rounded_weights(text: str) -> None:
    low, full = config(text, "x", strategy="bf16"), config(text, "x", strategy="fp32")
    corpus = low.corpus()
    pairs = zip(building.model_of(low, corpus).parameters(), building.model_of(full, corpus).parameters(), strict=True)
    for p, exact in pairs:
        assert (p.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
        assert_same_bits("weight", p.float(), exact)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_compute_in_one_dtype_and_gradients_in_the_parameters(
    text: str, tmp_path: Path, model: str, compute: str
) -> None:
    """The loss is that of the model converted as a whole; tied weights stay tied and get one gradient."""
    run = config(text, tmp_path / "run", model, compute=compute, strategy="bf16")
    corpus = run.corpus()
    built, (data, _) = building.model_of(run, corpus), building.datasets(run, corpus)
    trainer = PrecisionTrainer(model=built, args=arguments(run, "none", 4), compute_dtype=run.compute_dtype())
    batch = {key: torch.stack([data[i][key] for i in range(4)]) for key in ("input_ids", "labels")}
    trainer.compute_loss(built, batch).backward()
    gradients = {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(built.named_parameters()).keys()
    assert {g.dtype for g in gradients.values()} == {torch.bfloat16}
    if compute == "fp32":
        built.float().zero_grad()
        loss = built(**batch).loss
        loss.backward()
        assert_same_bits("loss", trainer.compute_loss(built, batch), loss)
        for name, p in built.named_parameters():
            assert_same_bits(name, gradients[name], p.grad.bfloat16())


def test_decay_spares_biases_and_norms_of_masked_models(text: str) -> None:
    for model, groups in (("tiny-bert", 2), ("tiny-gpt", 1)):
        run = config(text, "x", model)
        optimizer = building.optimizer_of(run, building.model_of(run, run.corpus()))
        assert len(optimizer.param_groups) == groups
    bert = building.optimizer_of(
        config(text, "x", "tiny-bert"), building.model_of(config(text, "x", "tiny-bert"), run.corpus())
    )
    decayed, spared = (set(group["param_names"]) for group in bert.param_groups)
    assert not any("LayerNorm" in name or name.endswith("bias") for name in decayed)
    assert all("LayerNorm" in name or name.endswith("bias") for name in spared)
    assert bert.param_groups[1]["weight_decay"] == 0.0


def test_labels_are_short() -> None:
    assert label("bert.encoder.layer.1.attention.self.query.weight") == "layer 1 attention query"
    assert label("transformer.h.0.ln_1.bias") == "layer 0 ln_1 bias"
    assert label("lm_head.weight") == "lm_head"


def test_json_knows_no_nan() -> None:
    text = to_json({"loss": float("nan"), "curve": [(1, float("inf")), (2, 0.5)]})
    assert json.loads(text) == {"loss": None, "curve": [[1, None], [2, 0.5]]}


# Settings


def test_defaults_come_from_the_recipe() -> None:
    bert = RunConfig.of("bert-base", "x", phase=2)
    assert (bert.seq_len, bert.lr, bert.batch_size, bert.eps, bert.schedule) == (512, 2.8e-4, 32768, 1e-6, "linear")
    tuned = RunConfig.of("tiny-llama", "x", finetune=True)
    assert (tuned.lr, tuned.schedule) == (1e-5, "constant")
    for name in RECIPES:
        RunConfig.of(name, "x")


def test_schedules() -> None:
    settings = {"steps": 110, "warmup_steps": 10}
    linear, cosine, constant = (
        [RunConfig.of("tiny-llama", "x", schedule=name, **settings).lr_scale(k) for k in (0, 9, 10, 60, 110)]
        for name in ("linear", "cosine-to-a-tenth", "constant")
    )
    assert linear == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])
    assert cosine == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1])
    assert constant == pytest.approx([0.1, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "nope"}, "strategy: unknown 'nope'; known: bf16, "),
        ({"steps": 0}, "steps: needs an integer >= 1, got 0"),
        ({"lr": -1.0}, "lr: needs a finite number > 0"),
        ({"schedule": "up"}, "schedule: unknown 'up'; known: linear"),
        ({"batch_size": 4, "micro_batch": 3}, "micro_batch: must divide batch_size"),
        ({"seq_len": 1000}, "seq_len: 'tiny-llama' has 128 positions, got 1000"),
        ({"phase": 2}, "phase: 'tiny-llama' has 1"),
        ({"betas": (1.0, 2.0)}, "betas: both need to be in [0, 1), got 1 and 2"),
        ({"steps": 20, "warmup_steps": 50}, "warmup_steps: 50 are more than the 20 of --steps"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RunConfig.of("tiny-llama", "x", **given)


@pytest.mark.parametrize("model", [name for name in RECIPES if name.startswith("tiny-")])
def test_e4m3_strategies_are_refused_where_no_layer_is_converted(model: str) -> None:
    try:
        fp8.convert(build(model))
    except ValueError:
        other = {"tiny-gpt": "tiny-llama", "tiny-resnet": "tiny-vit"}[model]
        with pytest.raises(ValueError, match=f"strategy: 'fp8-master' .* '{model}' .* --model {other}"):
            RunConfig.of(model, "x", strategy="fp8-master")
    else:
        assert RunConfig.of(model, "x", strategy="fp8-master").recipe.convertible


def test_every_setting_is_an_option_and_its_default_the_recipes() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = {action.dest for action in parser._actions if action.help} - {"help"}
    assert flags == {f.name for f in fields(RunConfig)}
    nothing_given = settings_of(parser.parse_args([]))
    assert nothing_given == RunConfig.of("tiny-llama", "runs/train", save_every=100, eval_every=100)
    all_kinds = ["--betas", "0.8", "0.9", "--data", "a", "b", "--init", "w", "--beside", "A", "--lr", "2", "--resume"]
    found = RunConfig.from_options(parser.parse_args(all_kinds))
    assert (found.betas, found.data, found.init, found.beside) == ((0.8, 0.9), ("a", "b"), "w", ("paper-bf16",))
    assert (found.lr, found.resume, found.finetune) == (2.0, True, False)


# Running


@pytest.mark.parametrize("model", TINY)
def test_a_run_learns_and_tells_all(text: str, tmp_path: Path, model: str) -> None:
    records: list[dict[str, Any]] = []
    run = config(text, tmp_path / "run", model, steps=8, eval_every=4, save_every=4, micro_batch=2)
    result = training.run(run, record=records.append, histogram=True)
    assert result.val_loss < result.initial_loss
    assert list(result.curve) == [0, 4, 8]
    assert result.to_dict()["bytes_per_param"] == STRATEGIES["collage-plus"].bytes_per_param()
    assert set(result.bytes_by_slot) == {"gradient", "param", "param_lo", "exp_avg", "exp_avg_sq", "exp_avg_sq_lo"}
    assert result.optimizer_ms is not None
    assert result.optimizer_ms > 0
    assert result.peak_rss_bytes > 10**8
    assert sum(result.update_histogram["counts"]) > 1000
    measured = [r for r in records if r["kind"] == "train" and r["edq_ratio"] is not None]
    assert [r["step"] for r in measured] == [1, 2, 4, 6, 8]  # every logged step
    assert all(0.99 < r["edq_ratio"] < 1.01 and len(r["lost_by_layer"]) > 10 for r in measured)
    assert json.loads(json.dumps(result.to_dict()))["lost"] < 0.1


@pytest.mark.parametrize("strategy", ["fp32", "collage-plus", "paper-plus", "collage-plus-sr"])
def test_sizes_of_updates_are_those_that_the_rule_intends(strategy: str) -> None:
    """Adam's first step is lr: 2**-10 at weights of 1.5, an eighth of bf16's ulp there, whatever arrives of it."""
    w = nn.Parameter(torch.full((100,), 1.5, dtype=STRATEGIES[strategy].dtype))
    opt = collage.AdamW([("w", w)], lr=2.0**-10, weight_decay=0.0, strategy=strategy)
    sizes = UpdateSizes(opt, every=1, stride=10)
    w.grad = torch.ones_like(w)
    opt.step()
    found = {edge: count for edge, count in zip(sizes.EDGES, sizes.counts.tolist(), strict=False) if count}
    assert found.keys() <= {-3.5, -3.0}
    assert sum(found.values()) == 16  # a run of neighbours


def test_a_monitors_own_time_is_not_the_optimizers(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpatched = Shadow.before

    def slow(*args: Any) -> None:
        time.sleep(0.2)
        unpatched(*args)

    monkeypatch.setattr(Shadow, "before", slow)
    result = training.run(config(text, tmp_path, every=3))
    assert result.optimizer_ms is not None
    assert 0 < result.optimizer_ms < 150


def test_bytes_of_every_strategy_are_those_of_the_table(text: str, tmp_path: Path) -> None:
    run = config(text, tmp_path)
    corpus = run.corpus()
    shapes = [p.shape for p in build(run.model, device="meta").parameters()]
    for name, strategy in BARE.items():
        result = training.run(config(text, tmp_path / name, strategy=name, steps=1, eval_sequences=4), corpus)
        found = result.to_dict()["bytes_per_param"]
        if not strategy.exception:
            assert found == strategy.bytes_per_param(), name
        counted = sum(
            shape.numel() * strategy.dtype.itemsize
            + sum(
                math.prod(plane.shape(shape)) * plane.dtype.itemsize
                for form in strategy.of(shape).formats()
                for plane in format_of(form).planes
            )
            for shape in shapes
        )
        assert found == counted / sum(map(torch.Size.numel, shapes)), name


def test_the_monitor_does_not_change_the_run(text: str, tmp_path: Path) -> None:
    runs = [
        training.run(config(text, tmp_path / str(k), "tiny-bert", **given)).weights
        for k, given in enumerate([{"every": 1, "beside": ("bf16",)}, {"every": 50, "shadow": 0}])
    ]
    assert_identical(*runs)


def test_codes_to_start_from_name_the_runs_weights(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    save_file(fp8.convert(nn.Linear(32, 32)).state_dict(), checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"'weight': e4m3 codes, .*save_pretrained"):
        building.read_weights(str(checkpoint))
    save_file(nn.Linear(32, 32).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"give .*/weights.safetensors, the run's last weights in float32"):
        building.read_weights(str(checkpoint))


def test_weights_to_start_from(text: str, tmp_path: Path) -> None:
    """A file of `collage train` and a transformers folder; a model of another shape is refused."""
    run = config(text, tmp_path / "a", "tiny-gpt", strategy="bf16", steps=2, save_every=2)
    result = training.run(run)
    folder = str(tmp_path / "a" / "checkpoint-2")
    again = building.model_of(run, run.corpus(), building.read_weights(folder))
    for name, p in again.named_parameters():
        assert_same_bits(name, p, result.weights[name].bfloat16())
    with pytest.raises(ValueError, match="init: has no weight"):
        building.model_of(config(text, "x", "tiny-bert"), run.corpus(), building.read_weights(folder))
    with pytest.raises(ValueError, match="init: weight 'w' has shape"):
        building._take(nn.ParameterDict({"w": torch.zeros(2)}), {"w": torch.zeros(3)})


def test_weights_of_another_shape_are_refused_before_anything_is_written(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocab = config(text, "x").tokens().vocab_size
    weights = {name: p.detach().clone() for name, p in recipes.build("tiny-bert", vocab).named_parameters()}
    name, p = list(weights.items())[3]
    save_file({**weights, name: p[:-1].clone()}, tmp_path / "w.safetensors")
    assert main([*arguments_of(text, tmp_path / "run"), "--init", str(tmp_path / "w.safetensors")]) == 2
    printed, err = capsys.readouterr()
    shapes = f"has shape {tuple(p[:-1].shape)}, the model's is {tuple(p.shape)}"
    assert f"--init: weight '{name}' {shapes}; give the same --model and --tokenizer" in err
    assert printed == ""
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_change_nothing() -> None:
    model = nn.ParameterDict({"a": torch.zeros(2), "w": torch.zeros(2)})
    with pytest.raises(ValueError, match="init: weight 'w' has shape"):
        building._take(model, {"a": torch.ones(2), "w": torch.ones(3)})
    assert_same_bits("a", model["a"], torch.zeros(2))


# Checkpoints and resume

# Of the strategies, one of each kind of format and arithmetic.
SOME = ("bf16", "collage-plus-sr", "collage-exact", "collage-8bit", "fp32-master", "kahan", "collage-fp16")


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [
        *(pytest.param("adamw", s, marks=[] if s in SOME else pytest.mark.slow) for s in STRATEGIES),
        ("sgd", "collage-plus"),
        ("lion", "collage-plus-sr"),
        ("wrap:schedulefree.AdamWScheduleFree", "collage-plus-sr"),
        ("wrap:torch.optim.Adafactor", "collage-exact"),
    ],
)
def test_resume_is_bit_exact(text: str, tmp_path: Path, optimizer: str, strategy: str) -> None:
    settings = {"optimizer": optimizer, "strategy": strategy, "steps": 6, "save_every": 3}
    straight = config(text, tmp_path / "straight", **settings, keep=9)
    corpus = straight.corpus()
    training.run(straight, corpus)
    resumed = config(text, tmp_path / "resumed", **settings, resume=True, every=5)
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    start, skipped = checkpoints.newest_whole(resumed.out)
    assert start is not None
    assert skipped == []
    training.run(resumed, corpus, resume=start)
    assert_identical(tensors(straight.out / "checkpoint-6"), tensors(resumed.out / "checkpoint-6"))


def arguments_of(text: str, out: Path) -> list[str]:
    return [
        "train", "--model", "tiny-bert", "--strategy", "collage-plus-sr", "--out", str(out), "--steps", "40",
        "--batch-size", "4", "--seq-len", "16", "--save-every", "3", "--every", "4", "--eval-every", "7",
        "--data", f"{text}/train.txt", "--validation", f"{text}/validation.txt",
    ]  # fmt: skip


def checkpoint(run: Path, step: int) -> Path:
    """A complete one, with contents made up."""
    staged = run / checkpoints.STAGING / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    for name in checkpoints.REQUIRED:
        (staged / name).write_text(f"{name} of step {step}")
    (staged / "rng_state.pth").write_text("random")
    return checkpoints.publish(staged, run, {"processes": 1})


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("optimizer.pt", "optimizer.pt is missing"),
        ("scheduler.pt", "scheduler.pt is missing"),
        ("complete.json", "it has no complete.json"),
    ],
)
def test_an_incomplete_checkpoint_is_set_aside(tmp_path: Path, name: str, problem: str) -> None:
    for step in (5, 10, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-100" / name).unlink()
    start, skipped = checkpoints.newest_whole(tmp_path)
    assert start == tmp_path / "checkpoint-10"
    assert len(skipped) == 1
    assert skipped[0].startswith(f"skipped checkpoint-100: {problem}")
    assert [path.name for path in checkpoints.all_in(tmp_path)] == ["checkpoint-5", "checkpoint-10"]


def test_a_truncated_file_and_a_damaged_manifest_are_found(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 1)
    assert checkpoints.problem_of(whole) is None
    (whole / "optimizer.pt").write_text("o")
    assert checkpoints.problem_of(whole) == "optimizer.pt has 1 bytes instead of 22"
    (whole / "complete.json").write_text("[]")
    assert checkpoints.problem_of(whole) == "its complete.json cannot be read"
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is whole \(checkpoint-1: its complete.json cannot be read"
    ):
        checkpoints.newest_whole(tmp_path)
    assert whole.exists()  # not set aside: nothing would be left


def test_an_unfinished_write_is_neither_resumed_from_nor_counted(text: str, tmp_path: Path) -> None:
    run = config(text, tmp_path / "run", steps=4, save_every=1, keep=2)
    left = run.out / checkpoints.STAGING / "checkpoint-9"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    assert checkpoints.newest_whole(run.out) == (None, [])
    training.run(run)
    assert [path.name for path in checkpoints.all_in(run.out)] == ["checkpoint-3", "checkpoint-4"]
    assert not left.parent.exists()


def test_two_runs_are_not_mixed(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*arguments_of(text, tmp_path / "run"), "--steps", "4"]
    assert main(command) == 0
    assert main(command) == 2
    assert "holds checkpoint-4 of an earlier run; add --resume" in capsys.readouterr().err
    assert main([*command, "--resume", "--lr", "0.1"]) == 2
    assert "lr: saved 0.001, here 0.1" in capsys.readouterr().err


def told(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def test_a_finished_run_is_left_as_it_is(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*arguments_of(text, tmp_path), "--steps", "4"]
    assert main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()}
    assert main([*command, "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "already finished" in capsys.readouterr().out
    assert told(tmp_path)["since_step"] == 0
    # Killed after the last checkpoint: nothing is measured any more, and nothing is said to be.
    (tmp_path / "result.json").unlink()
    assert main([*command, "--resume"]) == 0
    assert "; since step 4 alone: no EDQ" in capsys.readouterr().out
    unknown = ("edq_ratio", "optimizer_ms", "bytes_per_param", "state_bytes")
    assert [told(tmp_path)[key] for key in unknown] == [None] * 4


def test_a_resumed_run_says_what_its_numbers_cover(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments_of(text, tmp_path), "--steps", "4"]
    assert main(command) == 0
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "result.json").unlink()
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    assert "; since step 3 alone: EDQ ratio " in capsys.readouterr().out
    assert (told(tmp_path)["since_step"], told(tmp_path)["last_step"]) == (3, 4)
    assert told(tmp_path)["bytes_per_param"] == 12


def test_a_run_without_checkpoints_is_not_overwritten(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments_of(text, tmp_path), "--steps", "1", "--save-every", "0"]
    assert main(command) == 0
    assert main(command) == 2
    assert "holds result.json of an earlier run; empty it, or choose another folder" in capsys.readouterr().err


def test_a_run_that_diverges_ends_and_says_so(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*arguments_of(text, tmp_path), "--lr", "1e38", "--save-every", "0"]
    assert main(command) == 1
    assert "diverged: the loss of step 4 is not finite; lower --lr" in capsys.readouterr().out
    assert (told(tmp_path)["val_loss"], told(tmp_path)["last_step"]) == (None, 4)
    assert main([*command, "--resume"]) == 1
    assert "already finished: diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "nope"], "model 'nope': no such recipe"),
        (["--strategy", "colage-plus"], "--strategy: unknown 'colage-plus'"),
        (["--beside", "bf16", "nope"], "--beside: unknown 'nope'"),
        (["--betas", "1", "2"], "--betas: both need to be in [0, 1), got 1 and 2"),
        (["--warmup-steps", "50"], "--warmup-steps: 50 are more than the 40 of --steps"),
        (["--data", "SHORT"], "--data: 5 tokens do not fill one window of 16; give more text"),
        (["--data", "nope.txt"], "data 'nope.txt': no such file or folder"),
        (["--batch-size", "4000"], "fewer than a step's 4000"),
        (["--init", "nope.safetensors"], "nope.safetensors"),
        (["--out", "/proc/nope"], "--out '/proc/nope': cannot be written to"),
    ],
)
def test_errors_are_one_line(
    text: str, tmp_path: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("brief")
    given = [str(tmp_path / "short.txt") if option == "SHORT" else option for option in given]
    assert main([*arguments_of(text, tmp_path / "run"), *given]) == 2
    printed, err = capsys.readouterr()
    assert printed == ""  # no bar of a run
    assert message in err
    assert err.count("\n") == 1
