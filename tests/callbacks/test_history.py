"""When a callback measures, and what it remembers: over epochs, over a resume, over several runs."""

import math
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_neurons import ActivationStatisticsCallback, NeuronSensitivityCallback
from tests.callbacks.modules import LAYERS, Plain, fit, loader, trainer_of

OBSERVERS = [ActivationStatisticsCallback, NeuronSensitivityCallback]


class KillsAndRevives(Plain):
    """conv1's neuron 0 is always dead; neuron 2 dies after epoch 0 and comes back after epoch 1."""

    def __init__(self) -> None:
        super().__init__(lr=1e-4)
        self.net.norm1.bias.data = torch.tensor([-100.0, 1.0, 1.0, 1.0])

    def on_train_epoch_end(self) -> None:
        self.net.norm1.bias.data[2] = -100.0 if self.current_epoch == 0 else 1.0


def epochs(callback: Any) -> list[int]:
    return [entry.epoch for entry in callback.history.entries]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_neurons_that_die_and_revive_are_found(observer):
    callback = observer()
    fit(KillsAndRevives(), [callback], max_epochs=3)
    first, second, third = callback.history.entries
    assert (first.died, first.revived) == ({}, {})
    assert all(math.isnan(s) for s in first.stability.values())
    assert second.died["net.conv1"] == [2]
    assert second.revived["net.conv1"] == []
    assert third.died["net.conv1"] == []
    assert third.revived["net.conv1"] == [2]
    assert [e.dead["net.conv1"] for e in callback.history.entries] == [[0], [0, 2], [0]]
    assert callback.history.persistently_dead()["net.conv1"] == [0]
    assert epochs(callback) == [0, 1, 2]
    assert [e.step for e in callback.history.entries] == [4, 8, 12]
    assert all(-1 <= third.stability[name] <= 1 for name in LAYERS)


def _train(callback: Any, last: int, folder: Path, ckpt: Path | None = None) -> None:
    L.seed_everything(0, verbose=False)
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    train = loader(32, seed=0)
    fit(KillsAndRevives(), [callback, saving], train=train, ckpt=ckpt, max_epochs=last, enable_checkpointing=True)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize(
    "arguments", [{}, {"source": "train", "loss_fn": Plain.loss}, {"every_n_epochs": 2}], ids=["val", "train", "2"]
)
def test_resuming_continues_the_history_as_if_nothing_had_happened(tmp_path, arguments):
    whole, first, second = (NeuronSensitivityCallback(**arguments) for _ in range(3))
    _train(whole, 4, tmp_path / "whole")
    _train(first, 2, tmp_path / "parts")
    _train(second, 4, tmp_path / "parts", tmp_path / "parts" / "epoch=1.ckpt")
    assert epochs(second) == epochs(whole) == ([0, 1, 2, 3] if "every_n_epochs" not in arguments else [1, 3])
    for ours, theirs in zip(second.history.entries, whole.history.entries, strict=True):
        assert (ours.dead, ours.died, ours.revived, ours.step) == (
            theirs.dead,
            theirs.died,
            theirs.revived,
            theirs.step,
        )
        assert repr(dict(ours.stability)) == repr(dict(theirs.stability))


def test_the_state_in_a_checkpoint_is_plain(tmp_path):
    callback = NeuronSensitivityCallback()
    _train(callback, 2, tmp_path)
    states = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    state = states[callback.state_key]
    assert [entry["epoch"] for entry in state["history"]["entries"]] == [0, 1]


@pytest.mark.parametrize("every, expected", [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (5, [4])])
@pytest.mark.parametrize("source", ["val", "train"])
def test_every_n_epochs_counts_epochs(source, every, expected):
    callback = NeuronSensitivityCallback(every_n_epochs=every, source=source, loss_fn=Plain.loss)
    fit(Plain(), [callback], max_epochs=5)
    assert epochs(callback) == expected


def test_every_validation_is_measured_if_there_are_several_in_an_epoch():
    callback = NeuronSensitivityCallback()
    fit(Plain(), [callback], max_epochs=2, val_check_interval=0.5)
    assert epochs(callback) == [0, 0, 1, 1]
    assert [e.step for e in callback.history.entries] == [2, 4, 6, 8]


def test_every_n_epochs_measures_the_whole_epoch_that_is_due():
    callback = NeuronSensitivityCallback(every_n_epochs=2)
    fit(Plain(), [callback], max_epochs=4, val_check_interval=0.5)
    assert set(epochs(callback)) == {1, 3}
    assert callback.report.step == 16, "the last report is of the weights at the end of the epoch"


def test_an_epoch_without_validation_is_made_up_for_at_the_next():
    callback = NeuronSensitivityCallback(every_n_epochs=3)
    fit(Plain(), [callback], max_epochs=6, check_val_every_n_epoch=2)
    assert epochs(callback) == [3, 5]


def test_a_second_run_with_every_n_epochs_measures_again():
    callback, module = NeuronSensitivityCallback(every_n_epochs=2), Plain()
    fit(module, [callback], max_epochs=4)
    fit(module, [callback], max_epochs=2)
    assert epochs(callback) == [1, 3, 1]
    fit(Plain(), [callback], max_epochs=2)
    assert epochs(callback) == [1], "another model has another history"


def test_validate_after_fit_does_not_add_to_the_history():
    callback, module = NeuronSensitivityCallback(), Plain()
    trainer = fit(module, [callback])
    trainer.validate(module, loader(16), verbose=False)
    assert len(callback.history) == 1
    assert callback.report.epoch is None
    assert callback.report.counts["net.conv1"].samples.tolist() == [16] * 4


def test_the_sanity_check_is_not_a_measurement():
    callback = NeuronSensitivityCallback()
    trainer = trainer_of([callback], num_sanity_val_steps=2, max_epochs=1)
    seen = []
    module = Plain()
    module.on_train_start = lambda: seen.append((callback.report, len(callback.history)))
    trainer.fit(module, loader(), loader(24))
    assert seen == [(None, 0)]
    assert len(callback.history) == 1
