"""Beside callbacks of Lightning's and of this package, and under its other name."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_neurons import ActivationStatisticsCallback, NeuronPruningCallback, NeuronSensitivityCallback
from tests.callbacks.modules import MemoryLogger, OldNamespace, Plain, fit, loader
from tests.callbacks.pruned import (  # noqa: F401
    Probe,
    Tagged,
    assert_equal,
    assert_moved,
    assert_sound,
    pruner,
    remaining,
    tags,
    weights,
    widths,
)
from tests.callbacks.test_nothing_left import traces


def average_of(callback: Any) -> nn.Module:
    average = callback._average_model
    return average.module if isinstance(callback, EMAWeightAveraging) else average


def state(module: nn.Module) -> dict[str, Any]:
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


@pytest.mark.parametrize("first", [True, False], ids=["average first", "average last"])
@pytest.mark.parametrize("criterion", ["fisher", "weight_l2"])
def test_an_exponential_average_is_cut_like_the_model(criterion, first):
    callback, ema = pruner(criterion, schedule="linear", end_epoch=2), EMAWeightAveraging(decay=0.9)
    before = Probe("on_train_epoch_start", lambda *_: state(average_of(ema)))
    after = Probe("on_train_epoch_start", lambda *_: state(average_of(ema)))
    last = Probe("on_train_epoch_end", lambda *_: state(average_of(ema)))
    module = Plain()
    trainer = fit(module, [before, *([ema, callback] if first else [callback, ema]), after, last], max_epochs=4)
    assert_sound(trainer, module, callback)
    assert widths(average_of(ema)) == widths(module)
    assert_equal(module.state_dict(), last.seen[3])  # what training ends with is the average
    assert [made.epoch for made in callback.rounds.done] == [1, 2]
    gone = callback.rounds.done[0].plan
    assert_equal(after.seen[1], {n: remaining(n, t, gone) for n, t in before.seen[1].items()})
    in_all = {n: remaining(n, t, callback.plan) for n, t in before.seen[1].items()}
    assert {n: t.shape for n, t in after.seen[2].items()} == {n: t.shape for n, t in in_all.items()}
    assert not any(torch.equal(last.seen[3][n], after.seen[2][n]) for n, _ in module.named_parameters())


AVERAGES = {"EMA": EMAWeightAveraging, "SWA": lambda: StochasticWeightAveraging(1e-3, 3)}


@pytest.mark.parametrize("first", [True, False], ids=["average first", "average last"])
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES.keys())
def test_no_hook_stays_in_an_average(average, first):
    callback, other = pruner(), average()
    fit(Plain(), [other, callback] if first else [callback, other], max_epochs=2)
    assert traces(average_of(other))["hooks"] == {}


@pytest.mark.parametrize("start", [1, 2, 3])
def test_stochastic_averaging_goes_on_before_and_after_a_cut(start):
    callback, swa = pruner(start_epoch=2), StochasticWeightAveraging(1e-3, swa_epoch_start=start)
    before = Probe("on_train_epoch_start", lambda *_: state(average_of(swa)))
    after = Probe("on_train_epoch_start", lambda *_: state(average_of(swa)))
    module = Plain()
    trainer = fit(module, [before, callback, after, swa], max_epochs=5)
    assert_sound(trainer, module, callback)
    assert widths(average_of(swa)) == widths(module) != callback.plan.widths
    assert_equal(after.seen[2], {n: remaining(n, t, callback.plan) for n, t in before.seen[2].items()})
    assert_equal(dict(module.named_parameters()), dict(average_of(swa).named_parameters()))


class GetsWorse(Plain):
    """Its validation loss is what the test says, epoch by epoch."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = losses

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("score", self.losses[self.current_epoch])
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("mode, losses", [("min", [1.0, 5, 4, 3, 2, 1.5]), ("max", [5.0, 1, 2, 3, 4, 4.5])])
@pytest.mark.parametrize("reset, epochs", [(True, 6), (False, 4)])
def test_early_stopping_forgets_the_larger_model_only_if_told_to(reset, epochs, mode, losses):
    stopping = EarlyStopping("score", mode=mode, patience=3)
    callback, module = pruner(reset_early_stopping=reset), GetsWorse(losses)
    trainer = fit(module, [stopping, callback], max_epochs=6)
    assert trainer.current_epoch == epochs
    assert stopping.stopped_epoch == (0 if reset else 3)
    assert float(stopping.best_score) == (losses[-1] if reset else losses[0])
    assert_sound(trainer, module, callback)


def test_an_empty_round_does_not_reset_early_stopping():
    stopping = EarlyStopping("score", patience=3)
    callback = pruner("weight_l2", threshold=0.0, reset_early_stopping=True)
    nothing = pytest.warns(UserWarning, match="nothing has been cut")
    with nothing, pytest.warns(UserWarning, match="nothing is cut in round 1"):
        trainer = fit(GetsWorse([1.0, 5, 4, 3, 2, 1.5]), [stopping, callback], max_epochs=6)
    assert trainer.current_epoch == 4


def test_learning_rates_are_monitored_and_the_model_is_summarised(capsys):
    callback, logger, module = pruner(), MemoryLogger(), Plain()
    others = [LearningRateMonitor(), ModelSummary(max_depth=-1)]
    trainer = fit(module, [callback, *others], max_epochs=3, logger=logger, enable_model_summary=True)
    assert_sound(trainer, module, callback)
    assert {value for name, _, value in logger.rows if name == "lr-AdamW"} == {1e-2}
    assert "net.conv1" in capsys.readouterr().out


def test_the_learning_rate_finder_tries_the_whole_model():
    callback, module = pruner(), Plain()
    finder = LearningRateFinder(num_training_steps=5, attr_name="lr", update_attr=True)
    after = Probe("on_train_epoch_start", lambda _, module: weights(module))
    trainer = fit(module, [finder, callback, after], max_epochs=3)
    assert len(finder.optimal_lr.results["lr"]) >= 5
    assert_sound(trainer, module, callback)
    assert_moved(module, after.seen[1])


def test_a_second_callback_that_cuts_is_refused_as_each_would_hold_indices_of_a_model_that_the_other_changes():
    callbacks = [pruner("weight_l2", amount=0.2), pruner("taylor", amount=0.3, start_epoch=3)]
    assert callbacks[0].state_key != callbacks[1].state_key
    module = Plain()
    with pytest.raises(MisconfigurationException, match="can have one pruning callback; use one with several rounds"):
        fit(module, callbacks, max_epochs=5)
    assert widths(module) == widths(Plain())


@pytest.mark.parametrize("first", [True, False], ids=["pruning first", "pruning last"])
@pytest.mark.parametrize("observer", [NeuronSensitivityCallback, ActivationStatisticsCallback])
def test_observers_see_the_model_as_it_is_at_each_validation(observer, first):
    callback, other, module, logger = pruner("taylor"), observer(), Plain(), MemoryLogger()
    trainer = fit(module, [callback, other] if first else [other, callback], max_epochs=3, logger=logger)
    assert_sound(trainer, module, callback)
    assert {n: len(c.samples) for n, c in other.report.counts.items()} == widths(module)
    assert [entry.epoch for entry in other.history.entries] == [0, 1, 2]
    assert {name.split("/")[0] for name, _, _ in logger.rows} >= {"neurons", "pruning"}


def test_the_other_namespace_works_alike():
    callback, module, after = pruner(), OldNamespace(), Probe("on_train_epoch_start", lambda _, m: weights(m))
    trainer = fit(module, [callback, after], max_epochs=3, of=pytorch_lightning)
    assert_sound(trainer, module, callback)
    assert_moved(module, after.seen[1])


CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 3
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_neurons.NeuronPruningCallback
      init_args:
        criterion: taylor
        target_params: 0.5
        schedule: linear
        end_epoch: 2
        ignore: [net.conv1]
        monitor: val_loss
"""


def test_a_configuration_file_of_the_command_line_interface_makes_one(monkeypatch):
    Path("config.yaml").write_text(CONFIG)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "config.yaml"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of how Lightning uses the parser
        cli = LightningCLI(Plain, run=False, save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, NeuronPruningCallback)]
    assert callback.pruning.budget.rule == ("target_params", 0.5)
    assert (callback.pruning.schedule.shape, callback.pruning.schedule.rounds) == ("linear", 2)
    cli.trainer.fit(cli.model, loader(), loader(24, seed=1))
    assert_sound(cli.trainer, cli.model, callback)
    assert widths(cli.model)["net.conv1"] == 4
