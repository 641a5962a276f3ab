"""What a step does beside the module happens once: what it prints and logs, the environment, the data module."""

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor

from lightning_neurons import NeuronAblationCallback, NeuronSensitivityCallback
from lightning_neurons.isolation.surroundings import silent, writing_nothing
from tests.callbacks.modules import Plain, fit, loader, trainer_of

LOG = logging.getLogger("a step")


class Data(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.by_name, self.names, self.count = [], {}, set(), 0

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(24, seed=1)


class Talks(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        print(f"printed {batch_idx}")
        sys.stderr.writelines([f"said {batch_idx}\n"])
        LOG.warning("logged %d", batch_idx)
        data = self.trainer.datamodule
        if data is not None:
            data.seen.append(batch_idx)
            data.by_name[f"batch {len(data.by_name)}"] = batch_idx
            data.names.add(len(data.names))
            data.count += 1
            os.environ["OF_A_STEP"] = str(int(os.environ["OF_A_STEP"]) + 1)
            os.environ.setdefault(f"OF_A_STEP_{data.count}", "new")
        return super().validation_step(batch, batch_idx)


def test_a_step_speaks_once_for_each_batch(capsys, caplog):
    fit(Talks(), [NeuronSensitivityCallback(max_figures=0)], val=loader(24, seed=1), num_sanity_val_steps=0)
    heard = capsys.readouterr()
    for batch_idx in range(3):
        assert heard.out.count(f"printed {batch_idx}") == 1
        assert heard.err.count(f"said {batch_idx}") == 1
        assert [record.getMessage() for record in caplog.records].count(f"logged {batch_idx}") == 1


def test_a_loss_fn_which_nobody_else_runs_is_heard(capsys):
    def loss(module: Any, batch: Any) -> Tensor:
        print("in loss_fn")
        return module.loss(batch)

    fit(Plain(), [NeuronSensitivityCallback(loss_fn=loss, max_figures=0)])
    assert "in loss_fn" in capsys.readouterr().out


def test_the_environment_and_what_the_data_module_collects_are_those_of_the_run_alone(monkeypatch):
    found = []
    for callbacks in ([], [NeuronSensitivityCallback(max_figures=0)]):
        monkeypatch.setenv("OF_A_STEP", "0")
        data = Data()
        trainer_of(callbacks).fit(Talks(), datamodule=data)
        variables = {name: value for name, value in os.environ.items() if name.startswith("OF_A_STEP")}
        found.append((data.seen, data.by_name, data.names, data.count, variables))
        for name in variables:
            monkeypatch.delenv(name)
    assert found[0] == found[1]
    assert len(found[0][0]) == 5


def test_what_a_dataset_collects_is_that_of_the_run_alone():
    class Visits(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            data = self.trainer.val_dataloaders.dataset
            data.hits += 1
            data.seen.append(batch_idx)
            return super().validation_step(batch, batch_idx)

    found = []
    for callbacks in ([], [NeuronSensitivityCallback(max_figures=0), NeuronAblationCallback(ends=1)]):
        val = loader(24, seed=1)
        val.dataset.hits, val.dataset.seen = 0, []
        fit(Visits(), callbacks, val=val)
        found.append((val.dataset.hits, val.dataset.seen))
    assert found[0] == found[1] == (5, [0, 1, 0, 1, 2])


def test_other_threads_and_whoever_keeps_the_stream_are_heard(capsys, caplog):
    with silent():
        kept = sys.stdout
        print("nobody hears this")
        LOG.warning("nor this")
        other = threading.Thread(target=lambda: (print("another thread"), LOG.warning("its log")))
        other.start()
        other.join()
    print("later", file=kept)
    assert capsys.readouterr().out == "another thread\nlater\n"
    assert [record.getMessage() for record in caplog.records] == ["its log"]


def test_what_this_thread_writes_to_files_is_dropped_and_what_it_reads_and_others_write_is_not(tmp_path):
    def write(name: str) -> None:
        with open(tmp_path / name, "w") as file:
            file.write(name)
        (tmp_path / f"{name} of bytes").write_bytes(b"1")
        torch.save({}, tmp_path / f"{name} saved")

    (tmp_path / "kept").write_text("kept")
    real = open, Path.open, torch.save
    with writing_nothing():
        write("here")
        with open(tmp_path / "kept", "a") as file:
            file.write("here")
        assert (tmp_path / "kept").read_text() == "kept"
        other = threading.Thread(target=write, args=("other",))
        other.start()
        other.join()
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "other", "other of bytes", "other saved"}
    assert (tmp_path / "kept").read_text() == "kept"
    assert real == (open, Path.open, torch.save)
