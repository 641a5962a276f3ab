"""Activity against closed forms of the normal distribution, and the dormant score."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from tests.criteria.streams import laws, stream
from tests.tables import for_each

SAMPLES = 200_000


def phi(x: float) -> float:
    """The normal distribution's density."""
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def normal(mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
    """One neuron, at one position, in many images."""
    generator = torch.Generator().manual_seed(7)
    return mean + deviation * torch.randn(SAMPLES, 1, 1, generator=generator, dtype=torch.float64)


@for_each("mean, deviation", [(0.0, 1.0), (0.5, 1.0), (-1.0, 2.0), (2.0, 0.5)])
def test_relu_of_a_normal_variable_has_the_share_of_zeros_and_the_mean_of_the_formula(mean, deviation):
    scores = stream(["apoz", "active_share", "mean"], normal(mean, deviation).relu())
    zeros, ratio = cdf(-mean / deviation), mean / deviation
    assert scores["apoz"].item() == pytest.approx(zeros, abs=4 * math.sqrt(zeros * (1 - zeros) / SAMPLES))
    assert scores["active_share"].item() == pytest.approx(1 - scores["apoz"].item(), abs=1e-15)
    assert scores["mean"].item() == pytest.approx(
        mean * cdf(ratio) + deviation * phi(ratio), abs=4 * deviation / math.sqrt(SAMPLES)
    )


def test_relu_of_a_standard_normal_variable_has_the_known_variance():
    scores = stream(["mean", "rms", "variance"], normal().relu())
    assert scores["mean"].item() == pytest.approx(1 / math.sqrt(2 * math.pi), abs=0.006)
    assert scores["rms"].item() == pytest.approx(math.sqrt(0.5), abs=0.006)
    assert scores["variance"].item() == pytest.approx(0.5 - 1 / (2 * math.pi), abs=0.006)


def test_gelu_of_a_standard_normal_variable_has_the_known_mean_and_no_zeros():
    values = F.gelu(normal())
    assert stream(["mean"], values)["mean"].item() == pytest.approx(1 / (2 * math.sqrt(math.pi)), abs=0.006)
    assert stream(["apoz"], values.abs())["apoz"].item() == 0


def test_dormant_scores_are_magnitudes_over_their_mean():
    activations = torch.tensor([[[1.0, -1.0], [-4.0, 4.0], [0.0, 0.0]]])
    assert stream(["dormant_score"], activations)["dormant_score"].tolist() == pytest.approx([0.6, 2.4, 0.0])


@laws
@given(st.integers(0, 1000), st.integers(1, 6))
def test_dormant_scores_are_1_on_average(seed, neurons):
    torch.manual_seed(seed)
    scores = stream(["dormant_score"], torch.randn(3, neurons, 4).relu() + 1e-3)["dormant_score"]
    assert scores.mean().item() == pytest.approx(1)


def test_a_silent_layer_has_dormant_scores_of_zero():
    assert stream(["dormant_score"], torch.zeros(3, 4, 2))["dormant_score"].tolist() == [0] * 4


def test_a_neuron_of_which_nothing_is_known_has_no_dormant_score_beside_silent_ones():
    activations = torch.zeros(3, 2, 2)
    activations[:, 1] = torch.nan
    scores = stream(["dormant_score"], activations)["dormant_score"]
    assert scores[0] == 0
    assert scores[1].isnan()


def test_the_variance_of_a_constant_is_never_negative():
    assert stream(["variance"], torch.full((50, 1, 49), 0.1))["variance"].item() >= 0


def test_the_variance_survives_a_mean_a_hundred_times_larger():
    values = 100 + normal()
    assert stream(["variance"], values)["variance"].item() == pytest.approx(values.var(correction=0).item(), rel=1e-9)


def test_the_maximum_can_be_negative():
    assert stream(["max"], torch.tensor([[[-3.0, -2.0]], [[-5.0, -4.0]]]))["max"].item() == -2


def test_a_neuron_that_is_never_positive_is_not_active():
    assert stream(["active_share"], torch.tensor([[[-3.0, 0.0]]]))["active_share"].item() == 0
