"""Series stand at the x of ``val_loss``, under names of their own, and can be followed."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L  # noqa: N812
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_neurons import (
    ActivationStatisticsCallback,
    ClassNeuronsCallback,
    NeuronAblationCallback,
    NeuronSensitivityCallback,
)
from lightning_neurons.report.logging.tags import LAYOUT, kind_of
from tests.callbacks.modules import MemoryLogger, OldNamespace, Plain, SeveralLoaders, fit, loader, trainer_of


class EpochAsX(Plain):
    def on_validation_epoch_end(self) -> None:
        self.log("step", 100.0 + self.current_epoch)

    on_test_epoch_end = on_validation_epoch_end


class OwnXInTraining(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("step", 1000.0 * self.global_step)
        return super().training_step(batch, batch_idx)


class TwoOptimizers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.conv1.parameters(), 0.01), torch.optim.SGD(self.net.fc2.parameters(), 0.01)]


class XOfEachLoader(SeveralLoaders):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        self.log("step", 500.0 + self.current_epoch)  # Lightning gives it another name, so it is no x
        return super().validation_step(batch, batch_idx, dataloader_idx)


def observers() -> list[Any]:
    return [NeuronSensitivityCallback(max_figures=0), NeuronAblationCallback(ends=1), ClassNeuronsCallback(controls=1)]


def xs(rows: list[Any], name: str) -> list[int | None]:
    return [step for tag, step, _ in rows if tag == name]


@pytest.mark.parametrize("module_type", [Plain, EpochAsX, OwnXInTraining, TwoOptimizers, XOfEachLoader, OldNamespace])
def test_the_x_of_all_series_is_that_of_val_loss(module_type):
    logger, old = MemoryLogger(), module_type is OldNamespace
    several = issubclass(module_type, SeveralLoaders)
    val = [loader(12, seed=1), loader(12, seed=2)] if several else loader(12, seed=1)
    of = pytorch_lightning if old else L
    trainer = trainer_of(observers(), of=of, max_epochs=2, val_check_interval=0.5, logger=logger)
    trainer.fit(module_type(), loader(), val)
    trainer.validate(module_type(), val, verbose=False)
    expected = xs(logger.rows, "val_loss/dataloader_idx_0" if several else "val_loss")
    assert len(expected) == 5
    for name in ("neurons/dead_share", "ablation/loss", "classes/reuse"):
        assert xs(logger.rows, name) == expected, name


def test_the_x_of_a_test_is_that_of_test_loss_and_its_series_stay_apart_from_those_of_the_fit():
    logger = MemoryLogger()
    trainer = trainer_of([NeuronSensitivityCallback(max_figures=0)], max_epochs=2, logger=logger)
    trainer.fit(Plain(), loader(), loader(12, seed=1))
    trainer.test(Plain(), loader(12, seed=1), verbose=False)
    assert xs(logger.rows, "neurons/dead_share") == [3, 7]
    assert xs(logger.rows, "neurons_test/dead_share") == xs(logger.rows, "test_loss") == [8]


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("same_logger", [True, False])
def test_what_another_trainer_finds_stays_apart_from_the_fit_whose_logger_it_has(stage, same_logger, tmp_path):
    module, val = Plain(), loader(12, seed=1)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit(module, observers(), logger=logger, max_epochs=2, train=loader(), val=val)
    if not same_logger:
        logger = TensorBoardLogger(tmp_path, name="", version="run")
    written = Mock(wraps=logger.log_metrics)
    logger.log_metrics = written
    getattr(trainer_of(observers(), logger=logger), stage)(module, val, verbose=False)
    calls = [call.args[0] if call.args else call.kwargs["metrics"] for call in written.call_args_list]
    names = {name.split("/")[0] for values in calls for name in values}
    of_fits = {"neurons", "ablation", "classes"}
    assert not names & of_fits
    assert {f"{group}_{stage}" for group in (of_fits if stage == "validate" else {"neurons"})} <= names
    assert {kind_of(name) for values in calls for name in values if name.startswith("neurons")} == {"scalar"}


def test_what_is_found_on_training_data_stands_at_the_last_batch_of_its_epoch_as_what_training_logs_of_it():
    class LogsEpochs(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

    logger = MemoryLogger()
    fit(LogsEpochs(), [NeuronSensitivityCallback(source="train", max_figures=0)], max_epochs=3, logger=logger)
    expected = xs(logger.rows, "train_loss")
    assert len(expected) == 3
    assert xs(logger.rows, "neurons/dead_share") == xs(logger.rows, "val_loss") == expected


class Mine(NeuronAblationCallback):
    """A user's own kind."""


def test_no_two_callbacks_write_to_the_same_series(tmp_path):
    callbacks = [
        ActivationStatisticsCallback(layers=["net.fc1"]),
        NeuronSensitivityCallback(layers=["net.conv1"]),
        NeuronSensitivityCallback(layers=["net.conv2"]),
        NeuronAblationCallback(ends=1),
        Mine(ends=2),
    ]
    trainer = fit(Plain(), callbacks, logger=TensorBoardLogger(tmp_path), max_epochs=2)
    found = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0, "histograms": 0, "images": 0}).Reload()
    for kind, read in (("scalars", found.Scalars), ("histograms", found.Histograms), ("images", found.Images)):
        for tag in set(found.Tags()[kind]) - {"epoch"}:
            steps = [event.step for event in read(tag)]
            assert len({*steps}) == len(steps), tag
    shares = {tag for tag in found.Tags()["scalars"] if "dead_share/" in tag}
    assert shares == {
        "neurons/dead_share/net.conv1", "neurons_2/dead_share/net.conv2", "neurons_3/dead_share/net.fc1"
    }  # fmt: skip
    files = {path.name for path in Path(trainer.log_dir).glob("*.json")}
    assert {"neurons.json", "neurons_2.json", "neurons_3.json", "ablation.json", "ablation_2.json"} <= files


THEIRS = {"mine": {"losses": ["Multiline", ["val_loss"]], "band": ["Margin", ["a", "b", "c"]]},
          "deadness": {"dead": ["Multiline", ["^my_own$"]]}}  # fmt: skip


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_end", "on_train_end"])
def test_the_page_of_the_user_stays_and_ours_is_added(tmp_path, hook):
    def lay_out(module: Any) -> None:
        module.logger.experiment.add_custom_scalars(THEIRS)

    module = type("LaysOut", (Plain,), {hook: lay_out})()
    trainer = fit(module, [NeuronSensitivityCallback(max_figures=0)], logger=TensorBoardLogger(tmp_path), max_epochs=2)
    events = EventAccumulator(trainer.log_dir, size_guidance={"tensors": 0}).Reload()
    last = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    shown = {category.title: {chart.title: chart for chart in category.chart} for category in last.category}
    assert list(shown["mine"]) == ["losses", "band"]
    assert shown["mine"]["band"].margin.series[0].lower == "b"
    assert list(shown["deadness"]["dead"].multiline.tag) == ["^my_own$"]
    assert {title: {*charts} <= {*shown[title]} for title, charts in LAYOUT.items()} == dict.fromkeys(LAYOUT, True)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("every", [1, 2])
def test_early_stopping_and_checkpoints_follow_a_series_in_any_order(tmp_path, first, every):
    stopping = EarlyStopping("neurons/dead_share", patience=10)
    saving = ModelCheckpoint(tmp_path, monitor="neurons/effective_share", mode="max", save_top_k=-1)
    mine, logger = NeuronSensitivityCallback(max_figures=0, every_n_epochs=every), MemoryLogger()
    callbacks = [mine, stopping, saving] if first else [stopping, saving, mine]
    trainer = fit(Plain(), callbacks, max_epochs=3, logger=logger, enable_checkpointing=True)
    written = {name: [v for tag, _, v in logger.rows if tag == name] for name in ("neurons/dead_share", "val_loss")}
    assert float(stopping.best_score) == pytest.approx(min(written["neurons/dead_share"]))
    assert float(trainer.callback_metrics["neurons/dead_share"]) == pytest.approx(written["neurons/dead_share"][-1])
    assert len(saving.best_k_models) == 3
    ours = {name for name in trainer.callback_metrics if name.startswith("neurons")}
    assert ours == {"neurons/dead_share", "neurons/effective_share"}, "and nothing that nobody follows"
    assert not [name for name in trainer.logged_metrics if name.startswith("neurons")]


def test_metrics_of_callbacks_are_left_alone_unless_asked_for():
    for asked in (False, True):
        callback = ActivationStatisticsCallback(max_figures=0, log_metrics=asked)
        trainer = trainer_of([callback])
        assert list(trainer.validate(Plain(), loader(8), verbose=False)[0]) == ["val_loss"]
        assert ("neurons/dead_share" in trainer.callback_metrics) == asked


def test_a_series_that_is_not_there_is_told_with_those_that_are():
    callbacks = [NeuronSensitivityCallback(max_figures=0), EarlyStopping("neurons/deadshare")]
    with pytest.raises(RuntimeError, match=r"neurons/deadshare.*not available.*neurons/dead_share"):
        fit(Plain(), callbacks)
