"""EDQCallback in a user's own script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import collage
from collage import STRATEGIES
from collage.integrations.transformers import LOGGED, EDQCallback


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count upwards."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) + index) % 32
        return {"input_ids": ids, "labels": ids}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).bfloat16()


def trainer(tmp_path: Path, optimizer: Any, built: LlamaForCausalLM, **settings: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=9, per_device_train_batch_size=4, logging_steps=3, use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True, save_strategy="no", learning_rate=1e-3,
        **{"report_to": "none", **settings},
    )  # fmt: skip
    return Trainer(built, args, train_dataset=Counting(), eval_dataset=Counting(), optimizers=(optimizer, None))


def test_a_users_own_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are in the log history, in what Trainer prints, and in TensorBoard."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    built = model()
    optimizer = collage.AdamW(built.named_parameters(), lr=1e-3, strategy="bf16")
    run = trainer(tmp_path, optimizer, built, report_to="tensorboard", eval_strategy="steps", eval_steps=3)
    edq = EDQCallback(every=3, shadow=2, strategies=("collage-plus",))
    run.add_callback(edq)
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [3, 6, 9]
    for log in logs:
        assert set(LOGGED) <= set(log)
        assert 0.5 < log["edq_ratio"] < 1.1
    assert not any("edq_ratio" in log for log in run.state.log_history if "eval_loss" in log)
    report = edq.report()
    assert report.total.steps == 4  # 1, 3, 6, 9
    assert report.beside["collage-plus"].lost < report.total.lost
    assert optimizer.monitors == []
    assert "'edq_ratio': " in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in LOGGED:
        assert [event.step for event in events.Scalars(f"train/{name}")] == [3, 6, 9]


def test_it_does_not_change_the_run(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [EDQCallback(every=1, shadow=2, strategies=("kahan",))]):
        built = model()
        run = trainer(tmp_path, collage.AdamW(built.named_parameters()), built)
        for callback in callbacks:
            run.add_callback(callback)
        run.train()
        weights.append(torch.cat([p.detach().reshape(-1).view(torch.int16) for p in built.parameters()]))
    assert torch.equal(*weights)


def test_training_again_starts_a_new_monitor(tmp_path: Path) -> None:
    built = model()
    edq = EDQCallback(every=1)
    run = trainer(tmp_path, collage.AdamW(built.named_parameters()), built)
    run.add_callback(edq)
    run.train()
    first = edq.monitor
    run.train()
    assert edq.monitor is not first
    assert edq.report().total.steps == 9


def test_every_logged_step_is_measured(tmp_path: Path) -> None:
    built = model()
    run = trainer(tmp_path, collage.AdamW(built.named_parameters()), built, logging_first_step=True)
    edq = EDQCallback(every=3, strategies="kahan")
    run.add_callback(edq)
    run.train()
    assert [log["step"] for log in run.state.log_history if "edq_ratio" in log] == [1, 3, 6, 9]
    assert edq.report().total.steps == 4
    assert list(edq.report().beside) == [str(STRATEGIES["kahan"])]


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    built = model().float()
    run = trainer(tmp_path, torch.optim.AdamW(built.parameters()), built)
    run.add_callback(EDQCallback())
    with pytest.raises(TypeError, match="EDQCallback: watches an optimizer of collage, got AdamW; give the Trainer"):
        run.train()


def test_nothing_is_measured_before_the_run() -> None:
    assert EDQCallback().report().total.steps == 0
