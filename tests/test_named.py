"""Optimizers by name: in the library, and in `collage train` and `collage compare`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import collage
from collage.harness.cli import main
from collage.harness.report import page
from collage.harness.report.plots import setting
from collage.harness.report.results import Comparison
from collage.harness.train import choice, training
from collage.harness.train.config import RunConfig
from collage.optimizers.named import OURS, find, make_optimizer

RECIPE = {"lr": 4e-4, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def stepped(opt: torch.optim.Optimizer, w: nn.Parameter) -> torch.Tensor:
    for k in range(3):
        w.grad = torch.arange(8.0).reshape(2, 4).sub(k).mul(0.1).bfloat16()
        opt.step()
    return w.detach()


# In the library


@pytest.mark.parametrize("name", OURS)
def test_a_name_makes_the_optimizer_of_that_class(name: str) -> None:
    made, own = (nn.Parameter(torch.ones(2, 4).bfloat16()) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.5}
    found = stepped(make_optimizer(name, [("w", made)], "collage-light", seed=3, **settings), made)
    want = stepped(OURS[name]([("w", own)], strategy="collage-light", seed=3, **settings), own)
    assert_same_bits(name, found, want)


@pytest.mark.parametrize("strategy", ["collage-plus-sr", "fp32-master"])
def test_a_wrapped_one_is_what_wrap_makes(strategy: str) -> None:
    made, own = (nn.Parameter(torch.ones(2, 4).bfloat16()) for _ in range(2))
    settings = {"lr": 0.1, "momentum_decay": 0.01, "seed": 3, "states": {"exp_avg": "fp32"}}
    opt = make_optimizer("wrap:torch.optim.NAdam", [("w", made)], strategy, **settings)
    found = stepped(opt, made)
    want = stepped(collage.wrap(torch.optim.NAdam, [("w", own)], strategy=strategy, **settings), own)
    assert_same_bits(strategy, found, want)
    assert opt.param_groups[0]["param_names"] == ["w"]


def test_another_optimizer_is_imported_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("wrap:torch.optim.NAdam").kind is torch.optim.NAdam
    (tmp_path / "their_optimizers.py").write_text("import torch\nclass Mine(torch.optim.SGD):\n    pass\n")
    (tmp_path / "unfinished.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find("wrap:their_optimizers.Mine").kind.__name__ == "Mine"
    with pytest.raises(ValueError, match="unfinished needs 'a_package_that_is_not_there', which is not installed"):
        find("wrap:unfinished.Mine")
    (tmp_path / "broken.py").write_text("from torch.optim import NoSuchThing\n")
    with pytest.raises(ValueError, match=r"'wrap:broken.Mine': broken cannot be imported: cannot import name 'NoSuch"):
        find("wrap:broken.Mine")
    monkeypatch.delitem(sys.modules, "their_optimizers")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("admw", "unknown 'admw'; known: adamw, adam, sgd, lion"),
        ("admw", "; did you mean 'adamw'?"),
        ("SGD", "; did you mean 'sgd'?"),
        ("", "unknown ''; known: adamw"),
        ("torch.optim.NAdam", "did you mean 'wrap:torch.optim.NAdam'?"),
        ("wrap:NAdam", "'wrap:NAdam' needs the class's full name, package.module.Class, as wrap:torch.optim.NAdam"),
        ("wrap:nowhere.NAdam", "needs the package 'nowhere', which is not installed here; install it"),
        ("wrap:torch.optimm.NAdam", "there is no module 'torch.optimm'"),
        ("wrap:torch.optim.Nadam", "torch.optim has no 'Nadam'; did you mean 'NAdam'?"),
        ("wrap:torch.nn.Linear", "needs a subclass of torch.optim.Optimizer, Linear is another class"),
        ("wrap:torch.optim.lr_scheduler", "lr_scheduler is a module"),
        ("wrap:torch.optim.Optimizer", "needs a subclass of torch.optim.Optimizer"),
        ("wrap:collage.AdamW", "'wrap:collage.AdamW' is of this package already; use 'adamw'"),
    ],
)
def test_a_wrong_name_is_an_error_that_says_what_to_write(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        find(name)


def test_a_setting_that_the_optimizer_does_not_have_is_named() -> None:
    w = [nn.Parameter(torch.ones(4).bfloat16())]
    with pytest.raises(ValueError, match=r"^momentun: SGD has lr, momentum, .* instead; did you mean 'momentum'\?"):
        make_optimizer("sgd", w, momentun=0.9)
    with pytest.raises(ValueError, match="betas: SGD has lr"):
        make_optimizer("sgd", w, betas=(0.9, 0.99))
    make_optimizer("sgd", w, fused=None, foreach=False)  # torch's switches, off, as everywhere
    with pytest.raises(ValueError, match=r"^beta: NAdam has lr, betas, .*, states, bucket_mb, .* did you mean 'betas'"):
        make_optimizer("wrap:torch.optim.NAdam", w, beta=0.9)
    make_optimizer("wrap:pytorch_optimizer.ScheduleFreeSGD", w, beta=0.9)  # its constructor takes what it likes


# What a recipe's settings mean to it


def test_adamw_has_the_recipes_settings() -> None:
    assert choice.chosen("adamw", RECIPE, {}) == {**RECIPE, "optimizer_args": ()}


@pytest.mark.parametrize(
    ("name", "want"),
    [
        # AdamW's rate of decay, lr times weight decay, is kept; sgd has the momentum that people give it
        ("sgd", {"lr": 4e-2, "betas": None, "eps": None, "weight_decay": 1e-3, "optimizer_args": ("momentum=0.9",)}),
        ("lion", {"lr": 4e-5, "betas": (0.9, 0.99), "eps": None, "weight_decay": 1.0, "optimizer_args": ()}),
        # where the optimizer's own default is AdamW's, the recipe's value is meant; other defaults stay
        ("adam", {**RECIPE, "weight_decay": 0.0, "optimizer_args": ()}),
        # Muon's own eps is that of an orthogonalisation; AdamW takes what is no hidden matrix
        (
            "muon",
            {
                **RECIPE,
                "betas": None,
                "eps": 1e-7,
                "optimizer_args": ("adamw={'betas': (0.9, 0.95), 'eps': 1e-06}", "adjust_lr_fn='match_rms_adamw'"),
            },
        ),
        ("wrap:torch.optim.AdamW", {**RECIPE, "optimizer_args": ()}),
        ("wrap:torch.optim.NAdam", {**RECIPE, "lr": 8e-4, "weight_decay": 0, "optimizer_args": ()}),
        ("wrap:lion_pytorch.Lion", {"lr": 4e-5, "betas": (0.9, 0.99), "eps": None, "weight_decay": 0.0}),
        ("wrap:adan_pytorch.Adan", {**RECIPE, "betas": None, "weight_decay": 0}),  # three betas: no option can say them
        ("wrap:torch.optim.Adafactor", {"lr": 4e-3, "betas": None, "eps": None, "weight_decay": 0.0}),  # two eps
        ("wrap:torch.optim.SGD", {"lr": 4e-2, "betas": None, "eps": None, "weight_decay": 1e-3}),
    ],
)
def test_others_take_of_a_recipe_what_means_the_same(name: str, want: dict[str, Any]) -> None:
    found = choice.chosen(name, RECIPE, {})
    assert found.keys() == {*RECIPE, "optimizer_args"}
    assert {key: found[key] for key in want} == want


def test_what_is_given_wins() -> None:
    given = {"lr": 0.5, "weight_decay": 0.25, "optimizer_args": ("nesterov=true", "momentum=0.8")}
    assert choice.chosen("sgd", RECIPE, given) == {
        "lr": 0.5, "betas": None, "eps": None, "weight_decay": 0.25, "optimizer_args": ("momentum=0.8", "nesterov=True")
    }  # fmt: skip


def small(out: Path, optimizer: str, **given: Any) -> RunConfig:
    settings = {"steps": 4, "batch_size": 4, "seq_len": 16, "every": 2, "eval_sequences": 4, "save_every": 2}
    return RunConfig.of("tiny-llama", out, optimizer=optimizer, **{**settings, **given})


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-bert"])
def test_a_run_trains_with_what_was_chosen(tmp_path: Path, model: str) -> None:
    """Also in two groups, as masked models have."""
    given = {"steps": 2, "batch_size": 2, "seq_len": 16, "eval_sequences": 2}
    config = RunConfig.of(model, tmp_path, optimizer="sgd", optimizer_args=("nesterov=true",), **given)
    session = training._Session(config, config.corpus(), None, (print, print), "none", False)
    groups = session.trainer.optimizer.param_groups
    assert type(session.trainer.optimizer) is collage.SGD
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in groups)
    assert [group["weight_decay"] for group in groups] == [config.weight_decay, 0.0][: 1 + (model == "tiny-bert")]


@pytest.mark.parametrize(
    ("optimizer", "slots", "size"),
    [
        ("sgd", {"momentum_buffer"}, 8),
        ("lion", {"exp_avg"}, 8),
        ("muon", {"momentum_buffer", "exp_avg", "exp_avg_sq", "exp_avg_sq_lo"}, 8),
        ("wrap:torch.optim.NAdam", {"exp_avg", "exp_avg_sq", "exp_avg_sq_lo"}, 12),
        ("wrap:torch.optim.Adafactor", {"row_var", "col_var", "variance", "variance_lo"}, 6),
        ("wrap:pytorch_optimizer.SOAP", {"exp_avg", "exp_avg_sq", "exp_avg_sq_lo", "GG", "Q"}, 33),
    ],
)
def test_memory_is_counted_of_what_the_optimizer_keeps(
    tmp_path: Path, optimizer: str, slots: set[str], size: int
) -> None:
    result = training.run(small(tmp_path, optimizer, save_every=0, steps=1))
    assert result.bytes_by_slot.keys() == {"gradient", "param", "param_lo", *slots}
    assert round(result.to_dict()["bytes_per_param"]) == size


# Commands


def tiny(command: str, out: Path, *given: str) -> list[str]:
    return [
        command, "--out", str(out), "--steps", "4", "--batch-size", "4", "--seq-len", "16", "--every", "2",
        "--eval-sequences", "4", *given,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--optimizer", "sdg"], "--optimizer: unknown 'sdg'; known: adamw"),
        (["--optimizer", "sgd", "--betas", "0.9", "0.99"], "--betas: SGD has none; leave it out"),
        (["--optimizer", "lion", "--eps", "1e-8"], "--eps: Lion has none; leave it out"),
        (["--optimizer", "lion", "--betas", "0.9", "1"], "--betas: both need to be in [0, 1)"),
        (["--optimizer-args", "amsgrad"], "--optimizer-args: needs NAME=VALUE, as momentum=0.9, got 'amsgrad'"),
        (["--optimizer-args", "lr=1"], "--optimizer-args: lr is set by the run; give --lr instead"),
        (["--optimizer-args", "seed=1"], "--optimizer-args: seed is set by the run; give --seed instead"),
        (["--optimizer", "sgd", "--optimizer-args", "momentun=1"], "--optimizer-args: momentun: SGD has lr"),
        (["--optimizer-args", "amsgrad=true", "amsgrad=false"], "--optimizer-args: amsgrad is given twice"),
        (["--optimizer-args", "amsgrad=1"], "--optimizer: adamw: amsgrad: needs True or False, got 1"),
        (["--optimizer", "sgd", "--optimizer-args", "momentum=-1"], "--optimizer: sgd: momentum: needs a finite"),
        (["--optimizer", "wrap:torch.optim.LBFGS"], "--optimizer: wrap:torch.optim.LBFGS: wrap: LBFGS"),
        (["--optimizer", "wrap:prodigyopt.Prodigy"], "Prodigy needs all of its parameters at once"),
        (
            ["--optimizer", "wrap:adan_pytorch.Adan", "--betas", "0.9", "0.9"],
            "give --optimizer-args 'betas=(0.02, 0.08",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_errors_are_one_line_and_name_the_flag(
    command: str, given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny(command, tmp_path / "run"), *given]) == 2
    told, err = capsys.readouterr()
    assert told == ""
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_with_its_own_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny("train", tmp_path, "--save-every", "2", "--optimizer", "sgd", "--optimizer-args", "nesterov=true")
    assert main([*run, "dampening=0"]) == 0
    assert "sgd under collage-plus: validation loss" in capsys.readouterr().out
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["optimizer"] == "sgd"
    assert settings["optimizer_args"] == ["dampening=0", "momentum=0.9", "nesterov=True"]
    assert main([*run, "momentum=0.9", "dampening=0", "--resume"]) == 0  # the same in another order
    assert main([*run, "dampening=0", "momentum=0.5", "--resume"]) == 2
    assert "optimizer_args: saved ['dampening=0', 'momentum=0.9'" in capsys.readouterr().err
    assert main([*tiny("train", tmp_path, "--save-every", "2", "--resume")]) == 2
    assert "optimizer: saved 'sgd', here 'adamw'" in capsys.readouterr().err


def test_a_strategy_that_the_optimizer_cannot_have_is_known_before_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--optimizer", "wrap:torch.optim.NAdam", "--strategies", "bf16,kahan"]
    assert main([*tiny("compare", tmp_path / "run"), *given]) == 2
    told, err = capsys.readouterr()
    assert told == ""
    assert "wrap:torch.optim.NAdam: strategy: 'kahan' adds increments in bfloat16 arithmetic" in err
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_does_not_take_the_models_parameters_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny("train", tmp_path, "--optimizer", "wrap:torch.optim.Muon")) == 2
    assert "optimizer: wrap:torch.optim.Muon: Muon only supports 2D parameters" in capsys.readouterr().err


def test_runs_from_before_there_was_a_choice_go_on(tmp_path: Path) -> None:
    ours = RunConfig.of("tiny-llama", tmp_path)
    saved = {key: value for key, value in ours.bound().items() if not key.startswith("optimizer")}
    ours.require_same_run(saved)
    with pytest.raises(ValueError, match="optimizer: saved 'adamw', here 'lion'"):
        RunConfig.of("tiny-llama", tmp_path, optimizer="lion", lr=1e-3).require_same_run(saved)


def test_a_comparison_says_whose_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "write_report", lambda out: out)  # whose plots take seconds
    given = [
        "--optimizer",
        "sgd",
        "--finetune",
        "--pretrain-steps",
        "2",
        "--strategies",
        "bf16,collage-plus,fp32-master",
    ]
    assert main([*tiny("compare", tmp_path), *given]) == 0
    out = capsys.readouterr().out
    assert "Fine-tuning: tiny-llama, sgd (4 steps, lr 0.001)" in out
    assert "second moment" not in out  # it has none
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["optimizer"] == "sgd momentum=0.9"
    assert [row["bytes_per_param"] for row in summary["table"]] == [6, 8, 12]
    assert "steps · sgd momentum=0.9 · lr 0.001" in setting(Comparison.read(tmp_path))


def test_a_comparison_of_a_wrapped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of what it intends is its own: no histogram of that, and all the rest."""
    monkeypatch.setattr(page, "write_report", lambda out: out)
    given = ["--optimizer", "wrap:torch.optim.NAdam", "--strategies", "bf16,collage-plus"]
    assert main([*tiny("compare", tmp_path), *given]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    bf16, plus = summary["table"]
    assert bf16["lost"] > 0.05 > 0.01 > plus["lost"]
    assert (bf16["bytes_per_param"], plus["bytes_per_param"]) == (8, 12)
    assert plus["v_ratio"] == pytest.approx(1.0, abs=1e-3)  # its shadow is NAdam's, too
    assert summary["update_histogram"] is None
