"""Groups of arguments as one value each: the same callback as with single arguments, also from configuration files."""

import sys
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_neurons import ArgumentError, Distillation, Guard, NeuronPruningCallback, PruningBudget, PruningSchedule
from tests.callbacks.modules import Plain, fit, loader
from tests.callbacks.pruned import assert_sound
from tests.callbacks.refusals import not_refused
from tests.tables import for_each

BUDGET = PruningBudget("taylor", target_params=0.5, scope="global", ignore=["net.conv1"])
SCHEDULE = PruningSchedule("linear", start_epoch=2, end_epoch=6, every_n_epochs=2)
GUARD = Guard("val_acc", tolerance=0.25, relative=True, on_violation="halve")
DISTILLATION = Distillation("net", temperature=4, weight=0.5, class_axis=-1)

SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"budget": BUDGET}, {
        "criterion": "taylor", "target_params": 0.5, "scope": "global", "ignore": ["net.conv1"],
    }),
    ({"amount": 0.3, "schedule": SCHEDULE}, {
        "amount": 0.3, "schedule": "linear", "start_epoch": 2, "end_epoch": 6, "every_n_epochs": 2,
    }),
    ({"amount": 0.3, "guard": GUARD, "recovery_epochs": 2}, {
        "amount": 0.3, "monitor": "val_acc", "max_drop": 0.25, "relative_drop": True, "on_violation": "halve",
        "recovery_epochs": 2,
    }),
    ({"amount": 0.3, "guard": Guard("val_loss", 1)}, {"amount": 0.3, "monitor": "val_loss", "max_drop": 1}),
    ({"amount": 0.3, "distillation": DISTILLATION}, {
        "amount": 0.3, "recovery": "distill", "output": "net", "temperature": 4.0, "distillation_weight": 0.5,
        "class_axis": -1,
    }),
]  # fmt: skip


@for_each("grouped, single", SAME)
def test_a_value_is_the_same_as_the_single_arguments_that_it_stands_for(grouped, single):
    one, other = NeuronPruningCallback(**grouped), NeuronPruningCallback(**single)
    assert one.pruning == other.pruning
    assert one.state_key == other.state_key


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"budget": BUDGET, "amount": 0.5}, "amount=0.5.*None beside budget=, which has it"),
    ({"budget": BUDGET, "criterion": "fisher"}, "criterion='fisher'.*None beside budget="),
    ({"budget": BUDGET, "ignore": ["net.fc1"]}, "ignore=.*beside budget="),
    ({"budget": BUDGET, "lossless": True}, "budget=.*None with lossless=True"),
    ({"budget": 0.5}, "budget=0.5.*a PruningBudget, such as"),
    ({"amount": 0.5, "schedule": SCHEDULE, "end_epoch": 4}, "end_epoch=4.*None beside schedule="),
    ({"amount": 0.5, "schedule": PruningSchedule("one_shot", end_epoch=4)}, "end_epoch=4.*which has one round"),
    ({"amount": 0.5, "guard": GUARD, "monitor": "val_acc"}, "monitor='val_acc'.*None beside guard="),
    ({"amount": 0.5, "guard": GUARD, "max_drop": 0.1}, "max_drop=0.1.*None beside guard="),
    ({"amount": 0.5, "guard": "val_acc"}, r"guard='val_acc'.*a Guard, such as Guard\("),
    ({"threshold": 0.5, "guard": GUARD}, "on_violation='halve'.*there is no half step"),
    ({"amount": 0.5, "distillation": DISTILLATION, "recovery": "distill"}, "recovery='distill'.*beside distillation="),
    ({"amount": 0.5, "distillation": DISTILLATION, "temperature": 3.0}, "temperature=3.0.*2.0 beside distillation="),
    ({"amount": 0.5, "distillation": True}, "distillation=True.*a Distillation, such as"),
]


def test_a_value_and_single_arguments_together_are_refused():
    assert not_refused(NeuronPruningCallback, WRONG) == {}


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (Guard, {"metric": "", "tolerance": 0.1}, "metric=''.*the name of a logged metric"),
    (Guard, {"metric": "val_acc", "tolerance": -1}, "tolerance=-1.*a number of at least 0"),
    (Guard, {"metric": "val_acc", "tolerance": 2, "relative": True}, "tolerance=2.*a share"),
    (Guard, {"metric": "val_acc", "tolerance": 0, "mode": "maxx"}, "did you mean 'max'"),
    (Guard, {"metric": "val_acc", "tolerance": 0, "relative": "no"}, "relative='no'.*True or False"),
    (Guard, {"metric": "val_acc", "tolerance": 0, "on_violation": "half"}, "did you mean 'halve'"),
    (Distillation, {"weight": -1.0}, "weight=-1.0.*a number of at least 0"),
    (Distillation, {"temperature": 0}, "temperature=0.*a number above 0"),
    (Distillation, {"class_axis": 0}, "class_axis=0.*an axis"),
    (Distillation, {"teacher": "nowhere.ckpt"}, "teacher='nowhere.ckpt'.*no such file"),
]


@for_each("kind, arguments, message", BAD)
def test_a_value_is_checked_when_it_is_made_under_its_own_names(kind, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        kind(**arguments)


GROUPED = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    class_path: lightning_neurons.NeuronPruningCallback
    init_args:
      budget: {criterion: taylor, target_params: 0.5, ignore: [net.conv1]}
      schedule: {shape: linear, end_epoch: 2}
      guard: {metric: val_loss, tolerance: 9.0}
      distillation: {temperature: 3.0}
"""
SINGLE = (
    GROUPED[: GROUPED.index("      budget")]
    + """
      criterion: taylor
      target_params: 0.5
      ignore: [net.conv1]
      schedule: linear
      end_epoch: 2
      monitor: val_loss
      max_drop: 9.0
      recovery: distill
      temperature: 3.0
"""
)


def made_by_the_command_line(config: str, *arguments: str) -> Any:
    Path("config.yaml").write_text(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of how Lightning uses the parser
        with patch.object(sys, "argv", ["train.py", "--config", "config.yaml", *arguments]):
            return LightningCLI(Plain, run=False, save_config_callback=None)


def pruner_in(cli: Any) -> NeuronPruningCallback:
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, NeuronPruningCallback)]
    return callback


@pytest.mark.parametrize("config", [GROUPED, SINGLE], ids=["grouped", "single"])
def test_a_configuration_file_with_either_makes_the_same_and_survives_being_printed(config):
    expected = NeuronPruningCallback(
        budget=PruningBudget("taylor", target_params=0.5, ignore=["net.conv1"]),
        schedule=PruningSchedule("linear", end_epoch=2),
        guard=Guard("val_loss", 9.0),
        distillation=Distillation(temperature=3.0),
    )
    cli = made_by_the_command_line(config)
    assert pruner_in(cli).pruning == expected.pruning
    with pytest.raises(SystemExit), redirect_stdout(StringIO()) as printed:
        made_by_the_command_line(config, "--print_config")
    again = made_by_the_command_line(printed.getvalue())
    assert pruner_in(again).pruning == expected.pruning
    again.trainer.fit(again.model, loader(), loader(24, seed=1))
    assert_sound(again.trainer, again.model, pruner_in(again))
    assert [made.epoch for made in pruner_in(again).rounds.done] == [1, 2]


def test_the_report_is_all_cuts_as_one():
    torch.manual_seed(0)
    module = Plain()
    callback = NeuronPruningCallback("weight_l2", amount=0.5, schedule=PruningSchedule("linear", end_epoch=2))
    assert callback.report is None
    fit(module, [callback], max_epochs=3)
    report, layers = callback.report, {n: m for n, m in module.named_modules() if n in callback.report.widths}
    assert report.plan.neurons == callback.plan.neurons
    assert report.widths == {n: getattr(m, "out_channels", getattr(m, "out_features", 0)) for n, m in layers.items()}
    assert report.cost.parameters_after == sum(p.numel() for p in module.parameters()) < report.cost.parameters
