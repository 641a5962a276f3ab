"""What dead means, where each measure is refused, and how sure "never" is."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from lightning_neurons import measure
from lightning_neurons.criteria import CRITERIA, LayerTraits
from lightning_neurons.criteria.deadness import constant, dormant, near_zero, never_fired_bound
from lightning_neurons.errors import ArgumentError
from tests.criteria.streams import laws, stream, traits
from tests.tables import for_each


def dead_relu_net() -> nn.Sequential:
    """Neuron 1 of the first layer never fires."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].bias[1] = -1e6
    return net


def test_a_dead_relu_is_dead_by_every_measure_and_nothing_rests_on_it():
    net, inputs, targets = dead_relu_net(), torch.randn(64, 4), torch.randint(2, (64,))
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    report = measure(net, [(inputs, targets)], loss_fn=loss, layers=["0"])
    assert {name: by_layer["0"][1].item() for name, by_layer in report.deadness_by.items() if by_layer} == {
        "near_zero": 1, "apoz": 1, "dormant": 1, "constant": 1,
    }  # fmt: skip
    for name in ("taylor", "taylor_fo", "fisher", "second_order"):
        assert report.scores[name]["0"][1] == 0
    assert report.scores["gradient"]["0"][1] > 0
    before = loss(net, (inputs, targets)).item()
    with torch.no_grad():
        net[2].weight[:, 1] = 0
    assert loss(net, (inputs, targets)).item() == before


def test_a_neuron_that_fires_once_in_a_position_that_is_not_sampled_is_not_dead():
    activations = torch.zeros(50, 1024).index_put((torch.tensor(31), torch.tensor(500)), torch.tensor(1.0))
    activations = torch.stack([activations, torch.zeros(50, 1024)], 1)
    alive, dead = stream([near_zero(0.1, relative=False)], activations)["near_zero"].tolist()
    assert 1 - 2 / (50 * 1024) < alive < 1
    assert dead == 1


def test_near_zero_of_a_silent_layer_is_1():
    assert stream(["near_zero"], torch.zeros(3, 2, 4))["near_zero"].tolist() == [1, 1]


def test_an_absolute_threshold_is_in_activation_units():
    activations = torch.tensor([[[0.05, 0.5, 5.0, -0.05]]])
    for threshold, share in ((0.01, 0), (0.1, 0.5), (1.0, 0.75), (10.0, 1)):
        assert stream([near_zero(threshold, relative=False)], activations)["near_zero"].item() == share


def test_a_relative_threshold_is_in_units_of_the_layers_root_mean_square():
    activations = torch.tensor([[[6.0], [8.0]], [[0.0], [0.0]]])  # root mean square 5
    assert stream([near_zero(1.25)], activations)["near_zero"].tolist() == [1, 0.5]
    assert stream([near_zero(1.15)], activations)["near_zero"].tolist() == [0.5, 0.5]


@laws
@given(st.sampled_from([0.0, 0.025, 0.1, 0.25, 0.5]))
def test_dormancy_includes_its_threshold(tau):
    # The magnitudes average 1 exactly, so that the first neuron's score is tau.
    activations = torch.tensor([[[tau], [2 - tau], [1.0], [1.0]]], dtype=torch.float64)
    assert stream([dormant(tau)], activations)["dormant"].tolist() == [1, 0, 0, 0]
    if tau:
        below = math.nextafter(tau, 0)
        assert stream([dormant(below)], activations)["dormant"].tolist() == [0, 0, 0, 0]


def test_all_neurons_of_a_silent_layer_are_dormant():
    assert stream(["dormant"], torch.zeros(3, 4, 2))["dormant"].tolist() == [1] * 4


def test_a_layer_of_which_nothing_is_known_is_not_dormant():
    assert stream(["dormant"], torch.full((3, 2, 4), torch.nan))["dormant"].isnan().all()


@laws
@given(st.floats(1e-5, 1e4), st.integers(1, 5000), st.booleans())
@example(611.0, 3366, False)
def test_a_constant_neuron_is_constant_whatever_its_value(value, space, negative):
    assert stream(["constant"], torch.full((3, 1, space), -value if negative else value))["constant"].item() == 1


@laws
@given(st.floats(0.01, 100), st.integers(0, 100))
def test_a_neuron_that_varies_by_a_hundredth_of_its_size_is_not_constant(size, seed):
    torch.manual_seed(seed)
    assert stream(["constant"], size * (1 + 0.02 * torch.randn(8, 1, 64)))["constant"].item() == 0


def test_saturation_counts_both_bounds():
    values = torch.tensor([[[-0.99, -0.94, 0.0, 0.94, 0.96, 0.96, 0.1, 0.97]]])
    assert stream(["saturated"], values)["saturated"].item() == 0.5


def layer_behind(function: nn.Module) -> dict[str, str]:
    """By criterion, why the layer before ``function`` is refused."""
    net = nn.Sequential(nn.Linear(4, 3), function, nn.Linear(3, 2))
    report = measure(net, [torch.randn(8, 4)], criteria=["near_zero", "apoz", "saturated"], layers=["0"])
    return {name: reasons["0"] for name, reasons in report.refused.items()}


def test_apoz_is_refused_behind_a_gelu_with_the_reason_and_the_alternative():
    reason = layer_behind(nn.GELU())["apoz"]
    for part in ("gelu", "'0'", "exact zeros", "'near_zero'", "'constant'"):
        assert part in reason


def test_apoz_is_refused_where_no_activation_function_follows():
    assert "no activation function" in (CRITERIA["apoz"].refuse(LayerTraits("head")) or "")


def test_saturation_is_refused_behind_a_relu_with_the_reason_and_the_alternative():
    refused = layer_behind(nn.ReLU())
    assert refused.keys() == {"saturated"}
    for part in ("'0'", "sigmoid- or tanh-like", "'near_zero'", "'constant'"):
        assert part in refused["saturated"]


@for_each("function", [nn.Tanh(), nn.Sigmoid()])
def test_saturation_is_measured_behind_bounded_functions(function):
    assert layer_behind(function).keys() == {"apoz"}


@for_each("name", ["near_zero", "dormant", "constant"])
def test_a_measure_for_every_layer_refuses_none(name):
    assert CRITERIA[name].refuse(LayerTraits("anything")) is None
    assert CRITERIA[name].refuse(traits()) is None


@for_each("make, argument", [(near_zero, "threshold"), (dormant, "tau"), (constant, "tolerance")])
@for_each("value", [-0.1, math.nan, math.inf])
def test_a_threshold_out_of_range_is_refused(make, argument, value):
    with pytest.raises(ArgumentError, match=rf"{argument}={value!r} is not allowed: expected a finite number"):
        make(value)


def test_never_in_n_samples_bounds_the_rate_by_3_over_n():
    bound = never_fired_bound(torch.tensor([0, 1, 3, 300, 30_000]))
    assert bound.tolist() == [1, 1, 1, 0.01, 1e-4]
    # A neuron that fires at this rate stays silent in all samples with a probability of 5 %.
    assert (1 - bound[-1].item()) ** 30_000 == pytest.approx(0.05, rel=0.01)
