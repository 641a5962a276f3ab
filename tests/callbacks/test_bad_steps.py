"""A validation step that cannot be run with gradients: said early, or at the cost of one epoch's measurement."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_neurons import ActivationStatisticsCallback, NeuronSensitivityCallback, measure
from lightning_neurons.criteria import GRADIENT_CRITERIA
from tests.callbacks.modules import Altered, Manual, Plain, fit, loader

OBSERVERS = [ActivationStatisticsCallback, NeuronSensitivityCallback]


def _no_loss(module: Any, batch: Any, batch_idx: int) -> None:
    module.log("val_acc", (module(batch[0]).argmax(1) == batch[1]).float().mean())


def _detached(module: Any, batch: Any, batch_idx: int) -> Tensor:
    return module.loss(batch).detach()


def _numpy(module: Any, batch: Any, batch_idx: int) -> Tensor:
    logits = module(batch[0])
    module.log("largest", float(logits.numpy().max()))
    return nn.functional.cross_entropy(logits, batch[1])


def _under_no_grad(module: Any, batch: Any, batch_idx: int) -> Tensor:
    with torch.no_grad():
        return module.loss(batch)


BROKEN = [_no_loss, _detached, _numpy, _under_no_grad]


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("step", BROKEN)
def test_a_step_without_a_differentiable_loss_is_told_once_and_the_rest_is_measured(step, sanity):
    module, callback, val = Altered(step), NeuronSensitivityCallback(), loader(24, seed=1)
    with pytest.warns(UserWarning, match="not measured") as told:
        trainer = fit(module, [callback], val=val, num_sanity_val_steps=sanity, max_epochs=2)
    (said,) = [str(one.message) for one in told if "sensitivity was not measured" in str(one.message)]
    assert all(
        word in said
        for word in ("sanity check" if sanity else "epoch 0", "validation_step", "loss_fn=", 'step="training"')
    )
    assert trainer.current_epoch == 2
    assert "sensitivity was not measured" in callback.report.notes[0]
    assert not {*callback.report.scores} & {*GRADIENT_CRITERIA}
    expected = measure(module, val)
    for name in ("mean", "rms"):
        torch.testing.assert_close(callback.report.scores[name], expected.scores[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(callback.report.deadness, expected.deadness)


@pytest.mark.parametrize("step", BROKEN)
def test_a_loss_fn_that_cannot_be_differentiated_is_found_in_the_sanity_check(step):
    with pytest.raises(MisconfigurationException, match=r"differentiable|run with gradients|expected a tensor"):
        fit(Plain(), [NeuronSensitivityCallback(loss_fn=lambda module, batch: step(module, batch, 0))])


@pytest.mark.parametrize("source", ["val", "train"])
@pytest.mark.parametrize("step", BROKEN)
def test_the_loss_of_the_training_step_helps(step, source):
    data, logged = loader(24, seed=1), []
    callbacks = [
        NeuronSensitivityCallback(step="training", source=source),
        NeuronSensitivityCallback(loss_fn=lambda module, batch: module.training_step(batch, 0), source=source),
    ]
    for observed in ([], callbacks):
        torch.manual_seed(0)
        module = Altered(step)
        logged.append(fit(module, observed, train=data, val=data, limit_train_batches=3).callback_metrics)
    assert logged[0].keys() == logged[1].keys()
    assert all(torch.equal(logged[0][name], logged[1][name]) for name in logged[0])
    expected = measure(module, data, loss_fn=Plain.loss).scores["taylor"]
    for callback in callbacks if source == "val" else []:
        torch.testing.assert_close(callback.report.scores["taylor"], expected, rtol=1e-4, atol=1e-7)
    for callback in callbacks:
        assert callback.report.counts["net.fc1"].gradient_samples.tolist() == [24] * 8


def test_a_training_step_that_steps_its_optimizer_is_never_run_again():
    with pytest.raises(MisconfigurationException, match=r"automatic_optimization=False.*loss_fn="):
        fit(Manual(), [NeuronSensitivityCallback(step="training")])

    class Schedules(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.optimizers()
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match=r"sensitivity was not measured.*optimizers or learning rate schedulers"):
        fit(Schedules(), [NeuronSensitivityCallback(step="training")])


@pytest.mark.parametrize("step", BROKEN)
def test_loss_fn_helps_where_the_step_has_no_differentiable_loss(step):
    module, callback, val = Altered(step), NeuronSensitivityCallback(loss_fn=Plain.loss), loader(24, seed=1)
    fit(module, [callback], val=val)
    expected = measure(module, val, loss_fn=Plain.loss).scores["gradient"]["net.conv1"]
    assert torch.allclose(callback.report.scores["gradient"]["net.conv1"], expected, atol=1e-6)


def test_a_step_that_breaks_in_the_middle_of_training_costs_that_epoch_only():
    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        return module.loss(batch).detach() if module.current_epoch == 1 else module.loss(batch)

    callback = NeuronSensitivityCallback()
    with pytest.warns(UserWarning, match=r"sensitivity was not measured in epoch 1.*differentiable"):
        trainer = fit(Altered(step), [callback], max_epochs=3)
    assert [entry.epoch for entry in callback.history.entries] == [0, 1, 2]
    assert callback.report.epoch == 2
    assert "taylor" in callback.report.scores
    assert trainer.current_epoch == 3


def test_a_step_that_raises_by_itself_is_heard_unchanged():
    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        raise KeyError("mine")

    for observer in OBSERVERS:
        with pytest.raises(KeyError, match="mine"):
            fit(Altered(step), [observer()])


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_validation_step_that_would_warn_with_gradients_stays_silent(observer):
    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        loss = module.loss(batch)
        module.history_of_losses = float(loss)
        return loss

    callback = observer()
    torch.set_warn_always(True)  # otherwise torch says it once in a process
    try:
        fit(Altered(step), [callback])
    finally:
        torch.set_warn_always(False)
    assert callback.report is not None
