"""Passes cost time: callbacks share them, and nobody runs one that is not needed."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from lightning_neurons import ActivationStatisticsCallback, NeuronSensitivityCallback, logit
from tests.callbacks.modules import Net, Plain, fit, loader, trainer_of


class Counting(Plain):
    """Counts its validation steps and the samples that its network sees; somebody else's list keeps the numbers."""

    def __init__(self) -> None:
        super().__init__(_CountingNet())
        self.net.calls = self.calls = _calls()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls.steps.append((len(batch[0]), torch.is_grad_enabled()))
        return super().validation_step(batch, batch_idx)


def _calls() -> Any:
    """What the isolated replay leaves alone: an object of the standard library."""
    return Mock(steps=[], forwards=[])


class _CountingNet(Net):
    def forward(self, x: Any) -> Any:
        self.calls.forwards.append(len(x))
        return super().forward(x)


def calls(*callbacks: Any, **kwargs: Any) -> Any:
    module = Counting()
    trainer_of(callbacks, **kwargs).validate(module, loader(40, batch_size=8), verbose=False)
    return module.calls


def replayed(of: Any) -> int:
    """Samples that were run with gradients."""
    return sum(samples for samples, gradients in of.steps if gradients)


def test_statistics_alone_add_no_forward():
    assert calls(ActivationStatisticsCallback()).forwards == calls().forwards == [8] * 5


def test_sensitivity_runs_each_picked_sample_once_more():
    found = calls(NeuronSensitivityCallback())
    assert replayed(found) == 40
    # And, once for each module, the first batch, thrice with another one in between, two parts of it, and its samples
    # again and again: whether samples may be run in other company.
    assert sum(samples for samples, gradients in found.steps if not gradients) == 40 + 6 * 8 + 32


def test_a_small_sample_is_run_in_one_piece():
    found = calls(NeuronSensitivityCallback(max_samples=10))
    assert [n for n, gradients in found.steps if gradients] == [10]


@pytest.mark.parametrize(
    "others",
    [
        [ActivationStatisticsCallback()],
        [NeuronSensitivityCallback(criteria=["fisher", "taylor"])],
        [NeuronSensitivityCallback(layers=["net.conv1"], per_class=True), ActivationStatisticsCallback()],
    ],
)
def test_callbacks_with_the_same_sample_share_one_replay(others):
    one, several = calls(NeuronSensitivityCallback()), calls(NeuronSensitivityCallback(), *others)
    assert several.steps == one.steps
    assert several.forwards == one.forwards


def test_callbacks_of_different_losses_each_get_their_own():
    callbacks = [NeuronSensitivityCallback(loss_fn=logit(0)), NeuronSensitivityCallback(loss_fn=logit(1))]
    found = calls(*callbacks)
    assert sum(found.forwards) == 40 + 2 * (40 + 6 * 8 + 32)
    first, second = (c.report.scores["gradient"]["net.fc2"].tolist() for c in callbacks)
    assert first == pytest.approx([1, 0, 0])
    assert second == pytest.approx([0, 1, 0])


def test_shared_reports_equal_those_of_callbacks_alone():
    def reports(*groups: list[Any]) -> list[Any]:
        for callbacks in groups:
            torch.manual_seed(0)
            trainer_of(callbacks).validate(Plain(), loader(40), verbose=False)
        return [callback.report for callbacks in groups for callback in callbacks]

    def make() -> list[Any]:
        return [
            NeuronSensitivityCallback(),
            NeuronSensitivityCallback(layers=["net.fc*"], criteria=["taylor", "rms"]),
            ActivationStatisticsCallback(threshold=0.2),
        ]

    for together, alone in zip(reports(make()), reports(*([c] for c in make())), strict=True):
        for name, by_layer in (*alone.scores.items(), *alone.deadness_by.items()):
            found = (together.scores | together.deadness_by)[name]
            assert found.keys() == by_layer.keys()
            assert all(torch.equal(found[layer], by_layer[layer]) for layer in by_layer), name


def test_one_failing_callback_does_not_take_the_others_with_it():
    broken = NeuronSensitivityCallback(loss_fn=lambda m, batch: m.loss(batch).detach(), criteria=["taylor"])
    works, rides = NeuronSensitivityCallback(), ActivationStatisticsCallback()
    nothing = pytest.warns(UserWarning, match="nothing has been measured")
    with nothing, pytest.warns(UserWarning, match="epoch 0 was not measured.*differentiable"):
        fit(Plain(), [broken, works, rides], num_sanity_val_steps=0)
    assert broken.report is None
    assert works.report.counts["net.conv1"].gradient_samples.tolist() == [24] * 4
    assert rides.report.counts["net.conv1"].samples.tolist() == [24] * 4
