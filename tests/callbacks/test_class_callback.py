"""The callback for classes says what ``class_study`` says on the same samples, and where it can, it draws."""

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_neurons import ClassNeuronsCallback, class_study
from lightning_neurons.report.logging.tags import TAGS, kind_of
from tests.callbacks.modules import MemoryLogger, Net, OldNamespace, Plain, fit, loader, trainer_of
from tests.callbacks.refusals import not_refused
from tests.callbacks.studied import NoForward, OldNoForward, TwoNetworks, assert_same, samples, sorted_by_class

SETTINGS: list[dict[str, Any]] = [
    {},
    {"share": 0.3, "controls": 1},
    {"method": "masking", "cumulative": 0.8},
    {"method": "masking", "replacement": "mean"},
    {"importance": "fisher", "replacement": "mean", "seed": 3},
    {"classes": [2, 0], "layers": ["net.conv*"]},
]


@pytest.mark.parametrize("place", range(len(SETTINGS)), ids=[str(settings) for settings in SETTINGS])
def test_the_report_is_that_of_class_study_on_the_same_samples(place):
    settings = SETTINGS[place]
    module, callback = Plain(), ClassNeuronsCallback(**settings)
    if place % 2 == 0:
        fit(module, [callback], max_epochs=2)
    else:
        trainer_of([callback]).validate(module, loader(24, seed=1), verbose=False)
    module.eval()
    assert_same(callback.report, class_study(module, [samples()], **settings))


@pytest.mark.parametrize(
    "of, make", [(L, NoForward), (pytorch_lightning, OldNoForward), (pytorch_lightning, OldNamespace)]
)
def test_a_module_without_a_forward_is_run_by_its_one_network(of, make):
    module, callback = make(), ClassNeuronsCallback()
    fit(module, [callback], of=of)
    net = module.net.eval()
    expected = class_study(net, [samples()])
    assert list(callback.report.importance) == [f"net.{layer}" for layer in expected.importance]
    for layer, values in expected.importance.items():
        assert torch.allclose(callback.report.importance[f"net.{layer}"], values, atol=1e-6)
    for ours, theirs in zip(callback.report.accuracies, expected.accuracies, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("name", ["net", "other"])
def test_a_forward_of_ones_own_says_where_the_logits_come_from(name):
    module, forward = TwoNetworks(), lambda m, batch: m.get_submodule(name)(batch[0])
    callback = ClassNeuronsCallback(forward=forward)
    fit(module, [callback])
    module.eval()
    assert_same(callback.report, class_study(module, [samples()], forward=forward))
    assert list(callback.report.importance) == [f"{name}.{layer}" for layer in ("conv1", "conv2", "fc1")]
    alone = class_study(module.get_submodule(name), [samples()])
    for ours, theirs in zip(callback.report.accuracies, alone.accuracies, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], abs=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"classes": [0, 3]}, "classes=3.*3 outputs"),
        ({"classes": [17]}, "classes=17.*3 outputs"),
        ({"layers": ["net.fc2"]}, r"layers=.*net.fc2.*lead to those of the logits: net.conv1, net.conv2, net.fc1"),
        ({"forward": lambda module, batch: {"a": module(batch[0]), "b": module(batch[0])}}, "returned dict.*logits"),
    ],
)
def test_the_trial_before_training_finds_what_cannot_work(arguments, message):
    steps = []

    class Counting(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match=f"ClassNeuronsCallback: .*{message}"):
        fit(Counting(), [ClassNeuronsCallback(**arguments)])
    assert steps == []


def test_a_second_callback_has_files_and_series_of_its_own(tmp_path):
    callbacks = [ClassNeuronsCallback(), ClassNeuronsCallback(share=0.3, classes=[0, 2])]
    memory = MemoryLogger()
    trainer = fit(Plain(), callbacks, logger=[TensorBoardLogger(tmp_path), memory])
    found = EventAccumulator(trainer.log_dir, size_guidance={"images": 0})
    found.Reload()
    for name, callback in zip(("classes", "classes_2"), callbacks, strict=True):
        document = json.loads((Path(trainer.log_dir) / f"{name}.json").read_text())
        assert document["subnetworks"] == {str(k): callback.report.subnetwork(k) for k in callback.report.classes}
        written = {tag: value for tag, _, value in memory.rows if tag.startswith(f"{name}/")}
        rows = [(row.model.replace(" ", "_"), row) for row in callback.report.accuracies]
        expected = {f"{name}/{kind}/{row.klass}": row.on_class for kind, row in rows
                    if kind in ("subnetwork", "ablation", "random_subnetwork")}  # fmt: skip
        assert {tag: written[tag] for tag in expected} == expected
        assert written.keys() == expected.keys() | {f"{name}/reuse"}
    figures = {tag.name for tag in TAGS if tag.kind == "figure" and tag.name.startswith("classes/")}
    assert {*found.Tags()["images"]} == figures | {name.replace("classes", "classes_2") for name in figures}


@pytest.mark.parametrize(
    "module, why",
    [
        (TwoNetworks, "TwoNetworks has no forward, and 2 networks"),
        (lambda: Plain(nn.Sequential(nn.Flatten(), nn.Linear(36, 3))), "no layer leads to those of the logits"),
    ],
    ids=["two networks", "one layer"],
)
def test_a_module_that_has_no_classes_to_study_is_trained_with_warnings(module, why):
    trial, later, nothing = (
        pytest.warns(UserWarning, match=m)
        for m in (f"the sanity check could not be measured.*{why}", f"epoch 0 was not.*{why}", "nothing has been")
    )
    with trial, later, nothing:
        trainer = fit(module(), [ClassNeuronsCallback()], max_epochs=2)
    assert trainer.current_epoch == 2


def test_without_matplotlib_it_is_said_once_and_scalars_are_written(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    callback, memory = ClassNeuronsCallback(), MemoryLogger()
    with pytest.warns(UserWarning, match=r"pip install 'lightning_neurons\[figures\]'") as told:
        trainer = fit(Plain(), [callback], logger=[TensorBoardLogger(tmp_path), memory], max_epochs=2)
    trainer.validate(Plain(), loader(24, seed=1), verbose=False)
    assert len([one for one in told if "matplotlib" in str(one.message)]) == 1
    assert {name for name, *_ in memory.rows} >= {"classes/reuse", "classes/subnetwork/0"}
    found = EventAccumulator(trainer.log_dir)
    found.Reload()
    assert found.Tags()["images"] == []


def test_figures_and_scalars_are_written_once_for_each_study_where_the_table_says(tmp_path):
    callback, memory = ClassNeuronsCallback(every_n_epochs=2), MemoryLogger()
    trainer = fit(Plain(), [callback], logger=[TensorBoardLogger(tmp_path), memory], max_epochs=4)
    found = EventAccumulator(trainer.log_dir, size_guidance={"images": 0})
    found.Reload()
    own = [tag for tag in TAGS if tag.name.startswith("classes/")]
    assert set(found.Tags()["images"]) == {tag.name for tag in own if tag.kind == "figure"}
    for tag in found.Tags()["images"]:
        assert [event.step for event in found.Images(tag)] == [7, 15]
        assert kind_of(tag) == "figure"
    scalars = {tag for tag in found.Tags()["scalars"] if tag.startswith("classes/")}
    wanted = {t.name.replace("{class}", str(k)) for t in own if t.kind == "scalar" for k in range(3)}
    assert scalars == wanted == {name for name, *_ in memory.rows if name.startswith("classes/")}
    last = {name: value for name, _, value in memory.rows}
    for klass in range(3):
        assert last[f"classes/subnetwork/{klass}"] == callback.report.accuracy("subnetwork", klass).on_class
        assert last[f"classes/ablation/{klass}"] == callback.report.accuracy("ablation", klass).on_class
        assert (
            last[f"classes/random_subnetwork/{klass}"] == callback.report.accuracy("random subnetwork", klass).on_class
        )
    excess = callback.report.jaccard - callback.report.jaccard_chance
    assert last["classes/reuse"] == pytest.approx(
        sum(float(excess[i, j]) for i in range(3) for j in range(3) if i != j) / 6
    )
    document = json.loads((Path(trainer.log_dir) / "classes.json").read_text())
    assert document["classes"] == [0, 1, 2]
    assert document["subnetworks"]["1"] == callback.report.subnetwork(1)


@pytest.mark.parametrize("settings", [{}, {"classes": [0, 2]}], ids=str)
def test_a_sanity_check_that_sees_one_class_alone_does_not_stop_training(settings):
    callback = ClassNeuronsCallback(**settings)
    fit(Plain(), [callback], val=sorted_by_class(0, 1, 2))
    assert callback.report.classes == tuple(settings.get("classes", [0, 1, 2]))


def test_a_class_that_is_not_in_the_data_is_said_and_training_goes_on():
    callback = ClassNeuronsCallback(classes=[0, 2])
    missing, nothing = (pytest.warns(UserWarning, match=m) for m in ("epoch 0 was not.*classes=2.*0, 1", "nothing has"))
    with missing, nothing:
        trainer = fit(Plain(), [callback], val=sorted_by_class(0, 1), num_sanity_val_steps=0, max_epochs=2)
    assert trainer.current_epoch == 2
    with pytest.raises(MisconfigurationException, match="classes=2"):
        trainer_of([ClassNeuronsCallback(classes=[0, 2])]).validate(Plain(), sorted_by_class(0, 1), verbose=False)


def test_a_bounded_sample_has_all_classes():
    callback = ClassNeuronsCallback(max_samples=9)
    fit(Plain(), [callback], val=sorted_by_class(0, 1, 2), num_sanity_val_steps=0)
    assert callback.report.classes == (0, 1, 2)
    assert sum(callback.report.class_counts) == 9


WRONG = [
    ({"classes": []}, r"classes=\[\]"),
    ({"classes": [1, 1]}, r"classes=\[1, 1\]"),
    ({"classes": "01"}, "classes='01'"),
    ({"method": "maskin"}, "method='maskin'.*did you mean 'masking'"),
    ({"importance": "fishr"}, "importance: .*'fishr'. Did you mean 'fisher'"),
    ({"method": "masking", "importance": "fisher"}, "importance='fisher'.*the default"),
    ({"share": 1.0}, "share=1.0"),
    ({"share": 0}, "share=0"),
    ({"forward": Net()}, "forward='Net'"),
    ({"forward": Net}, "forward='type'"),
    ({"forward": "net"}, "forward='str'"),
    ({"share": 0.3, "threshold": 0.1}, "share, threshold, cumulative.*at most one"),
    ({"threshold": float("nan")}, "threshold=nan"),
    ({"cumulative": 0}, "cumulative=0"),
    ({"replacement": "resample"}, "replacement='resample'"),
    ({"controls": 0}, "controls=0"),
    ({"max_samples": 1}, "max_samples=1"),
    ({"every_n_epochs": -1}, "every_n_epochs=-1"),
    ({"layers": "net.conv1"}, "layers='net.conv1'"),
]


def test_arguments_out_of_range():
    assert not_refused(ClassNeuronsCallback, WRONG) == {}


def test_the_callback_can_be_pickled_and_the_table_is_printed(capsys):
    callback = ClassNeuronsCallback()
    fit(Plain(), [callback])
    assert_same(pickle.loads(pickle.dumps(callback)).report, callback.report)
    printed = capsys.readouterr().out
    assert "Classes" in printed
    assert f"{callback.report.accuracy('whole', 1).on_class:.2f}/" in printed
