"""Files of a run lie in a folder that is the run's own, wherever that is, and stay those of the run."""

import copy
import json
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import fsspec
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_neurons import (
    NeuronAblationCallback,
    NeuronReport,
    NeuronSensitivityCallback,
    SaliencyCallback,
)
from lightning_neurons.callbacks.observing import publish
from lightning_neurons.cli import main
from lightning_neurons.results.whole_file import write_whole
from tests.callbacks.modules import MemoryLogger, Plain, fit, loader, trainer_of


class Service(MemoryLogger):
    """The directory is shared by runs, as of the loggers of tracking services."""

    def __init__(self, folder: Path, run: Any) -> None:
        super().__init__()
        self.folder, self.run = folder, run

    save_dir = property(lambda self: str(self.folder))
    name = property(lambda self: "project")
    version = property(lambda self: self.run)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*") if p.suffix != ".csv"}


@pytest.mark.filterwarnings("ignore:.*logs directory .* exists and is not empty.*")
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_what_is_found_after_a_fit_changes_nothing_of_it(tmp_path, stage):
    callback = NeuronSensitivityCallback(max_figures=0, html=True)
    callbacks = [callback, NeuronAblationCallback(ends=1), SaliencyCallback(max_samples=2)]
    trainer = fit(Plain(), callbacks, logger=CSVLogger(tmp_path, name="", version=""), max_epochs=2)
    before, entries = contents(tmp_path), list(callback.history.entries)
    getattr(trainer, stage)(Plain(), loader(8, seed=5), verbose=False)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {f"{stage}/neurons.json", f"{stage}/report.html"} <= after.keys()
    assert not [name for name in after if name.startswith(stage) and "history" in name]
    assert NeuronReport.load(tmp_path / stage / "neurons.json").epoch is None is callback.report.epoch
    assert callback.history.entries == entries
    again = trainer_of([NeuronSensitivityCallback()], logger=CSVLogger(tmp_path, name="", version=""))
    getattr(again, stage)(Plain(), loader(8, seed=5), verbose=False)
    assert {name: contents(tmp_path)[name] for name in before} == before, "nor does another Trainer"


@pytest.mark.parametrize("runs", [("a1", "b2"), (3, 4), (None, None), ("", "")])
def test_runs_that_share_a_directory_keep_their_files(tmp_path, runs):
    kept: dict[str, bytes] = {}
    for run in runs:
        fit(Plain(), [NeuronSensitivityCallback(max_figures=0)], logger=Service(tmp_path, run))
        found = contents(tmp_path)
        assert {name: found[name] for name in kept} == kept
        assert len(found) == len(kept) + 2
        kept = found
    if runs[0] == "a1":
        assert "project/a1/neurons.json" in kept, "where Lightning puts checkpoints"


def test_everything_goes_to_a_directory_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = "memory://bucket/run"
    callbacks = [
        NeuronSensitivityCallback(max_figures=1, html=True), NeuronAblationCallback(ends=1),
        SaliencyCallback(max_samples=2),
    ]  # fmt: skip
    trainer = fit(Plain(), callbacks, logger=TensorBoardLogger(run, name="", version="v"))
    files = fsspec.filesystem("memory")
    names = {path.removeprefix("/bucket/run/v/") for path in files.find("/bucket/run/v") if "tfevents" not in path}
    expected = {"neurons.json", "history.json", "ablation.json", "report.html", "pictures/saliency.png"}
    assert names - {"hparams.yaml"} == {*expected, "pictures/pictures.json"}
    assert NeuronReport.load(f"{trainer.log_dir}/neurons.json").epoch == 0
    page = files.cat_file("/bucket/run/v/report.html").decode()
    assert "Neurons of v" in page
    assert page.count("data:image/png") > 1, "the picture of saliency as well"
    main(["report", f"{run}/v"])
    assert capsys.readouterr().out.strip().endswith(f"{run}/v/report.html")
    assert not list(tmp_path.rglob("*")), "nothing lies here"


def test_a_file_that_is_written_keeps_what_it_is(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_whole(link, "new")
    assert (link.is_symlink(), real.read_text(), real.stat().st_mode & 0o777) == (True, "new", 0o640)
    write_whole("/dev/null", "nothing")
    assert not Path("/dev/null").is_file()
    longest = tmp_path / ("n" * 255)
    write_whole(longest, b"new")
    assert {*tmp_path.iterdir()} == {real, link, longest}


def test_who_writes_a_file_at_the_same_time_does_not_disturb(tmp_path):
    path, letters = tmp_path / "file.json", "abcd"

    def write_often(letter: str) -> None:
        for _ in range(100):
            write_whole(path, letter * 5000)

    with ThreadPoolExecutor(len(letters)) as threads:
        writing = [threads.submit(write_often, letter) for letter in letters]
        wait(writing, return_when=FIRST_COMPLETED)
        texts = {path.read_text() for _ in range(50)}
    assert [done.exception() for done in writing] == [None] * 4
    assert texts <= {letter * 5000 for letter in letters}
    assert [*tmp_path.iterdir()] == [path]


def test_who_gave_a_callback_that_was_copied_hears_where_the_report_is(tmp_path, capsys):
    mine = NeuronSensitivityCallback(max_figures=0)
    trainer = fit(Plain(), [copy.deepcopy(mine)], logger=CSVLogger(tmp_path))
    assert f"neurons.json is in {trainer.log_dir}" in capsys.readouterr().out
    with pytest.warns(UserWarning, match=rf"a copy of it has.*{trainer.log_dir}"):
        assert mine.report is None
    assert copy.deepcopy(trainer.callbacks[0]).report is not None
    assert NeuronSensitivityCallback().report is None, "and nobody else"


def test_the_history_is_written_where_the_package_was_not_installed(tmp_path, monkeypatch):
    def version(name: str) -> str:
        if name == "lightning_neurons":
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(publish, "version", version)
    fit(Plain(), [NeuronSensitivityCallback(max_figures=0)], logger=CSVLogger(tmp_path, name="", version=""))
    versions = json.loads((tmp_path / "history.json").read_text())["versions"]
    assert versions["torch"] == "1.2"
    assert "lightning_neurons" not in versions
