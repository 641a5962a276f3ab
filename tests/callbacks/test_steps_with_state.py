"""A step whose loss depends on what earlier batches have left: each batch is differentiated in the state it met."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_neurons import NeuronAblationCallback, NeuronSensitivityCallback
from tests.callbacks.modules import Plain, fit, loader


class Centred(Plain):
    """Logits from which a running mean of those of earlier batches is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))

    def on_validation_epoch_start(self) -> None:
        self.centre.zero_()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits - 5 * self.centre, batch[1])
        self.centre.mul_(0.5).add_(logits.detach().mean(0), alpha=0.5)
        return loss


class Carried(Centred):
    """A hidden state, in an attribute, that is carried over batches."""

    def on_validation_epoch_start(self) -> None:
        self.hidden = None

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        hidden = logits if self.hidden is None else logits + 3 * torch.tanh(self.hidden)
        self.hidden = hidden.detach()
        return F.cross_entropy(hidden, batch[1])


class Previous(Centred):
    """A distance to the batch before, if there was one of the same size: nothing that running one batch twice shows."""

    def on_validation_epoch_start(self) -> None:
        self.previous = None

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, before = self(batch[0]), self.previous
        self.previous = logits.detach()
        moved = 0.0 if before is None or before.shape != logits.shape else 5 * (logits - before).square().mean()
        return F.cross_entropy(logits, batch[1]) + moved


class SmoothedMean(Previous):
    """The same with a mean over the batch, which does not tell in which order its samples came."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, before = self(batch[0]), self.previous
        self.previous = logits.detach().mean(0)
        return F.cross_entropy(logits, batch[1]) + (0.0 if before is None else (logits - before).square().mean())


class WarmedUp(Centred):
    """Scaled by a mean of the losses before, from the third batch on."""

    def on_validation_epoch_start(self) -> None:
        self.losses: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        scale = 1.0 if len(self.losses) < 2 else sum(self.losses) / len(self.losses)
        self.losses.append(float(loss))
        return loss / scale


class Queued(Plain):
    """A ring of sixteen places, which only whole batches of eight fill without a gap."""

    def __init__(self) -> None:
        super().__init__()
        self.bank, self.place = torch.zeros(16, 3), 0

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.bank[self.place : self.place + len(logits)] = logits.detach()
        self.place = (self.place + len(logits)) % 16
        return F.cross_entropy(logits, batch[1])


def gradients_of_logits(module: Any) -> Tensor:
    """Mean squares, as shares, by autograd over validation as it runs."""
    module, logits, squares = copy.deepcopy(module).eval(), list[Tensor](), []
    module.log = lambda *_: None
    module.net.fc2.register_forward_hook(lambda _, __, output: logits.append(output))
    module.on_validation_epoch_start()
    for index, batch in enumerate(loader(24, seed=1)):
        loss = module.validation_step(batch, index)
        gradient = torch.autograd.grad(loss * len(batch[0]), logits[-1])[0]
        squares.append(gradient.double().square())
    mean = torch.cat(squares).mean(0)
    return mean / mean.sum()


@pytest.mark.parametrize("kind", [Centred, Carried, Previous, SmoothedMean, WarmedUp, Queued])
def test_each_batch_is_differentiated_in_the_state_that_it_met(kind):
    torch.manual_seed(0)
    callback = NeuronSensitivityCallback(criteria=["gradient"], max_figures=0)
    module = kind()
    fit(module, [callback], val=loader(24, seed=1), max_epochs=1)
    assert callback.report is not None
    scores = callback.report.scores["gradient"]["net.fc2"]
    torch.testing.assert_close(scores, gradients_of_logits(module), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [Previous, WarmedUp, Queued])
def test_it_is_said_that_training_data_meets_another_state(kind):
    callback = NeuronSensitivityCallback(criteria=["gradient"], max_figures=0, source="train")
    fit(kind(), [callback], max_epochs=1)
    assert callback.report is not None
    said = any("the loss of validation_step depends on the batches" in note for note in callback.report.notes)
    assert said == (kind is not Queued)


@pytest.mark.parametrize("kind", [Carried, Queued])
def test_ablation_runs_such_steps_and_says_in_which_state(kind):
    callback = NeuronAblationCallback(max_samples=24)
    fit(kind(), [callback], val=loader(24, seed=1), max_epochs=1)
    assert callback.ablation is not None
    assert any("in the state at the end" in note for note in callback.ablation.notes) == (kind is Carried)
