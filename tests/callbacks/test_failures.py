"""Whatever fails while a report is made, after training has begun, costs that epoch's measurement and nothing else."""

import importlib
from contextlib import nullcontext
from functools import cache
from itertools import cycle
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from lightning_neurons import ActivationStatisticsCallback, Criterion, NeuronSensitivityCallback, Statistic
from lightning_neurons.callbacks.observing.session import _SESSIONS
from lightning_neurons.results.history import NeuronHistory
from tests.callbacks.modules import MemoryLogger, Plain, fit, loader

MEASURING = [
    "callbacks.observing.observer:Measurement",
    "callbacks.observing.observer:StepReplay",
    "callbacks.observing.observer:stream_length",
    "callbacks.trainer.steps:evaluation_loop",
    "callbacks.observing.session:Passes",
    "callbacks.observing.session:Session.join",
    "callbacks.observing.session:Session.open",
    "callbacks.observing.session:Session._open",
    "callbacks.observing.session:Session._close",
    "callbacks.observing.session:Session.close",
    "callbacks.observing.session:Session.finish",
    "callbacks.observing.session:Session._groups",
    "callbacks.observing.member:Member.start_batch",
    "measurement.passes:Passes.observe",
    "measurement.passes:Passes.differentiate",
    "measurement.passes:WatchActivations",
    "measurement.measurement:Measurement.receive",
    "measurement.measurement:Measurement.merge_processes",
    "measurement.measurement:Measurement.report",
    "metrics.streaming:StreamingCriteria.scores",
]
TELLING = [
    "results.history:NeuronHistory.compare",
    "results.history:NeuronHistory.keep",
    "callbacks.observing.observer:scalars",
    "callbacks.observing.observer:offer",
    "callbacks.observing.publish:write_loggers",
    "callbacks.trainer.outlet:folder_of",
    "callbacks.observing.publish:numbered_observer",
]


def small() -> Plain:
    torch.manual_seed(0)
    return Plain(nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3)))


def break_in_epoch_1(place: str, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> type[Plain]:
    """Let a function of ours fail in one epoch; returns modules that tell when that is."""
    where, name = place.split(":")
    owner = importlib.import_module(f"lightning_neurons.{where}")
    *outer, last = name.split(".")
    for one in outer:
        owner = getattr(owner, one)
    original, epochs = getattr(owner, last), [-1]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if epochs[-1] == 1:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, last, failing)

    class Telling(Plain):
        def on_train_epoch_start(self) -> None:
            epochs.append(self.current_epoch)

    return Telling


@cache
def small_alone() -> Any:
    return fit(small(), max_epochs=3, train=loader(16), val=loader(8))


@pytest.mark.parametrize("place", MEASURING + TELLING)
def test_training_goes_on_and_the_next_epoch_is_measured(place, monkeypatch):
    module, plain = small(), small_alone()
    module.__class__ = break_in_epoch_1(place, monkeypatch, MemoryError("no room"))
    callback = NeuronSensitivityCallback(max_figures=0)
    with pytest.warns(UserWarning, match="MemoryError.*no room") as said:
        trainer = fit(module, [callback], max_epochs=3, train=loader(16), val=loader(8), logger=MemoryLogger())
    assert len([w for w in said if "no room" in str(w.message)]) <= 2
    assert trainer.current_epoch == 3
    assert callback.report.epoch == 2
    assert [e.epoch for e in callback.history.entries][-1] == 2
    assert trainer not in _SESSIONS or not _SESSIONS[trainer], "nothing is going on any more"
    for mine, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


WATCHING = [
    "measurement.passes:Passes._activation",
    "measurement.passes:_tell",
    "hooks.capture:operands",
    "hooks.capture:is_plain",
    "hooks.capture:WatchActivations._arrive",
    "hooks.capture:FollowLayers._went",
    "hooks.trace:tensors_in",
    "hooks.trace:operands",
    "hooks.trace:target_of_write",
    "hooks.trace:Trace._ends",
    "hooks.layer_flow:Flow.leaves",
    "hooks.function_mode:may_be_fast",
    "hooks.function_mode:isolated",
    "callbacks.trainer.validated_weights:_copies",
]
FOLLOWING = ["hooks.trace:Trace._see", "hooks.value_graph:ValueGraph.add"]
"""These end the chains of layers, and the layers are measured where they are."""


class Encoded(Plain):
    """Has a module with a fast path, and weights that somebody may exchange around each batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
        super().__init__(
            nn.Sequential(nn.Flatten(1, 2), encoder, nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3))
        )

    def on_validation_batch_start(self, *_: Any) -> None:
        """Nothing, but nobody can know."""


@cache
def encoded_alone() -> Any:
    return fit(Encoded(), max_epochs=2, train=loader(16), val=loader(8))


@pytest.mark.parametrize("place", [*WATCHING, *FOLLOWING])
@pytest.mark.filterwarnings("ignore:.*nothing has been measured.*")
def test_a_fault_in_watching_is_not_noticed_by_the_step_that_is_watched(place, monkeypatch):
    where, name = place.split(":")
    owner = importlib.import_module(f"lightning_neurons.{where}")
    *outer, last = name.split(".")
    owner = getattr(owner, outer[0]) if outer else owner
    plain, broken = encoded_alone(), Mock(side_effect=LookupError("a fault of ours"))
    monkeypatch.setattr(owner, last, broken)
    callback = NeuronSensitivityCallback(max_figures=0)
    with nullcontext() if place in FOLLOWING else pytest.warns(UserWarning, match="measured"):
        trainer = fit(Encoded(), [callback], max_epochs=2, train=loader(16), val=loader(8))
    assert broken.called
    assert (callback.report is not None) or place not in FOLLOWING
    assert torch.equal(trainer.callback_metrics["val_loss"], plain.callback_metrics["val_loss"])
    for mine, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_error_of_the_step_that_is_watched_is_the_users(monkeypatch):
    class Fails(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            with pytest.raises(RuntimeError, match="shape"):
                torch.relu(self.net[1](batch[0].flatten(1))).reshape(-1, 7)
            return super().validation_step(batch, batch_idx)

    module, callback = small(), NeuronSensitivityCallback(max_figures=0)
    module.__class__ = Fails
    fit(module, [callback])
    assert callback.report.counts["net.1"].samples.min() > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_wants_to_stop_is_not_held_up(monkeypatch, error):
    module = small()
    module.__class__ = break_in_epoch_1("measurement.measurement:Measurement.report", monkeypatch, error())
    with pytest.raises(SystemExit):
        fit(module, [NeuronSensitivityCallback(max_figures=0)], max_epochs=3)


LARGEST = Statistic("largest", lambda view: view.activation.amax(-1))
BAD_SCORES = {
    "raises": lambda summary: 1 / 0,
    "is no tensor": lambda summary: "many",
    "has another shape": lambda summary: torch.ones(3, 7),
    "is NaN": lambda summary: summary.per_sample(LARGEST) * float("nan"),
}


OBSERVERS = [NeuronSensitivityCallback, ActivationStatisticsCallback]


@pytest.mark.parametrize("name, observer", list(zip(BAD_SCORES, cycle(OBSERVERS))))
@pytest.mark.filterwarnings("ignore:.*was not measured.*", "ignore:.*nothing has been measured.*")
def test_a_criterion_that_goes_wrong_does_not_end_training(name, observer):
    callback = observer(criteria=[Criterion("mine", (LARGEST,), BAD_SCORES[name]), "rms"], max_figures=0)
    trainer = fit(small(), [callback], max_epochs=2, num_sanity_val_steps=0, logger=MemoryLogger())
    assert trainer.current_epoch == 2


def test_a_failed_measurement_after_a_good_one_leaves_the_good_one(monkeypatch):
    module = small()
    module.__class__ = break_in_epoch_1("measurement.measurement:Measurement.report", monkeypatch, ValueError("mine"))
    callback = NeuronSensitivityCallback(max_figures=0)
    with pytest.warns(UserWarning, match="epoch 1 was not measured: ValueError: mine"):
        fit(module, [callback], max_epochs=2)
    assert callback.report.epoch == 0


def test_one_logger_that_fails_costs_the_others_nothing():
    class Full(MemoryLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(name.startswith("neurons/") for name in metrics):
                raise OSError("disk full")

    good = MemoryLogger()
    with pytest.warns(UserWarning, match="the report was not written everywhere: .*OSError: disk full"):
        fit(small(), [NeuronSensitivityCallback(max_figures=0)], logger=[Full(), good])
    assert "neurons/dead_share" in {name for name, *_ in good.rows}


def test_a_history_of_another_version_begins_anew():
    for broken in ({}, {"history": None}, {"history": {"entries": [{"epoch": 1, "new": 2}]}}):
        callback = NeuronSensitivityCallback()
        with pytest.warns(UserWarning, match="the history of the checkpoint cannot be read and begins anew"):
            callback.load_state_dict(broken)
        assert len(callback.history) == 0


def test_a_history_that_cannot_be_written_does_not_keep_a_checkpoint_from_being_written(monkeypatch):
    def full(history: Any) -> Any:
        if len(history):
            raise MemoryError("no room")
        return {"entries": [], "scores": {}}

    callback = NeuronSensitivityCallback(max_figures=0)
    fit(small(), [callback])
    monkeypatch.setattr(NeuronHistory, "state_dict", full)
    with pytest.warns(UserWarning, match="the history is not in the checkpoint: MemoryError: no room"):
        assert callback.state_dict()["history"] == {"entries": [], "scores": {}}
