"""A validation step that exchanges weights or modules while it runs is measured with those that it has used."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import NeuronSensitivityCallback
from tests.callbacks.modules import Plain, fit, loader


def written(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def written_at_once(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    torch._foreach_copy_([parameter.data for parameter in parameters], values)


def given_other_memory(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.clone()


def loaded(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


EXCHANGES = [written, written_at_once, given_other_memory, loaded]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3))


class Averaged(Plain):
    """As models of diffusion do: an average stands in for the weights inside of a context manager."""

    def __init__(self, exchange: Callable[[list[nn.Parameter], list[Tensor]], None]) -> None:
        torch.manual_seed(0)
        super().__init__(network(), lr=0.05)
        self.exchange, self.shadow = exchange, [p.detach().clone() for p in self.net.parameters()]

    def on_train_batch_end(self, *_: Any) -> None:
        for average, parameter in zip(self.shadow, self.net.parameters(), strict=True):
            average.mul_(0.8).add_(parameter.detach(), alpha=0.2)

    @contextmanager
    def averages(self) -> Iterator[None]:
        parameters = list(self.net.parameters())
        kept = [parameter.detach().clone() for parameter in parameters]
        self.exchange(parameters, self.shadow)
        try:
            yield
        finally:
            self.exchange(parameters, kept)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.averages():
            return super().validation_step(batch, batch_idx)


def by_hand(net: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Mean and Fisher information of the hidden neurons, one sample at a time."""
    values, terms = [], []
    for xs, ys in loader(24, seed=1):
        for x, y in zip(xs, ys, strict=True):
            value = net[:3](x[None]).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net[3](value), y[None]), value)
            values.append(value.detach()[0])
            terms.append((value.detach() * gradient)[0])
    return torch.stack(values).mean(0), 0.5 * torch.stack(terms).square().mean(0)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_sensitivity_is_that_of_weights_that_stand_in_during_the_step(exchange):
    plain, module = Averaged(exchange), Averaged(exchange)
    data = {"train": loader(), "val": loader(24, seed=1), "max_epochs": 2}
    logged = fit(plain, **data).callback_metrics["val_loss"]
    callback = NeuronSensitivityCallback(criteria=["mean", "fisher"])
    trainer = fit(module, [callback], **data)
    assert torch.equal(trainer.callback_metrics["val_loss"], logged)
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), plain.parameters(), strict=True))
    used = network()
    with torch.no_grad():
        written(list(used.parameters()), module.shadow)
    found = callback.report.scores
    for name, expected in zip(("mean", "fisher"), by_hand(used), strict=True):
        torch.testing.assert_close(found[name]["net.1"], expected, rtol=1e-4, atol=1e-8, check_dtype=False)
    assert not torch.allclose(found["fisher"]["net.1"].float(), by_hand(module.net)[1], rtol=1e-2)


class Swapped(Plain):
    """Another network takes the place of the trained one, for one step, for an epoch, or for good."""

    def __init__(self, when: str) -> None:
        torch.manual_seed(0)
        super().__init__(network())
        self.other, self.when, self.put_aside = network(), when, []

    def _swap(self) -> None:
        self.put_aside = [self.net]
        self.net = self.other

    def _swap_back(self) -> None:
        self.net = self.put_aside.pop()

    def on_validation_epoch_start(self) -> None:
        if self.when == "epoch":
            self._swap()

    def on_validation_epoch_end(self) -> None:
        if self.when == "epoch":
            self._swap_back()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.when != "epoch":
            self._swap()
        loss = super().validation_step(batch, batch_idx)
        if self.when == "step":
            self._swap_back()
        return loss


@pytest.mark.parametrize("when", ["step", "epoch", "for good"])
def test_a_module_that_takes_the_place_of_another_is_measured_under_its_name(when):
    module, callback = Swapped(when), NeuronSensitivityCallback(criteria=["mean", "fisher"])
    fit(module, [callback], val=loader(24, seed=1))
    name = "net.1" if when == "for good" else "other.1"
    for criterion, expected in zip(("mean", "fisher"), by_hand(module.other), strict=True):
        found = callback.report.scores[criterion]
        assert name in found
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-8, check_dtype=False)
