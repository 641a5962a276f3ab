"""A validation step that cannot be run with gradients: said early, or at the cost of one epoch's measurement."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_neurons import ActivationStatisticsCallback, NeuronSensitivityCallback, measure
from tests.callbacks.modules import Altered, Plain, fit, loader

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


@pytest.mark.parametrize("step", BROKEN)
def test_a_step_without_a_differentiable_loss_is_found_in_the_sanity_check(step):
    with pytest.raises(MisconfigurationException, match=r"validation_step.*loss_fn="):
        fit(Altered(step), [NeuronSensitivityCallback()])


@pytest.mark.parametrize("step", BROKEN)
def test_without_a_sanity_check_training_goes_on_and_the_warning_says_why(step):
    callback = NeuronSensitivityCallback()
    nothing = pytest.warns(UserWarning, match="nothing has been measured")
    with nothing, pytest.warns(UserWarning, match=r"epoch 0 was not measured.*validation_step.*loss_fn="):
        trainer = fit(Altered(step), [callback], num_sanity_val_steps=0)
    assert trainer.global_step == 4


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
    with pytest.warns(UserWarning, match=r"epoch 1 was not measured.*differentiable"):
        trainer = fit(Altered(step), [callback], max_epochs=3)
    assert [entry.epoch for entry in callback.history.entries] == [0, 2]
    assert callback.report.epoch == 2
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
