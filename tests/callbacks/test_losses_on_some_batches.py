"""Steps that have a loss on some batches, or on some dataloaders, only: those are measured, and the rest is named."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from lightning_neurons import NeuronSensitivityCallback, measure
from tests.callbacks.modules import Altered, Plain, fit, loader


def _odd_batches(module: Any, batch: Any, batch_idx: int) -> Tensor | None:
    loss = module.loss(batch)
    return loss if batch_idx % 2 else None


def _even_batches(module: Any, batch: Any, batch_idx: int) -> Tensor | None:
    loss = module.loss(batch)
    return None if batch_idx % 2 else loss


def _not_the_last(module: Any, batch: Any, batch_idx: int) -> Tensor | None:
    loss = module.loss(batch)
    return loss if len(batch[0]) == 8 else None


def _nothing_to_learn(module: Any, batch: Any, batch_idx: int) -> Tensor:
    loss = module.loss(batch)
    return loss if batch_idx else torch.zeros((), requires_grad=torch.is_grad_enabled())


def _fails(module: Any, batch: Any, batch_idx: int) -> Tensor:
    loss = module.loss(batch)
    if batch_idx == 1 and loss.requires_grad:
        raise ValueError("not with gradients")
    return loss * (1 + batch_idx) / (1 + batch_idx)


CASES = {
    _odd_batches: [1],
    _even_batches: [0, 2],
    _not_the_last: [0, 1],
    _nothing_to_learn: [1, 2],
}
SIZES = (8, 8, 4)


@pytest.mark.filterwarnings("ignore:.*sensitivity was not measured in the sanity check")
@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("step", CASES)
def test_batches_that_have_a_loss_are_measured_and_the_others_named(step, sanity):
    module, callback, data = Altered(step), NeuronSensitivityCallback(), loader(20, seed=1)
    fit(module, [callback], val=data, num_sanity_val_steps=sanity)
    batches = [batch for number, batch in enumerate(data) if number in CASES[step]]
    expected = measure(module, batches, loss_fn=Plain.loss)
    for name in ("gradient", "taylor", "fisher"):
        torch.testing.assert_close(callback.report.scores[name], expected.scores[name], rtol=1e-4, atol=1e-8)
    everything = measure(module, data)
    torch.testing.assert_close(callback.report.scores["rms"], everything.scores["rms"], rtol=1e-4, atol=1e-7)
    used = sum(SIZES[number] for number in CASES[step])
    counts = callback.report.counts["net.fc1"]
    assert (counts.samples.unique().tolist(), counts.gradient_samples.unique().tolist()) == ([20], [used])
    (note,) = [note for note in callback.report.notes if "leaves out" in note]
    assert f"leaves out {20 - used} samples whose batches have no loss" in note
    assert any(f"sensitivity on {used} of 20 samples" in note for note in callback.report.notes)


@pytest.mark.parametrize("measured", [0, 1])
def test_dataloaders_that_have_a_loss_are_measured(measured):
    class Several(Plain):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | None:
            loss = self.loss(batch)
            return loss if dataloader_idx == measured else None

    module, callback, data = Several(), NeuronSensitivityCallback(), [loader(72, seed=1), loader(80, seed=2)]
    fit(module, [callback], val=data, num_sanity_val_steps=0)
    expected = measure(module, data[measured], loss_fn=Plain.loss)
    torch.testing.assert_close(callback.report.scores["taylor"], expected.scores["taylor"], rtol=1e-4, atol=1e-8)
    assert any(f"leaves out {152 - (72, 80)[measured]} samples" in note for note in callback.report.notes)


def test_samples_are_picked_in_place_of_those_without_a_loss():
    module, callback = Altered(_odd_batches), NeuronSensitivityCallback(max_samples=16)
    fit(module, [callback], val=loader(64, seed=1), num_sanity_val_steps=0)
    assert callback.report.counts["net.fc1"].gradient_samples.unique().tolist() == [16]


def test_no_more_is_asked_of_a_module_without_any_loss_than_a_few_batches():
    ran = Mock(return_value=None)

    def step(module: Any, batch: Any, batch_idx: int) -> None:
        module.loss(batch)
        ran(torch.is_grad_enabled())

    module, callback = Altered(step), NeuronSensitivityCallback()
    with pytest.warns(UserWarning, match="sensitivity was not measured in epoch 0"):
        fit(module, [callback], val=loader(320, seed=1), num_sanity_val_steps=0)
    assert 0 < sum(call.args[0] for call in ran.call_args_list) <= 24
    assert "taylor" not in callback.report.scores


def test_a_step_that_fails_with_gradients_on_a_batch_costs_that_batch():
    module, callback, data = Altered(_fails), NeuronSensitivityCallback(loss_reduction="sum"), loader(20, seed=1)
    fit(module, [callback], val=data, num_sanity_val_steps=0)
    expected = measure(module, [b for i, b in enumerate(data) if i != 1], loss_fn=Plain.loss, loss_reduction="sum")
    torch.testing.assert_close(callback.report.scores["fisher"], expected.scores["fisher"], rtol=1e-4, atol=1e-10)
    assert any("8 samples" in note and "not with gradients" in note for note in callback.report.notes)
