"""What ``register_prunable`` refuses at once, and what it refuses when it sees a module."""

import re

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import (
    ArgumentError,
    UnknownNameError,
    conform,
    measure,
    prune,
    register_layer,
    register_prunable,
)
from lightning_neurons.layers.registry import LAYER_FAMILIES
from lightning_neurons.layers.width_handlers import HANDLERS, handler_of
from tests.tables import for_each


class Turned(nn.Module):
    """Linear, with its weight the other way round, and doubled."""

    def __init__(self, inputs: int = 4, units: int = 6) -> None:
        super().__init__()
        self.inputs, self.units = inputs, units
        self.weight, self.bias = nn.Parameter(torch.rand(inputs, units)), nn.Parameter(torch.rand(units))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (x @ self.weight) + self.bias


RIGHT = {"axis": -1, "makes": {"weight": 1, "bias": 0}, "reads": {"weight": 0}, "sizes": {"units": "makes"}}


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    """Types that a test registers are unknown to others."""
    monkeypatch.setattr("lightning_neurons.layers.prunable.HANDLERS", handlers := dict(HANDLERS))
    monkeypatch.setattr("lightning_neurons.layers.width_handlers.HANDLERS", handlers)
    for name in ("layer", "registry"):
        monkeypatch.setattr(f"lightning_neurons.layers.{name}.LAYER_FAMILIES", LAYER_FAMILIES.copy())


REFUSED_AT_ONCE = [
    ({"module_type": 3}, "module_type=3 is not allowed: expected a subclass of torch.nn.Module"),
    ({"module_type": nn.Linear}, "module_type='Linear' is not allowed: expected a type of your own"),
    ({"axis": 0}, "axis=0 is not allowed: expected 1 for channels or -1 for features; axis 0 is the batch"),
    ({"axis": True}, "axis=True is not allowed"),
    ({"axis": "features"}, "axis='features' is not allowed"),
    ({"makes": {}}, "makes={} is not allowed: expected axes by the names of tensors, such as makes={'weight': 0}"),
    ({"makes": ["weight"]}, "makes=['weight'] is not allowed: expected axes by the names of tensors"),
    ({"reads": {"weight": 1.0}}, "reads={'weight': 1.0} is not allowed: expected axes by the names of tensors"),
    ({"reads": {"weight": False}}, "reads={'weight': False} is not allowed"),
    ({"passes": {"bias": 0}}, "passes={'bias': 0} is not allowed: expected makes, reads or both of them, or else"),
    ({"makes": None, "reads": None}, "passes=None is not allowed: expected makes, reads or both of them, or else"),
    ({"sizes": {"units": "make"}}, "sizes['units']='make' is not allowed: expected one of 'makes', 'reads'; did you"),
    ({"sizes": {"units": "passes"}}, "sizes['units']='passes' is not allowed: expected one of 'makes', 'reads'"),
    ({"sizes": ["units"]}, "sizes=['units'] is not allowed: expected what each attribute says, by its name"),
]


@for_each("wrong, message", REFUSED_AT_ONCE)
def test_what_no_module_could_make_right_is_refused_at_once(wrong, message):
    arguments = {"module_type": Turned, **RIGHT, **wrong}
    with pytest.raises(ArgumentError, match="^" + re.escape(message)):
        register_prunable(arguments.pop("module_type"), **arguments)
    assert handler_of(Turned()) is None


REFUSED_BY_MODULE = [
    ({"makes": {"weigth": 1}}, UnknownNameError, "makes of Turned, as register_prunable was told: nothing matches "
     "'weigth'. Did you mean 'weight'? Known: weight, bias."),
    ({"reads": {"kernel": 0}}, UnknownNameError, "reads of Turned, as register_prunable was told: nothing matches"),
    ({"makes": {"weight": 2}}, ArgumentError, "makes={'weight': 2} is not allowed: expected axes of one length, one "
     "for each neuron; Turned has weight (4, 6) and 6 neurons."),
    ({"makes": {"weight": 0, "bias": 0}}, ArgumentError, "makes={'weight': 0, 'bias': 0} is not allowed: expected axes "
     "of one length, one for each neuron; Turned has weight (4, 6), bias (6,) and 6 neurons."),
    ({"makes": {"weight": 0}}, ArgumentError, "makes={'weight': 0} is not allowed"),
    ({"reads": {"weight": -3}}, ArgumentError, "reads={'weight': -3} is not allowed: expected axes of one length"),
    ({"sizes": {"unit": "makes"}}, UnknownNameError, "sizes of Turned, as register_prunable was told: nothing matches "
     "'unit'. Did you mean 'units', 'inputs'? Known: inputs, units."),
    ({"sizes": {"units": "reads"}}, ArgumentError, "sizes['units']='reads' is not allowed: expected what "
     "Turned.units=6 counts; this is 4."),
]  # fmt: skip


@for_each("wrong, error, message", REFUSED_BY_MODULE)
def test_what_is_not_true_of_a_module_is_refused_when_it_is_measured_pruned_or_loaded(wrong, error, message):
    register_layer(Turned, neurons=lambda module: module.units, axis=-1)
    register_prunable(Turned, **{**RIGHT, **wrong})
    net = nn.Sequential(Turned(), nn.ReLU(), nn.Linear(6, 2))
    for use in (
        lambda: measure(net, [torch.rand(2, 4)], criteria=["weight_l2"]),
        lambda: prune(net, torch.rand(2, 4), {"0": [1]}),
        lambda: conform(net, net.state_dict()),
    ):
        with pytest.raises(error, match="^" + re.escape(message)):
            use()
    assert (net[0].units, net[0].weight.shape) == (6, (4, 6))


def test_without_it_a_layer_is_left_alone_and_the_message_says_what_to_do():
    register_layer(Turned, neurons=lambda module: module.units, axis=-1)
    net = nn.Sequential(Turned(), nn.ReLU(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))
    report = prune(net, torch.rand(2, 4), 0.5)
    assert set(report.plan.neurons) == {"2"}
    assert any("how the width of Turned is changed; register_prunable can" in note for note in report.notes)
    register_prunable(Turned, **RIGHT)
    assert set(prune(net, torch.rand(2, 4), {"0": [1, 2]}).plan.neurons) == {"0"}
    assert net[0].units == 4


def test_a_missing_tensor_and_a_parametrized_one_are_no_mistake():
    register_prunable(Turned, **RIGHT)
    bare = Turned()
    bare.bias = None
    assert conform(bare, {"weight": torch.rand(4, 5)}) == ["weight"]
    assert bare.units == 5
    assert conform(nn.utils.parametrizations.weight_norm(Turned()), {}) == []


def test_subclasses_are_what_their_base_is_unless_they_are_registered():
    class Wider(Turned):
        pass

    register_prunable(Turned, **RIGHT)
    assert handler_of(Wider()) is handler_of(Turned())
    register_prunable(Wider, axis=1, makes={"weight": 1})
    assert handler_of(Wider()) is not handler_of(Turned())
    assert handler_of(Wider()).reads == {}
