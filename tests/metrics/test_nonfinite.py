"""NaN and infinity: counted by neuron, never averaged in, and nobody else suffers."""

import math

import pytest
import torch
from torch import nn

from lightning_neurons import measure
from lightning_neurons.criteria import CRITERIA
from lightning_neurons.criteria.contract import NEEDS
from tests.criteria.streams import ACTIVITY, GRADIENTS, LAYER, open_metric, stream, traits, view_of
from tests.tables import for_each

BAD = [math.nan, math.inf, -math.inf]
EACH_NEURON_FOR_ITSELF = sorted(set(ACTIVITY) - {"dormant_score", "dormant", "near_zero"})


def spoiled(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations, and the same with one bad value: sample 2, neuron 1."""
    clean = torch.randn(8, 3, 5).clamp(-2, 2)
    bad = clean.clone()
    bad[2, 1, 3] = value
    return clean, bad


@for_each("value", BAD)
@for_each("name", EACH_NEURON_FOR_ITSELF)
def test_a_bad_value_costs_its_neuron_that_sample_and_others_nothing(name, value):
    clean, bad = spoiled(value)
    found, whole = stream([name, "rms"], bad)[name], stream([name, "rms"], clean)[name]
    without = stream([name, "rms"], clean[[0, 1, 3, 4, 5, 6, 7]])[name]
    assert found[[0, 2]].tolist() == whole[[0, 2]].tolist()
    assert found[1].item() == pytest.approx(without[1].item(), rel=1e-12)


@for_each("value", BAD)
@for_each("name", ACTIVITY)
def test_a_bad_value_is_counted_whichever_criterion_is_measured_alone(name, value):
    metric = open_metric([name], traits(3), 3)
    metric.update(LAYER, view_of(spoiled(value)[1]))
    metric.finish_batch()
    assert metric.nonfinite[0, NEEDS.index("activation")].tolist() == [0, 1, 0]
    assert metric.samples[0, NEEDS.index("activation")].tolist() == [8, 7, 8]
    assert metric.values[0].tolist() == [40, 35, 40]


@for_each("value", BAD)
@for_each("name", GRADIENTS)
def test_a_bad_gradient_costs_its_neuron_that_sample(name, value):
    activations, gradients = torch.randn(6, 3, 2), torch.randn(6, 3, 2)
    bad = gradients.clone()
    bad[4, 0, 1] = value
    found = stream([name], activations, bad, bad)[name]
    rest = [0, 1, 2, 3, 5]
    whole, without = (
        stream([name], activations[rows], gradients[rows], gradients[rows])[name] for rows in (slice(None), rest)
    )
    assert found.isfinite().all()
    if name == "gradient":  # the layer's sum has changed
        assert (found[1] / found[2]).item() == pytest.approx((whole[1] / whole[2]).item())
    else:
        assert found[1:].tolist() == whole[1:].tolist()
        assert found[0].item() == pytest.approx(without[0].item())


def test_near_zero_is_of_the_finite_samples():
    activations = torch.tensor([1.0, 0.0, 0.0, math.nan, 3.0])[:, None, None]
    assert stream(["near_zero"], activations)["near_zero"].item() == 0.5


@for_each("name", ACTIVITY + GRADIENTS)
def test_a_neuron_without_a_finite_sample_has_no_score(name):
    activations, gradients = torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    activations[:, 1] = gradients[:, 1] = math.nan
    scores = stream([name], activations, gradients, gradients)[name]
    assert scores.isnan().tolist() == [False, True, False]


@for_each("name", ACTIVITY + GRADIENTS)
def test_a_layer_without_a_finite_sample_has_no_scores(name):
    nothing = torch.full((5, 2, 3), math.nan)
    assert stream([name], nothing, nothing, nothing)[name].isnan().all()


def test_bad_values_are_counted_by_class():
    metric = open_metric(["mean"], traits(1), 1, per_class=True)
    values = torch.tensor([1.0, math.nan, 5.0, 7.0])[:, None, None]
    metric.update(LAYER, view_of(values), targets=torch.tensor([0, 0, 1, 1]))
    metric.finish_batch()
    assert metric.samples[:, 0, 0].tolist() == [1, 2]
    assert metric.nonfinite[:, 0, 0].tolist() == [1, 0]
    assert [metric.summary(LAYER, k).per_value(CRITERIA["mean"].statistics[0]).item() for k in (0, 1)] == [1, 6]


class Overflow(nn.Module):
    """Divides by its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1 / x


def test_a_report_says_how_many_samples_were_left_out():
    net = nn.Sequential(Overflow(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    inputs = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.5, 0.25]]))
    report = measure(net, [inputs], criteria=["mean", "near_zero"])
    assert report.counts["1"].nonfinite.tolist() == [1, 1, 1]
    assert report.counts["1"].samples.tolist() == [2, 2, 2]
    assert report.scores["mean"]["1"].isfinite().all()
