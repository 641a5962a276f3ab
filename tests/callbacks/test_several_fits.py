"""Fits that share a log directory: folds of a cross-validation, and runs that are resumed."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_neurons import (
    ActivationMaximizationCallback,
    NeuronAblationCallback,
    NeuronReport,
    NeuronSensitivityCallback,
    SaliencyCallback,
)
from lightning_neurons.report.logging.tags import kind_of
from lightning_neurons.results.history import NeuronHistory
from tests.callbacks.modules import Plain, fit, loader, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*sampler has shuffling enabled")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.json")} | {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.html")
    }


def observer(*, html: bool = False) -> NeuronSensitivityCallback:
    return NeuronSensitivityCallback(max_figures=0, html=html)


def module_of(seed: int) -> Plain:
    torch.manual_seed(seed)
    return Plain()


def epochs(folder: Path) -> list[int | None]:
    history = NeuronHistory.load(folder / "history.json")
    return [entry.epoch for entry in history.entries]


def one_trainer(folder: Path) -> Any:
    trainer = trainer_of([observer()], max_epochs=2, logger=CSVLogger(folder, name="", version=""))

    def run(seed: int) -> None:
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit_loop.epoch_loop.batch_progress.reset()
        trainer.should_stop = False
        trainer.fit(module_of(seed), loader(), loader(24, seed=seed))

    return run


def one_logger(folder: Path) -> Any:
    shared = CSVLogger(folder, name="", version="")
    return lambda seed: fit(
        module_of(seed), [observer(html=True)], loader(), loader(24, seed=seed), logger=shared, max_epochs=2
    )  # fmt: skip


def one_folder(folder: Path) -> Any:
    def run(seed: int) -> None:
        own = CSVLogger(folder, name="", version="")
        fit(module_of(seed), [observer()], loader(), loader(24, seed=seed), logger=own, max_epochs=2)

    return run


def one_callback(folder: Path) -> Any:
    shared = observer()

    def run(seed: int) -> None:
        own = CSVLogger(folder, name="", version="")
        fit(module_of(seed), [shared], loader(), loader(24, seed=seed), logger=own, max_epochs=2)

    return run


@pytest.mark.parametrize("way", [one_trainer, one_logger, one_folder, one_callback])
def test_every_fold_keeps_its_files(tmp_path, way):
    alone = {}
    for seed in (1, 2):
        one_folder(tmp_path / f"alone{seed}")(seed)
        alone[seed] = NeuronReport.load(tmp_path / f"alone{seed}" / "neurons.json")
    run, shared, kept = way(tmp_path / "shared"), tmp_path / "shared", dict[str, bytes]()
    for seed, folder in ((1, shared), (2, shared / "fit_2")):
        run(seed)
        found = contents(shared)
        assert {name: found[name] for name in kept} == kept, "the folds before are as they were"
        assert len(found) == len(kept) + 2 + (way is one_logger)
        kept = found
        assert epochs(folder) == [0, 1]
        report = NeuronReport.load(folder / "neurons.json")
        assert (folder / "report.html").is_file() == (way is one_logger)
        for name, expected in alone[seed].scores["taylor"].items():
            torch.testing.assert_close(report.scores["taylor"][name], expected)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_what_a_fold_is_evaluated_on_lies_with_the_fold(tmp_path, stage):
    for seed in (1, 2):
        module, logger = module_of(seed), CSVLogger(tmp_path, name="", version="")
        getattr(fit(module, [observer()], logger=logger), stage)(module, loader(8, seed=seed), verbose=False)
    kept = contents(tmp_path)
    assert {f"{stage}/neurons.json", f"fit_2/{stage}/neurons.json"} <= kept.keys()
    for _ in range(2):
        other = trainer_of([observer()], logger=CSVLogger(tmp_path, name="", version=""))
        getattr(other, stage)(module_of(1), loader(8, seed=9), verbose=False)
        found = contents(tmp_path)
        assert {name: found[name] for name in kept} == kept, "nor does another Trainer overwrite it"
        kept = found
    assert {f"{stage}_2/neurons.json", f"{stage}_3/neurons.json"} <= kept.keys()


class StoppedError(Exception):
    """What ends a run in the middle."""


def test_who_resumes_goes_on_with_the_files_of_the_last_fit(tmp_path):
    class Interrupted(Plain):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2 and not stopped.called:
                stopped()
                raise StoppedError

    stopped = Mock(return_value=None)
    fit(Plain(), [observer()], logger=CSVLogger(tmp_path, name="", version=""))
    first = contents(tmp_path)
    saves = ModelCheckpoint(tmp_path / "saved", save_last=True)
    settings: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": True}
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.raises(StoppedError):
        fit(Interrupted(), [observer(), saves], logger=logger, **settings)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Interrupted(), [observer(), saves], logger=logger, ckpt=tmp_path / "saved" / "last.ckpt", **settings)
    assert epochs(tmp_path / "fit_2") == [0, 1, 2, 3]
    assert not (tmp_path / "fit_3").exists()
    assert {name: contents(tmp_path)[name] for name in first} == first


def test_a_trainer_that_goes_on_with_its_module_goes_on_with_its_files(tmp_path):
    trainer = fit(module := Plain(), [observer()], logger=CSVLogger(tmp_path, name="", version=""))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader(), loader(24, seed=1))
    assert epochs(tmp_path) == [0, 1, 2]
    assert contents(tmp_path).keys() == {"neurons.json", "history.json"}


def test_what_is_validated_before_its_fit_shares_the_folder(tmp_path):
    trainer = trainer_of([observer()], logger=CSVLogger(tmp_path, name="", version=""))
    trainer.validate(module := Plain(), loader(24, seed=1), verbose=False)
    trainer.fit(module, loader(), loader(24, seed=1))
    assert contents(tmp_path).keys() == {"neurons.json", "history.json"}


def test_series_and_pictures_of_another_fit_stay_apart(tmp_path):
    pytest.importorskip("matplotlib")
    for seed in (1, 2):
        callbacks = [
            NeuronSensitivityCallback(max_figures=1), NeuronAblationCallback(ends=1), SaliencyCallback(max_samples=2),
            ActivationMaximizationCallback([0], cards=1, steps=1, max_samples=4),
        ]  # fmt: skip
        fit(module_of(seed), callbacks, logger=TensorBoardLogger(tmp_path, name="", version=""))
        other = trainer_of(callbacks, logger=TensorBoardLogger(tmp_path, name="", version=""))
        other.validate(module_of(seed), loader(24, seed=1), verbose=False)
    found = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0, "images": 0}).Reload()
    for kind, read in (("scalars", found.Scalars), ("histograms", found.Histograms), ("images", found.Images)):
        own = [tag for tag in found.Tags()[kind] if kind_of(tag) is not None]
        first = [tag for tag in own if "_fit_2" not in tag.split("/")[0] and "_validate" not in tag.split("/")[0]]
        assert first, kind
        for tag in first:
            assert len(read(tag)) == 1, tag
    images = {tag.split("/")[0] for tag in found.Tags()["images"]}
    for group in ("saliency", "maximization", "cards", "figures", "ablation"):
        assert {group, f"{group}_fit_2", f"{group}_validate"} <= images


def test_a_series_is_followed_under_its_name_in_every_fold(tmp_path):
    for seed in (1, 2):
        saves = ModelCheckpoint(tmp_path / str(seed), monitor="neurons/dead_share")
        logger = CSVLogger(tmp_path, name="", version="")
        fit(module_of(seed), [NeuronSensitivityCallback(), saves], logger=logger, enable_checkpointing=True)
        assert saves.best_model_score is not None
