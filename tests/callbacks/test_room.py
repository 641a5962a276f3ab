"""What does not fit into memory is refused before training, with the layer and what to do."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_neurons import NeuronSensitivityCallback, measure
from lightning_neurons.criteria import CRITERIA
from lightning_neurons.errors import MeasurementError
from lightning_neurons.measurement.measurement import Measurement
from lightning_neurons.metrics import room
from tests.callbacks.modules import Plain, fit


def test_a_layer_that_does_not_fit_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(room, "available_bytes", lambda device: 100_000)
    callback, module = NeuronSensitivityCallback(), Plain()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(MisconfigurationException, match=r"layer 'net.fc1' with 8 neurons; leave layers out by layers="):
        fit(module, [callback])
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_without_a_histogram_less_memory_is_asked_for(monkeypatch):
    monkeypatch.setattr(room, "available_bytes", lambda device: 100_000)
    net, batches = nn.Sequential(nn.Linear(2, 30), nn.ReLU()), [torch.randn(4, 2)]
    with pytest.raises(MeasurementError, match="the histograms of 'near_zero' take most of it"):
        measure(net, batches)
    assert measure(net, batches, criteria=["mean"]).scores["mean"]["0"].shape == (30,)


def test_the_estimate_is_what_the_sums_take():
    net = nn.Sequential(nn.Linear(2, 100), nn.ReLU())
    criteria = [c for c in CRITERIA.values() if c.needs <= {"activation"}]
    metric = Measurement(net, criteria).metric
    taken = sum(state.numel() * state.element_size() for state in metric.metric_state.values())
    assert 100 * room.bytes_per_neuron(criteria) == taken


def test_where_nothing_is_known_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(room, "available_bytes", lambda device: None)
    room.require_room({"wide": 10**12}, [], torch.device("cpu"))


def test_free_memory_is_known_here_or_not_at_all():
    free = room.available_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
