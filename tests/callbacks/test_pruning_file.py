"""pruning.json in the folder of a run: after every cut it says what the rounds say, also of those taken back."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_neurons.results.pruning_history import PruningHistory
from tests.callbacks.guarded import Scored, by_epoch, guard
from tests.callbacks.modules import Plain, fit
from tests.callbacks.pictured import ImageLogger, files, shown_in
from tests.callbacks.pruned import Probe, pruner, widths


def read(trainer: Any) -> PruningHistory | None:
    path = Path(trainer.log_dir) / "pruning.json"
    return PruningHistory.load(path) if path.exists() else None


def expected_points(callback: Any) -> list[tuple[Any, ...]]:
    rounds = callback.rounds
    every = [(one, False) for one in rounds.done] + [(one, True) for one in rounds.undone]
    rows = sorted(every, key=lambda pair: pair[0].step)
    return [
        (one.epoch, len(one.plan), one.plan.cost.parameters_after, one.plan.cost.macs_after, one.before, one.cut,
         one.after, gone) for one, gone in rows
    ]  # fmt: skip


def points_of(history: PruningHistory) -> list[tuple[Any, ...]]:
    return [tuple(vars(point).values()) for point in history.points]


def test_the_file_says_after_each_cut_what_the_rounds_say(tmp_path):
    callback = pruner("fisher", amount=0.5, schedule="linear", start_epoch=1, end_epoch=3, monitor="val_loss")
    seen = Probe(
        "on_train_batch_end", lambda trainer, module: (read(trainer), widths(module), expected_points(callback))
    )
    trainer = fit(Plain(), [callback, seen], logger=TensorBoardLogger(tmp_path), max_epochs=5)
    assert [len(seen.seen[epoch][0].points) for epoch in range(5)] == [0, 1, 2, 3, 3]
    first = seen.seen[0][0]
    for history, now, points in seen.seen.values():
        assert points_of(history) == points
        assert history.widths_after == now
        assert (history.widths, history.parameters, history.macs) == (first.widths, first.parameters, first.macs)
        assert history.monitor == "val_loss"
    assert first.widths == {"net.conv1": 4, "net.conv2": 6, "net.fc1": 8, "net.fc2": 3}
    last = read(trainer)
    assert points_of(last) == expected_points(callback)
    assert all(point.after is not None for point in last.points), "the metric at the next validation came later"
    assert last.points[-1].parameters == sum(p.numel() for p in trainer.lightning_module.parameters())
    assert {*shown_in(trainer.log_dir)["pruning/progress"]} >= {4, 8, 12}


@pytest.mark.filterwarnings("ignore:.*(nothing has|all cuts have) been", "ignore:.*1 round taken back")
def test_a_cut_that_was_taken_back_is_in_the_file(tmp_path):
    callback = guard()
    logger = TensorBoardLogger(tmp_path)
    trainer = fit(Scored(by_epoch(0.75, 0.25, 0.75)), [callback], logger=logger, max_epochs=4)
    found = read(trainer)
    assert points_of(found) == expected_points(callback)
    (point,) = found.points
    assert (point.epoch, point.removed, point.taken_back) == (1, 6, True)
    assert (point.before, point.after) == (0.75, 0.25)
    assert found.widths_after == found.widths == widths(trainer.lightning_module)


def test_without_a_monitor_or_a_cut_the_file_has_no_metric(tmp_path):
    trainer = fit(Plain(), [pruner("weight_l2")], logger=TensorBoardLogger(tmp_path), max_epochs=2)
    found = read(trainer)
    assert found.monitor is None
    assert [(p.before, p.cut, p.after) for p in found.points] == [(None, None, None)]


@pytest.mark.filterwarnings("ignore:.*no epoch follows", "ignore:.*nothing has been cut")
def test_a_trial_run_and_one_without_a_logger_write_no_file(tmp_path):
    fit(Plain(), [pruner("weight_l2")], max_epochs=2)
    fit(Plain(), [pruner("weight_l2")], logger=TensorBoardLogger(tmp_path), fast_dev_run=True)
    assert list(tmp_path.rglob("*")) == []


def test_a_logger_without_a_folder_gets_figures_alone(tmp_path):
    memory = ImageLogger()
    fit(Plain(), [pruner("weight_l2")], logger=memory, max_epochs=3)
    assert {key for key, *_ in memory.images} == {"pruning/progress"}
    assert files(tmp_path) == set()
