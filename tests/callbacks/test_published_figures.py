"""Where figures, histories and pages of a run go: TensorBoard, loggers of images, and the folder of the run."""

import csv
import json
import re
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_neurons import ActivationStatisticsCallback, NeuronAblationCallback, NeuronSensitivityCallback
from lightning_neurons.callbacks.observing import publish as module_of_publish
from lightning_neurons.callbacks.pruning import part as module_of_part
from lightning_neurons.report.logging.tags import LAYOUT, kind_of
from lightning_neurons.results.history import NeuronHistory
from lightning_neurons.results.pruning_history import PruningHistory
from tests.callbacks.modules import Plain, fit, loader, trainer_of
from tests.callbacks.pictured import ImageLogger, files, shown_in, without_matplotlib  # noqa: F401
from tests.callbacks.pruned import pruner
from tests.callbacks.refusals import not_refused

FIRST = ["figures/importance", "figures/importance_by_layer", "figures/deadness"]


def test_all_figures_of_a_run_are_those_of_the_table(tmp_path):
    callback = NeuronSensitivityCallback(max_figures=100)
    trainer = fit(Plain(), [callback], logger=TensorBoardLogger(tmp_path), max_epochs=2)
    found = shown_in(trainer.log_dir)
    kinds = ("deadness_grid", "magnitudes", "histogram")
    by_layer = {f"figures/{kind}/{layer}" for kind in kinds for layer in callback.report.deadness}
    assert found.keys() == {*FIRST, "figures/dead_history"} | by_layer
    assert {kind_of(tag) for tag in found} == {"figure"}
    assert found.pop("figures/dead_history") == [7], "one measurement is no history"
    assert {tuple(steps) for steps in found.values()} == {(3, 7)}, "where val_loss stands"


OBSERVERS = [NeuronSensitivityCallback, ActivationStatisticsCallback]


@pytest.mark.parametrize("most, make", list(zip([0, 1, 3, 5], cycle(OBSERVERS))))
def test_the_number_of_figures_is_bounded(tmp_path, most, make):
    trainer = fit(Plain(), [make(max_figures=most)], logger=TensorBoardLogger(tmp_path))
    assert len(shown_in(trainer.log_dir)) == most
    assert {*shown_in(trainer.log_dir)} >= {*FIRST[:most]}


def test_layers_with_the_largest_share_of_the_dead_come_first(tmp_path):
    module = Plain(lr=0.0)
    module.net.norm2.bias.data.fill_(-100.0)
    memory = ImageLogger()
    fit(module, [NeuronSensitivityCallback(max_figures=4)], logger=memory)
    assert [key for key, *_ in memory.images] == [*FIRST, "figures/deadness_grid/net.conv2"]


def test_a_logger_of_images_gets_pictures_of_bytes():
    memory = ImageLogger()
    fit(Plain(), [NeuronSensitivityCallback(max_figures=4), NeuronAblationCallback(ends=2)], logger=memory)
    keys = [key for key, *_ in memory.images]
    assert [*keys[:3], keys[4]] == [*FIRST, "ablation/scatter"]
    assert keys[3].startswith("figures/deadness_grid/")
    for _, step, images in memory.images:
        (image,) = images
        assert (image.ndim, image.shape[2], image.dtype, step) == (3, 3, np.uint8, 3)
        assert min(image.shape[:2]) > 100
        assert image.min() < image.max() == 255


def test_a_logger_of_numbers_gets_no_figure(tmp_path):
    trainer = fit(Plain(), [NeuronSensitivityCallback()], logger=CSVLogger(tmp_path))
    assert files(trainer.log_dir) == {"metrics.csv", "neurons.json", "history.json"}
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        assert not [name for name in next(csv.reader(file)) if name.startswith(("figures", "magnitudes"))]


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_numbers_alone_are_written(tmp_path):
    trainer = fit(Plain(), [NeuronSensitivityCallback(html=True)], logger=TensorBoardLogger(tmp_path))
    assert shown_in(trainer.log_dir) == {}
    assert files(trainer.log_dir) == {"neurons.json", "history.json", "report.html"}


def layouts(folder: str) -> list[Any]:
    found = EventAccumulator(folder, size_guidance={"tensors": 0})
    found.Reload()
    events = found.Tensors("custom_scalars__config__")
    return [layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]) for event in events]


def test_the_layout_is_written_once_and_its_expressions_match_what_is_written(tmp_path):
    observers = [make(max_figures=0) for make in (NeuronSensitivityCallback, ActivationStatisticsCallback)]
    callbacks = [*observers, NeuronAblationCallback(ends=None), pruner("fisher", monitor="val_loss")]
    trainer = fit(Plain(), callbacks, logger=TensorBoardLogger(tmp_path), max_epochs=3)
    trainer.validate(Plain(), loader(24, seed=1), verbose=False)
    (layout,) = layouts(trainer.log_dir)
    charts = {c.title: list(c.multiline.tag) for category in layout.category for c in category.chart}
    assert charts == {title: kind[1] for group in LAYOUT.values() for title, kind in group.items()}
    assert [category.title for category in layout.category] == list(LAYOUT)
    found = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0})
    found.Reload()
    scalars = found.Tags()["scalars"]
    for title, patterns in charts.items():
        for pattern in patterns:
            matching = [tag for tag in scalars if re.search(pattern, tag)]
            assert matching, title
            assert {kind_of(tag) for tag in matching} == {"scalar"}


def test_each_logger_has_a_layout(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name=name) for name in ("a", "b")]
    fit(Plain(), [NeuronSensitivityCallback(max_figures=0)], logger=loggers, max_epochs=2)
    assert [len(layouts(logger.log_dir)) for logger in loggers] == [1, 1]


def test_the_history_in_the_folder_is_that_of_the_callback(tmp_path):
    callbacks = [make(max_figures=0) for make in (ActivationStatisticsCallback, NeuronSensitivityCallback)]
    trainer = fit(Plain(), callbacks, logger=TensorBoardLogger(tmp_path), max_epochs=3)
    for name, callback in (("history_2", callbacks[0]), ("history", callbacks[1])):
        path = Path(trainer.log_dir) / f"{name}.json"
        loaded = NeuronHistory.load(path)
        assert [entry.epoch for entry in loaded.entries] == [0, 1, 2]
        assert repr(loaded.entries) == repr(callback.history.entries)
        assert loaded.persistently_dead() == callback.history.persistently_dead()
        versions = json.loads(path.read_text())["versions"]
        assert {"python", "torch", "lightning", "lightning_neurons"} <= versions.keys()


def test_validation_alone_writes_no_history(tmp_path):
    trainer = trainer_of([NeuronSensitivityCallback(max_figures=0)], logger=TensorBoardLogger(tmp_path))
    trainer.validate(Plain(), loader(24, seed=1), verbose=False)
    assert files(trainer.log_dir) == {"neurons.json"}


@pytest.mark.parametrize("stage, make", list(zip(["fit", "validate", "test"], cycle(OBSERVERS))))
def test_the_page_is_written_at_the_end(tmp_path, capsys, stage, make):
    trainer = trainer_of([make(html=True, max_figures=0)], logger=TensorBoardLogger(tmp_path), max_epochs=2)
    if stage == "fit":
        trainer.fit(Plain(), loader(), loader(24, seed=1))
    else:
        getattr(trainer, stage)(Plain(), loader(24, seed=1), verbose=False)
    path = Path(trainer.log_dir) / "report.html"
    assert f"wrote {path}" in capsys.readouterr().out
    text = path.read_text()
    assert text.lower().startswith("<!doctype html>")
    assert "net.conv1" in text


def test_without_being_asked_no_page_is_written(tmp_path, capsys):
    trainer = fit(Plain(), [NeuronSensitivityCallback(max_figures=0)], logger=TensorBoardLogger(tmp_path))
    assert "report.html" not in files(trainer.log_dir)
    assert "report.html" not in capsys.readouterr().out


def test_a_page_without_a_logger_has_a_folder_of_its_own_for_each_run(tmp_path):
    for _ in range(2):
        fit(Plain(), [NeuronSensitivityCallback(html=True)], default_root_dir=tmp_path)
    expected = {"neurons.json", "history.json", "report.html"}
    assert {path.name: files(path) for path in tmp_path.glob("lightning_neurons/*")} == {
        "version_0": expected,
        "version_1": expected,
    }


def test_a_page_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module_of_publish, "write_html", full)
    with pytest.warns(UserWarning, match=r"no report.html \(python -m .* report .* it later\): OSError: disk full"):
        trainer = fit(Plain(), [NeuronSensitivityCallback(html=True)], logger=TensorBoardLogger(tmp_path))
    assert "neurons.json" in files(trainer.log_dir)


def test_figures_that_fail_are_said_and_training_goes_on(tmp_path, monkeypatch):
    def broken(*args: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(module_of_publish, "report_figures", broken)
    with pytest.warns(UserWarning, match="NeuronSensitivityCallback: not all figures were drawn: RuntimeError: no ink"):
        trainer = fit(Plain(), [NeuronSensitivityCallback()], logger=TensorBoardLogger(tmp_path), max_epochs=2)
    assert trainer.current_epoch == 2
    assert "neurons.json" in files(trainer.log_dir)


class Spoiling(Plain):
    """In epoch 1, something goes wrong."""

    def __init__(self, spoil: Any) -> None:
        super().__init__()
        self.spoil = spoil

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking and self.current_epoch == 1:
            self.spoil(self)


def test_a_report_that_cannot_replace_the_old_one_does_not_stop_training(tmp_path):
    def block(module: Any) -> None:
        path = Path(module.trainer.log_dir) / "neurons.json"
        path.unlink()
        (path / "in the way").mkdir(parents=True)

    observer, logger = NeuronSensitivityCallback(max_figures=1), TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match="NeuronSensitivityCallback: the report was not written to the log directory"):
        trainer = fit(Spoiling(block), [observer], logger=logger, max_epochs=3)
    assert trainer.current_epoch == 3
    assert shown_in(trainer.log_dir)["figures/importance"] == [3, 7, 11], "loggers have it"


@torch.no_grad()
def lost(module: Any) -> None:
    for parameter in module.net.parameters():
        parameter.fill_(float("nan"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_weights_that_are_no_numbers_do_not_stop_training(tmp_path):
    observer = NeuronSensitivityCallback(max_figures=5)  # one of each kind
    trainer = fit(Spoiling(lost), [observer], logger=TensorBoardLogger(tmp_path), max_epochs=3)
    assert trainer.current_epoch == 3


def test_that_the_drawing_of_pruning_fails_does_not_stop_training(tmp_path, monkeypatch):
    monkeypatch.setattr(module_of_part, "pruning_progress", lambda history: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        trainer = fit(Plain(), [pruner("weight_l2")], logger=TensorBoardLogger(tmp_path), max_epochs=3)
    assert trainer.current_epoch == 3


def test_that_the_scatter_of_ablation_fails_does_not_stop_training(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_neurons.callbacks.neuron_ablation.agreement_scatter", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="measured and not shown: ZeroDivisionError"):
        trainer = fit(Plain(), [NeuronAblationCallback(ends=2)], logger=TensorBoardLogger(tmp_path))
    assert trainer.current_epoch == 1


def test_arguments_out_of_range():
    given = [("max_figures", -1), ("max_figures", 1.5), ("html", 1), ("html", "yes")]
    rows = [({name: wrong}, f"{name}={wrong!r}") for name, wrong in given]
    for make in OBSERVERS:
        assert not_refused(make, rows) == {}


def test_the_file_of_pruning_is_there_before_any_cut(tmp_path):
    trainer = fit(Plain(), [pruner("weight_l2", start_epoch=2)], logger=TensorBoardLogger(tmp_path), max_epochs=3)
    found = PruningHistory.load(Path(trainer.log_dir) / "pruning.json")
    assert [point.epoch for point in found.points] == [2]
    assert shown_in(trainer.log_dir) == {"pruning/progress": [8]}
