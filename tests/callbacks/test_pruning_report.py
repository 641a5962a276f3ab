"""What pruning tells: series for loggers, the metric around a cut, the tables at the end, and the plan as a file."""

import copy
import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_neurons import PruningPlan
from lightning_neurons.report.logging.tags import TAGS, kind_of
from tests.callbacks.modules import MemoryLogger, Plain, SeveralLoaders, WithMetrics, dataset, fit, loader
from tests.callbacks.pruned import Probe, pruner, widths

ELSEWHERE = ("pruning/taken_back", "pruning/metric_predicted")
FAMILIES = [
    tag.name for tag in TAGS if tag.kind == "scalar" and tag.name.startswith("pruning/") and tag.name not in ELSEWHERE
]
VALIDATION = list(loader(24, seed=1))


def series(rows: list[Any]) -> dict[str, dict[int | None, float]]:
    """By name and step."""
    found: dict[str, dict[int | None, float]] = {}
    for name, step, value in rows:
        if name.startswith("pruning/"):
            found.setdefault(name, {})[step] = value
    return found


def sizes(module: nn.Module) -> dict[str, float]:
    """Counted by running the module, as if nobody had told its sizes."""
    twin, macs = copy.deepcopy(module).eval(), 0

    def count(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal macs
        places = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
        macs += places * layer.weight.numel()

    for layer in twin.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    twin(VALIDATION[0][0][:1])
    by_layer = {f"pruning/neurons/{n}": float(w) for n, w in widths(module).items()}
    return {"pruning/parameters": sum(p.numel() for p in module.parameters()), "pruning/macs": macs} | by_layer


def loss_by_hand(module: Any, batches: list[Any]) -> float:
    twin = copy.deepcopy(module).eval()
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(twin(x), y, reduction="sum")) for x, y in batches]
    return sum(losses) / sum(len(y) for _, y in batches)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Three rounds; the Trainer, the callback and the module right after each cut."""
    folder = tmp_path_factory.mktemp("run")
    loggers = [TensorBoardLogger(folder, name="tensorboard"), CSVLogger(folder, name="csv"), MemoryLogger()]
    callback = pruner("taylor", target_macs=0.4, schedule="linear", end_epoch=3, monitor="val_loss")
    after = Probe("on_train_epoch_start", lambda trainer, module: copy.deepcopy(module))
    torch.manual_seed(0)
    trainer = fit(Plain(), [callback, after], max_epochs=4, logger=loggers)
    return trainer, callback, after.seen


def test_every_logger_gets_every_series_with_the_same_values(run):
    trainer, _, _ = run
    memory = series(trainer.loggers[2].rows)
    assert {name: kind_of(name) for name in memory} == dict.fromkeys(memory, "scalar")
    for family in FAMILIES:
        assert any(re.fullmatch(family.replace("{layer}", ".+"), name) for name in memory), family
    accumulator = EventAccumulator(trainer.log_dir)
    accumulator.Reload()
    names = [name for name in accumulator.Tags()["scalars"] if name.startswith("pruning/")]
    board = {name: {event.step: event.value for event in accumulator.Scalars(name)} for name in names}
    assert board == {name: pytest.approx(values, rel=1e-6) for name, values in memory.items()}
    with (Path(trainer.loggers[1].log_dir) / "metrics.csv").open() as file:
        rows = [(n, int(r["step"]), float(v)) for r in csv.DictReader(file) for n, v in r.items() if v and n != "step"]
    assert series(rows) == {name: pytest.approx(values) for name, values in memory.items()}


def test_sizes_begin_with_the_whole_model_and_are_those_of_the_live_model_after_each_cut(run):
    trainer, callback, after = run
    found = series(trainer.loggers[2].rows)
    expected = {4 * epoch: sizes(module) for epoch, module in after.items()}
    assert expected[0] == sizes(Plain())
    for name in expected[0]:
        assert found[name] == {step: values[name] for step, values in expected.items()}
    assert found["pruning/removed"] == {made.step: len(made.plan) for made in callback.rounds.done}
    assert [(made.epoch, made.step) for made in callback.rounds.done] == [(1, 4), (2, 8), (3, 12)]
    lost = {n: before - expected[12][n] for n, before in expected[0].items() if n.startswith("pruning/neurons")}
    assert sum(lost.values()) == sum(found["pruning/removed"].values()) == len(callback.plan)


def test_the_metric_is_told_before_each_cut_right_after_it_and_at_the_next_validation(run):
    trainer, callback, after = run
    losses = {step: value for name, step, value in trainer.loggers[2].rows if name == "val_loss"}
    found = series(trainer.loggers[2].rows)
    for made in callback.rounds.done:
        assert made.before == losses[made.step - 1] == found["pruning/metric_before"][made.step]
        assert made.cut == pytest.approx(loss_by_hand(after[made.epoch], VALIDATION), rel=1e-5)
        assert made.cut == found["pruning/metric_cut"][made.step]
        assert made.after == losses[made.step + 3] == found["pruning/metric_after"][made.step + 3]
        assert len({made.before, made.cut, made.after}) == 3


def test_latencies_are_those_of_a_forward_before_and_after(run):
    trainer, callback, _ = run
    found = series(trainer.loggers[2].rows)["pruning/latency_ms"]
    assert all(made.latency_before > 0 for made in callback.rounds.done)
    assert found == {made.step: pytest.approx(1000 * made.latency) for made in callback.rounds.done}


@pytest.mark.parametrize("max_samples", [1, 10])
def test_the_metric_right_after_a_cut_is_that_of_the_first_samples_if_not_all_are_kept(max_samples):
    callback, after = pruner(monitor="val_loss", max_samples=max_samples), Probe("on_train_epoch_start", _copied)
    fit(Plain(), [callback, after], max_epochs=2)
    pictures, labels = dataset(24, seed=1).tensors
    kept = [(pictures[:max_samples], labels[:max_samples])]
    assert callback.rounds.done[0].cut == pytest.approx(loss_by_hand(after.seen[1], kept), rel=1e-5)


def _copied(trainer: Any, module: Any) -> Any:
    return copy.deepcopy(module)


@pytest.mark.parametrize("monitor", ["accuracy", "auroc"])
def test_a_metric_with_a_state_is_computed_over_all_kept_samples(monitor):
    callback, after = pruner(monitor=monitor, amount=0.6), Probe("on_train_epoch_start", _copied)
    fit(WithMetrics(), [callback, after], max_epochs=2)
    twin = after.seen[1].eval()
    metric = getattr(twin, monitor)
    metric.reset()
    with torch.no_grad():
        for pictures, labels in VALIDATION:
            metric.update(twin(pictures).softmax(-1), labels)
    assert callback.rounds.done[0].cut == pytest.approx(float(metric.compute()), rel=1e-5)


def test_only_the_first_of_several_dataloaders_is_kept():
    callback, after = pruner(monitor="val_loss/dataloader_idx_0"), Probe("on_train_epoch_start", _copied)
    fit(SeveralLoaders(), [callback, after], val=[loader(24, seed=1), loader(24, seed=2)], max_epochs=2)
    assert callback.rounds.done[0].cut == pytest.approx(loss_by_hand(after.seen[1], VALIDATION), rel=1e-5)


@pytest.mark.parametrize(
    "kwargs, first",
    [({"val_check_interval": 0.5, "max_epochs": 3}, 5), ({"check_val_every_n_epoch": 2, "max_epochs": 5}, 15)],
)
def test_the_metric_after_a_cut_is_that_of_the_first_validation_that_follows(kwargs, first):
    callback, logger = pruner(monitor="val_loss"), MemoryLogger()
    fit(Plain(), [callback], logger=logger, **kwargs)
    losses = {step: value for name, step, value in logger.rows if name == "val_loss"}
    assert callback.rounds.done[0].after == losses[first]


def test_without_a_validation_after_the_cut_nothing_is_told_of_it():
    callback, logger = pruner(monitor="val_loss"), MemoryLogger()
    fit(Plain(), [callback], logger=logger, max_epochs=3, check_val_every_n_epoch=2)
    assert callback.rounds.done[0].after is None
    assert "pruning/metric_after" not in series(logger.rows)


def test_without_loggers_and_in_a_trial_run_nothing_is_written(tmp_path):
    for kwargs in ({"logger": False}, {"fast_dev_run": True}, {"fast_dev_run": True, "logger": True}):
        fit(Plain(), [pruner(monitor="val_loss")], default_root_dir=tmp_path, max_epochs=2, **kwargs)
    assert list(tmp_path.rglob("*")) == []


def test_the_names_of_series_do_not_show_that_a_network_is_compiled():
    module, logger = Plain(), MemoryLogger()
    module.net = torch.compile(module.net, backend="eager")
    callback = pruner()
    fit(module, [callback], logger=logger, max_epochs=2)
    names = {name for name in series(logger.rows) if "neurons" in name}
    assert (
        names
        == {f"pruning/neurons/{layer}" for layer in widths(Plain())}
        == {f"pruning/neurons/{layer}" for layer in callback.plan.widths}
    )


def test_the_tables_at_the_end_show_every_round_and_every_width(capsys):
    callback = pruner("weight_l2", amount=0.5, schedule="linear", end_epoch=2, ignore=["net.conv1"])
    fit(Plain(), [callback], max_epochs=3)
    lines = [re.sub(r"[│┃]", " ", line).split() for line in capsys.readouterr().out.splitlines()]
    headings = next(line for line in lines if "removed" in line)
    assert headings[:4] == ["epoch", "removed", "params", "MACs"]
    for made in callback.rounds.done:
        cost = made.plan.cost
        row = next(line for line in lines if line[:1] == [str(made.epoch)])
        assert row[1:4] == [str(len(made.plan)), f"{cost.parameters_after / 365:.1%}", f"{cost.macs_after / 9144:.1%}"]
    for layer, width in callback.plan.widths.items():
        rows = [line for line in lines if line[:1] == [layer]]
        now = width - len(callback.plan.neurons.get(layer, ()))
        assert [row[1:] for row in rows if len(row) == 3] == ([] if now == width else [[str(width), str(now)]])
    assert any("net.conv1 is to be ignored" in " ".join(line) for line in lines)


def test_the_table_shows_the_metric_around_each_cut(capsys):
    callback = pruner(monitor="val_loss")
    fit(Plain(), [callback], max_epochs=3)
    made, text = callback.rounds.done[0], capsys.readouterr().out
    for value in (made.before, made.cut, made.after):
        assert f"{value:.4g}" in text
    assert all(word in text for word in ("before", "cut", "after", "val_loss"))


def test_the_plan_of_a_run_can_be_saved_and_read(run, tmp_path):
    _, callback, _ = run
    callback.plan.save(tmp_path / "plans" / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plans" / "plan.json")
    assert loaded == callback.plan
    assert loaded.cost.macs_after / loaded.cost.macs <= 0.4
