"""Optimizers as frameworks make, wrap, save and restore them: Trainer and Accelerate run here, Lightning's wrappers as
stand-ins (Lightning itself runs in test_lightning.py)."""

from __future__ import annotations

import pickle
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import assert_same_bits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import collage
from collage import STRATEGIES
from collage.integrations.transformers import LOGGED, EDQCallback, by_name
from collage.unwrapping import unwrapped


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


def trainer(tmp_path: Path, optimizer: Any, built: nn.Module, **settings: Any) -> Trainer:
    """With an optimizer, or with what `by_name` returned."""
    defaults = {
        "max_steps": 9, "per_device_train_batch_size": 4, "logging_steps": 3, "save_strategy": "no",
        "learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }  # fmt: skip
    args = TrainingArguments(str(tmp_path), **{**defaults, **settings})
    made = (
        {"optimizer_cls_and_kwargs": optimizer} if isinstance(optimizer, tuple) else {"optimizers": (optimizer, None)}
    )
    return Trainer(built, args, train_dataset=Counting(), eval_dataset=Counting(), **made)


def words(built: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Every bit of the weights and of the optimizer's state."""
    found = {}
    saved = optimizer.state_dict()
    places = dict(zip((p for group in optimizer.param_groups for p in group["params"]), count()))
    for name, p in built.named_parameters():
        for key, x in {"param": p.detach(), **saved["state"].get(places.get(p), {})}.items():
            found[f"{name} {key}"] = torch.as_tensor(x).reshape(-1).view(torch.uint8).clone()
    return found


def require_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    different = [key for key in want if not torch.equal(got[key], want[key])]
    assert not different, f"{len(different)} of {len(want)} differ: {different[:5]}"


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
    defined = set(LOGGED) - {"rescaled", "saturated"}  # of weights that have no scales
    assert [log["step"] for log in logs] == [3, 6, 9]
    for log in logs:
        assert set(log) & set(LOGGED) == defined
        assert 0.5 < log["edq_ratio"] < 1.1
    assert not any("edq_ratio" in log for log in run.state.log_history if "eval_loss" in log)
    report = edq.report()
    assert report.total.steps == 4  # 1, 3, 6, 9
    assert report.beside["collage-plus"].lost < report.total.lost
    assert optimizer.monitors == []
    assert "'edq_ratio': " in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in defined:
        assert [event.step for event in events.Scalars(f"train/{name}")] == [3, 6, 9]


def test_it_does_not_change_the_run(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [EDQCallback(every=1, shadow=2, strategies=("kahan",))]):
        built = model()
        run = trainer(tmp_path, collage.AdamW(built.named_parameters()), built)
        for callback in callbacks:
            run.add_callback(callback)
        run.train()
        weights.append(torch.cat([p.detach().reshape(-1) for p in built.parameters()]))
    assert_same_bits("weights", *weights)


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
    with pytest.raises(
        TypeError,
        match=r"EDQCallback: optimizer: needs one of this .*, got torch\.optim\.adamw\.AdamW; give the Trainer one",
    ):
        run.train()


def test_nothing_is_measured_before_the_run() -> None:
    assert EDQCallback().report().total.steps == 0


def test_by_name_makes_the_optimizer_that_trainer_would(tmp_path: Path) -> None:
    built = model()
    built.model.embed_tokens.requires_grad_(False)
    settings = {"weight_decay": 0.1, "adam_beta2": 0.99, "adam_epsilon": 1e-6}
    run = trainer(tmp_path, by_name("collage-light", seed=7), built, **settings)
    run.create_optimizer()
    theirs = trainer(tmp_path, (torch.optim.AdamW, {}), built, **settings)
    theirs.create_optimizer()
    optimizer = run.optimizer
    assert type(optimizer) is collage.AdamW
    names = {p: name for name, p in built.named_parameters()}
    for group, reference in zip(optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert list(map(id, group["params"])) == list(map(id, reference["params"]))
        assert group["param_names"] == [names[p] for p in group["params"]] != []
        assert group["weight_decay"] == reference["weight_decay"]
        assert (group["lr"], group["betas"], group["eps"], group["seed"]) == (1e-3, (0.9, 0.99), 1e-6, 7)
        assert group["strategy"] == "collage-light"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert not any("embed" in name for group in optimizer.param_groups for name in group["param_names"])


def test_settings_given_to_by_name_win(tmp_path: Path) -> None:
    chosen = {"lr": 0.5, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.25, "maximize": True}
    for optimizer in (by_name(**chosen), pickle.loads(pickle.dumps(by_name(**chosen)))):
        run = trainer(tmp_path, optimizer, model())
        run.create_optimizer()
        decaying, others = run.optimizer.param_groups
        assert {key: decaying[key] for key in chosen} == chosen
        assert {key: others[key] for key in chosen} == {**chosen, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("optimizer", "want"),
    [
        ("sgd", {"lr": 1e-3, "momentum": 0.5, "weight_decay": 0.1}),
        ("lion", {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}),
        ("adam", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}),
    ],
)
def test_by_name_takes_of_the_arguments_what_the_optimizer_has(
    tmp_path: Path, optimizer: str, want: dict[str, Any]
) -> None:
    """The arguments' own betas are AdamW's: Lion keeps its own, and SGD, which has none, is not given any."""
    settings = {"momentum": 0.5} if optimizer == "sgd" else {}
    run = trainer(tmp_path, by_name("collage-plus", optimizer, **settings), model(), weight_decay=0.1)
    run.create_optimizer()
    assert type(run.optimizer).__name__.lower() == optimizer
    decaying, others = run.optimizer.param_groups
    assert {key: decaying[key] for key in want} == want
    assert others["weight_decay"] == 0.0
    assert "lm_head.weight" in decaying["param_names"]


def test_by_name_makes_muon_of_hidden_matrices_and_adamw_of_the_rest(tmp_path: Path) -> None:
    """Each in Trainer's two groups; the betas that were chosen are AdamW's."""
    chosen = by_name(optimizer="muon", adjust_lr_fn="match_rms_adamw")
    run = trainer(tmp_path, chosen, model(), weight_decay=0.1, adam_beta2=0.95)
    run.create_optimizer()
    groups = run.optimizer.param_groups
    assert [(group["use_muon"], group["weight_decay"]) for group in groups] == [(True, 0.1), (False, 0.1), (False, 0.0)]
    hidden, outer, norms = (group["param_names"] for group in groups)
    assert all("proj.weight" in name for name in hidden)
    assert sorted(outer) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert all("norm" in name for name in norms)
    assert [group["betas"] for group in groups if not group["use_muon"]] == [(0.9, 0.95)] * 2


def test_by_name_takes_betas_that_were_chosen(tmp_path: Path) -> None:
    run = trainer(tmp_path, by_name(optimizer="lion"), model(), adam_beta2=0.95)
    run.create_optimizer()
    assert run.optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_by_name_where_every_parameter_decays(tmp_path: Path) -> None:
    """As an adapter's do: Trainer's other group is empty."""
    built = model()
    for name, p in built.named_parameters():
        p.requires_grad_("q_proj" in name)
    run = trainer(tmp_path, by_name(), built)
    run.train()
    assert [len(group["params"]) for group in run.optimizer.param_groups] == [1, 0]
    run.optimizer.load_state_dict(run.optimizer.state_dict())


@pytest.mark.parametrize(("strategy", "settings", "error"), [
    ("collage-plsu", {}, "collage-plsu"),
    ("collage-plus", {"optimizer": "sdg"}, "optimizer: unknown 'sdg'"),
    ("collage-plus", {"optimizer": "sgd", "betas": (0.9, 0.99)}, "betas: SGD has lr"),
    ("collage-plus", {"lr": -1.0}, "lr: needs a finite number"),
    ("collage-plus", {"fused": True}, "cannot take fused"),
])  # fmt: skip
def test_by_name_refuses_at_once(strategy: str, settings: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        by_name(strategy, **settings)


def test_by_name_outside_of_a_trainer() -> None:
    with pytest.raises(RuntimeError, match="only a Trainer can unpack it"):
        _, _ = by_name()


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [
        ("collage-plus", "adamw"),
        ("collage-plus-sr", "adamw"),
        ("fp32-master", "adamw"),
        ("collage-plus-sr", "lion"),
        ("collage-plus", "muon"),
        ("collage-plus-sr", "wrap:torch.optim.NAdam"),
        ("collage-plus", "wrap:schedulefree.AdamWScheduleFree"),
    ],
)
def test_a_resumed_trainer_has_the_bits_of_one_that_went_on(tmp_path: Path, strategy: str, optimizer: str) -> None:
    settings = {
        "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "warmup_steps": 4,
        "weight_decay": 0.1, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    given = {"seed": 3, **({"adjust_lr_fn": "match_rms_adamw"} if optimizer == "muon" else {})}
    whole = trainer(tmp_path, by_name(strategy, optimizer, **given), model(), **settings)
    whole.train()
    torch.manual_seed(1)  # weights of its own, until it loads
    built = LlamaForCausalLM(whole.model.config).bfloat16()
    resumed = trainer(tmp_path, by_name(strategy, optimizer, **given), built, **settings)
    resumed.add_callback(EDQCallback(every=1))  # a measured step would refuse weights that lost their components
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    require_equal(words(resumed.model, resumed.optimizer), words(whole.model, whole.optimizer))
    assert resumed.optimizer.state_dict()["param_groups"] == whole.optimizer.state_dict()["param_groups"]


def test_a_resumed_run_measures_the_steps_of_the_whole(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    logs, steps = [], []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        edq = EDQCallback(every=3, shadow=None)
        run = trainer(tmp_path, by_name("bf16"), model(), **settings)
        run.add_callback(edq)
        run.train(resume_from_checkpoint=resume)
        logs.append([log["edq"] for log in run.state.log_history if "edq" in log])
        steps.append(edq.report().total.steps)
    assert logs[0] == logs[1]
    assert steps == [3, 1]  # 1, 3, 6; then 6 alone


def test_a_run_of_torchs_adamw_is_taken_over(tmp_path: Path) -> None:
    """Trainer's own checkpoint, in the middle of a run: by_name has the same groups, and names beside them."""
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "optim": "adamw_torch"}
    whole = trainer(tmp_path, None, model().float(), **settings)
    whole.train()
    taken = trainer(tmp_path, by_name("fp32"), model().float(), **settings)
    taken.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(state["step"] == 6 for state in taken.optimizer.state.values())
    assert taken.optimizer.param_groups[0]["param_names"][0] == "model.embed_tokens.weight"
    for p, reference in zip(taken.model.parameters(), whole.model.parameters(), strict=True):
        # rounded in another order than torch's: two ulps at 1.0, where steps are 1e-3
        torch.testing.assert_close(p, reference, rtol=0, atol=2**-22)


class Spoiled(TrainerCallback):
    """Makes the weights worse from the fourth step on, so that the best model is that of the third."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = 1.0


@pytest.mark.parametrize("strategy", ["collage-plus", "fp32-master"])
def test_training_goes_on_from_the_best_model(tmp_path: Path, strategy: str) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    built = model()
    run = trainer(tmp_path, by_name(strategy), built, load_best_model_at_end=True, **settings)
    run.add_callback(Spoiled())
    run.train()
    run.pop_callback(Spoiled)
    assert run.state.best_model_checkpoint.endswith("checkpoint-3")
    best = {name: p.detach().clone() for name, p in built.named_parameters()}
    edq = EDQCallback(every=1)
    run.add_callback(edq)
    with pytest.warns(RuntimeWarning, match="changed outside the optimizer: .* was another model loaded"):
        run.train()
    assert edq.report().total.edq_ratio == pytest.approx(1.0, abs=0.01)
    for name, p in built.named_parameters():
        # nine steps of at most lr (1 - beta1) / sqrt(1 - beta2) = 0.0032; the spoiled weights are 1.0 away
        assert (p.detach() - best[name]).abs().max() < 0.05, name


def test_a_trainer_casts_a_float32_model_and_keeps_what_the_cast_cuts_off(tmp_path: Path) -> None:
    built = model().float()
    for p in built.parameters():
        p.data += 2.0**-12 * p.data  # bits that bfloat16 has no room for
    full = {name: p.detach().clone() for name, p in built.named_parameters()}
    run = trainer(tmp_path, by_name("fp32-master", cast=True, lr=0.0), built)
    run.train()
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    kept = collage.high_precision_state_dict(built, run.optimizer)
    for name, value in full.items():
        assert_same_bits(name, kept[name], value)


def test_a_parameter_that_no_optimizer_has_is_refused(tmp_path: Path) -> None:
    """A resumed adapter, or a resized embedding, is another tensor than the optimizer's."""
    built = model()
    optimizer = collage.AdamW(built.named_parameters())
    built.resize_token_embeddings(40, mean_resizing=False)
    run = trainer(tmp_path, optimizer, built)
    run.add_callback(EDQCallback())
    with pytest.raises(
        ValueError, match=r"param 'lm_head.weight': 1 of the model's 12 trainable parameters are not in .*by_name"
    ):
        run.train()
    built.lm_head.requires_grad_(False)
    run.train()
    assert run.state.global_step == 9


def test_an_optimizer_made_anew_trains_what_was_replaced(tmp_path: Path) -> None:
    """What load_best_model_at_end does to an adapter: PEFT makes new tensors, and a Trainer keeps its optimizer."""
    built = model()
    run = trainer(tmp_path, by_name(), built)
    run.add_callback(EDQCallback(every=1))
    run.train()
    built.lm_head.weight = nn.Parameter(torch.zeros_like(built.lm_head.weight))
    with pytest.raises(ValueError, match=r"param 'lm_head.weight': .* after trainer.optimizer = None"):
        run.train()
    run.optimizer = None
    run.train()
    assert built.lm_head.weight.count_nonzero() == built.lm_head.weight.numel()


def test_a_watched_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    stale = collage.AdamW(model().named_parameters())
    run = trainer(tmp_path, by_name(), model())
    run.add_callback(EDQCallback(stale))
    with pytest.raises(ValueError, match="EDQCallback: the optimizer has none of the model's parameters: it was made"):
        run.train()


def test_several_optimizers_may_share_a_model(tmp_path: Path) -> None:
    built = model()
    norms = [(name, p) for name, p in built.named_parameters() if "norm" in name]
    others = [(name, p) for name, p in built.named_parameters() if "norm" not in name]
    ours = collage.AdamW(norms)
    run = trainer(
        tmp_path, torch.optim.AdamW(others), torch.compile(built, backend="eager"), remove_unused_columns=False
    )
    edq = EDQCallback(ours, every=1)
    run.add_callback(edq)
    run.add_callback(StepsToo(ours))
    run.compute_loss = lambda wrapped, inputs, **_: built(**inputs).loss  # uncompiled, which is quicker
    run.train()
    assert edq.report().total.steps == 9
    assert set(edq.report().by_parameter) == {name for name, _ in norms}


class StepsToo(TrainerCallback):
    """Steps an optimizer beside the Trainer's own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer.step()


class ByClass:
    """Lightning's LightningOptimizer and Fabric's _FabricOptimizer: both pass for the class that they wrap."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (type(self), type(optimizer)), {})

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def __getattr__(self, item: str) -> Any:
        return getattr(self._optimizer, item)


class ByAttribute:
    """A proxy that hands on every attribute, and names its own otherwise than by a property."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def __getattr__(self, item: str) -> Any:
        return getattr(self._optimizer, item)


def accelerated(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return Accelerator().prepare(optimizer)


@pytest.mark.parametrize("wrap", [accelerated, ByClass, ByAttribute, lambda x: ByAttribute(accelerated(ByClass(x)))])
def test_a_wrapped_optimizer_is_taken(wrap: Any) -> None:
    built = collage.to_bf16(nn.Linear(4, 2))
    optimizer = collage.AdamW(built.named_parameters(), lr=1e-3)
    wrapped = wrap(optimizer)
    full = {name: p.detach().float() * (1 + 2**-12) for name, p in built.named_parameters()}
    collage.load_high_precision_state_dict(built, wrapped, full)
    for name, value in collage.high_precision_state_dict(built, wrapped).items():
        assert_same_bits(name, value, full[name])
    watch = collage.monitor(wrapped, every=1)
    assert optimizer.monitors == [watch]
    built(torch.ones(1, 4).bfloat16()).sum().backward()
    wrapped.step() if wrap is accelerated else optimizer.step()
    assert watch.report().total.steps == 1
    unwrapped(wrapped, collage.AdamW).monitors = []
    assert optimizer.monitors == []


@pytest.mark.parametrize("wrap", [accelerated, ByClass, lambda x: ByAttribute(accelerated(ByClass(x)))])
def test_weights_that_an_optimizer_lends_to_an_evaluation(wrap: Any) -> None:
    """Schedule-Free evaluates the average of its iterates: eval() and train() get through what wraps it."""
    built = collage.to_bf16(nn.Linear(64, 64))
    named = list(built.named_parameters())
    inner = collage.make_optimizer("wrap:schedulefree.AdamWScheduleFree", named, "fp32-master", lr=1e-2)
    optimizer = wrap(inner)
    optimizer.train()
    for _ in range(3):
        built(torch.ones(1, 64).bfloat16()).square().sum().backward()
        inner.step()
    trained = collage.high_precision_state_dict(built, optimizer)["weight"]
    optimizer.eval()
    averaged = collage.high_precision_state_dict(built, optimizer)["weight"]
    assert_same_bits("the visible average", built.weight.detach(), averaged.bfloat16())
    assert float((averaged - trained).abs().max()) > 1e-3
    optimizer.train()
    back = collage.high_precision_state_dict(built, optimizer)["weight"]
    torch.testing.assert_close(back, trained, rtol=0, atol=2**-24)  # an interpolation and its inverse, in float32


def test_what_is_no_optimizer_of_this_package_is_named() -> None:
    built = nn.Linear(4, 2).bfloat16()
    scheduler = torch.optim.lr_scheduler.ConstantLR(collage.AdamW(built.parameters()))
    for wrong, name in (
        (accelerated(torch.optim.SGD(built.parameters())), "torch.optim.sgd.SGD"),
        (scheduler, "torch.optim.lr_scheduler.ConstantLR"),
        (None, "builtins.NoneType"),
    ):
        with pytest.raises(TypeError, match=f"needs one of this package, such as collage.AdamW, got {name}"):
            collage.monitor(wrong)
        with pytest.raises(TypeError, match=f"needs one of this package, such as collage.AdamW, got {name}"):
            collage.high_precision_state_dict(built, wrong)


def test_the_callback_takes_a_wrapped_optimizer_and_leaves_it_unwatched(tmp_path: Path) -> None:
    built = model()
    optimizer = collage.AdamW(built.named_parameters())
    edq = EDQCallback(ByClass(optimizer), every=1)
    run = trainer(tmp_path, optimizer, built)
    run.add_callback(edq)
    run.train()
    assert edq.report().total.steps == 9
    assert optimizer.monitors == []
