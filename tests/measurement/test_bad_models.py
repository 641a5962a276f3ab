"""What cannot be measured is refused by name."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_neurons import ArgumentError, MeasurementError, measure, register_layer
from lightning_neurons.layers.registry import LAYER_FAMILIES
from tests.tables import for_each

NET = nn.Sequential(nn.Linear(3, 2))


@for_each("model", [None, nn.Linear, {"a": 1}])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(ArgumentError, match=r"model=.*expected a torch\.nn\.Module"):
        measure(model, [torch.zeros(2, 3)])


@for_each("batches", [None, 3, torch.zeros(2, 3), TensorDataset(torch.zeros(2, 3))])
def test_what_is_no_series_of_batches_is_refused(batches):
    with pytest.raises(ArgumentError, match=r"batches=.*a DataLoader, or \[batch\]"):
        measure(NET, batches)


def test_shifted_inputs_need_a_loss():
    with pytest.raises(ArgumentError, match=r"inputs='fgsm'.*no loss_fn"):
        measure(NET, [torch.zeros(2, 3)], inputs="fgsm", eps=0.1)


def test_a_registered_layer_that_says_a_wrong_width_is_named():
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat(1, 2)

    register_layer(Wide, neurons=lambda module: 5, axis=-1)
    try:
        with pytest.raises(MeasurementError, match=r"'0' gave 6 neurons.*it has 5.*register_layer"):
            measure(nn.Sequential(Wide()), [torch.zeros(2, 3)])
    finally:
        del LAYER_FAMILIES[Wide]


def test_a_type_that_is_known_is_not_registered_again():
    with pytest.raises(ArgumentError, match="a type of your own"):
        register_layer(nn.Linear, neurons=lambda module: 2, axis=-1)
    assert LAYER_FAMILIES[nn.Linear].neurons(NET[0]) == 2
