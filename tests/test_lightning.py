"""Lightning's Trainer: checkpoints of its own resume bit for bit, and EDQ is in its log."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_same_bits
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import collage
from collage.integrations.lightning import EDQCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's remarks about a run as small as this


class Model(L.LightningModule):
    """Two layers with a norm between; with two optimizers, stepped by hand in turns, if `several`."""

    def __init__(self, several: bool = False, strategy: str = "collage-plus-sr", optimizer: str = "adamw") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))
        collage.to_bf16(self)
        self.automatic_optimization, self.strategy, self.optimizer = not several, strategy, optimizer

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        if not self.automatic_optimization:
            self.manual_backward(loss)
            for k, optimizer in enumerate(self.optimizers()):
                if k == 0 or index % 2:
                    optimizer.step()
            self.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            optimizer = collage.make_optimizer(self.optimizer, self.named_parameters(), self.strategy, lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]
        named = list(self.named_parameters())
        return [collage.AdamW(named[:3], lr=1e-2, strategy="bf16"), collage.AdamW(named[3:], lr=1e-2)]


def fit(
    folder: Path, model: Model, edq: EDQCallback, epochs: int, ckpt: str | None = None, **settings: Any
) -> L.Trainer:
    data = torch.utils.data.TensorDataset(torch.randn(32, 8, generator=torch.Generator().manual_seed(1)))
    keep = ModelCheckpoint(folder / "kept", filename="{epoch}", save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, precision="bf16-mixed", callbacks=[edq, keep], log_every_n_steps=1,
        logger=CSVLogger(folder), enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=ckpt)
    return trainer


def logs(trainer: L.Trainer, name: str = "edq_ratio") -> dict[int, float]:
    """What a logger was given under a name, by Lightning's count of steps from 0."""
    with (Path(trainer.logger.log_dir) / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [("collage-plus-sr", "adamw"), ("fp32-master", "adamw"), ("collage-plus-sr", "wrap:torch.optim.NAdam")],
)
def test_a_resumed_fit_has_the_bits_of_one_that_went_on(tmp_path: Path, strategy: str, optimizer: str) -> None:
    """Weights, states, schedule; and the same steps are measured."""
    settings = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    whole, watch = Model(False, strategy, optimizer), EDQCallback(every=3, shadow=None)
    straight = fit(tmp_path / "straight", whole, watch, 3, **settings)
    resumed, again = Model(False, strategy, optimizer), EDQCallback(every=3, shadow=None)
    checkpoint = str(tmp_path / "straight" / "kept" / "epoch=0.ckpt")
    trainer = fit(tmp_path / "resumed", resumed, again, 3, checkpoint, **settings)
    states = [run.optimizers[0].state_dict()["state"] for run in (trainer, straight)]
    for k, ((name, p), q) in enumerate(zip(whole.named_parameters(), resumed.parameters(), strict=True)):
        assert_same_bits(name, q, p)
        ours, theirs = (state[k] for state in states)
        assert ours.keys() == theirs.keys() >= {"param_lo" if "plus" in strategy else "param_master", "exp_avg"}
        for key, plane in theirs.items():
            assert_same_bits(f"{name} {key}", ours[key], plane)
    first = straight.num_training_batches // 2  # steps of the epoch that was not trained again
    assert logs(trainer) == {step: value for step, value in logs(straight).items() if step >= first}
    assert watch.report().total.steps == 5  # 1, 3, 6, 9, 12
    assert again.report().total.steps == 3


class ScheduleFree(Model):
    """Evaluates the average of its iterates, as Schedule-Free's authors say it is to be done in Lightning."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.seen = self.net[0].weight.detach().clone()

    def on_train_epoch_start(self) -> None:
        self.optimizers().train()

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.optimizers().eval()

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.optimizers().train()


def test_weights_that_an_optimizer_lends_to_an_evaluation(tmp_path: Path) -> None:
    """By train() and eval(), through Lightning's own wrapper; it goes on from the weights that it had."""
    model = ScheduleFree(optimizer="wrap:schedulefree.AdamWScheduleFree", strategy="fp32-master")
    data = torch.utils.data.DataLoader(torch.randn(8, 1, 8, generator=torch.Generator().manual_seed(1)), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(accelerator="cpu", max_epochs=3, precision="bf16-mixed", enable_model_summary=False, **quiet)
    trainer.fit(model, data, data)
    trained = model.net[0].weight.detach().clone()
    assert not torch.equal(model.seen, trained)
    trainer.optimizers[0].eval()
    assert_same_bits("the average", model.net[0].weight.detach(), model.seen)


def test_it_does_not_change_the_run_and_stops_with_it(tmp_path: Path) -> None:
    models = Model(), Model()
    edq = EDQCallback(every=2, shadow=2, strategies="bf16")
    trainer = fit(tmp_path / "watched", models[0], edq, 1)
    fit(tmp_path / "alone", models[1], EDQCallback(every=1000, shadow=None), 1)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert_same_bits(name, p, q)
    assert trainer.optimizers[0].monitors == []
    assert sorted(logs(trainer)) == [0, 1, 3, 5, 7]  # 1, 2, 4, 6, 8
    assert list(edq.report().beside) == ["bf16"]
    assert float(trainer.callback_metrics["edq_ratio"]) == pytest.approx(edq.windows[0].total.edq_ratio)


def test_several_optimizers_are_told_apart(tmp_path: Path) -> None:
    edq = EDQCallback(every=2)
    trainer = fit(tmp_path, Model(several=True), edq, 1)
    assert [edq.report(k).total.steps for k in (0, 1)] == [5, 3]  # of eight steps and of four
    assert set(edq.report(1).by_parameter) == {"net.1.bias", "net.2.weight", "net.2.bias"}
    assert {"edq_ratio_0", "edq_ratio_1", "lost_0", "lost_1"} <= trainer.callback_metrics.keys()
    assert edq.report(0).total.lost > edq.report(1).total.lost == 0


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = Model()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters())
    with pytest.raises(
        TypeError, match=r"EDQCallback: optimizer: needs one of this package, .* got torch\.optim\.sgd\.SGD"
    ):
        fit(tmp_path, model, EDQCallback(), 1)


def test_nothing_is_measured_before_the_fit() -> None:
    assert EDQCallback().report().total.steps == 0
