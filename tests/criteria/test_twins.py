"""Every criterion against its naive twin in tests/reference.py."""

import dataclasses

import torch
from torch import Tensor

from lightning_neurons.criteria import CRITERIA, LayerTraits
from lightning_neurons.criteria.deadness import constant, dormant, near_zero
from tests import reference
from tests.criteria.streams import BOUNDS, LAYER, stream
from tests.tables import for_each

SHAPES = [(7, 5, 1), (6, 4, 6), (1, 3, 8)]


def random_case(shape: tuple[int, int, int], seed: int = 0) -> tuple[reference.Case, list[Tensor], LayerTraits]:
    """A layer with a dead, a constant, a barely active and a scaled neuron among the others."""
    torch.manual_seed(seed)
    activations, gradients, sampled = (torch.randn(shape) for _ in range(3))
    activations = activations.relu()
    activations[:, 0] = 0
    activations[:, 1] = 0.7
    activations[:, 2] *= 0.01
    traits = LayerTraits(
        LAYER, "relu", rectified=True, bounds=BOUNDS, incoming=torch.randn(shape[1], 6),
        outgoing=torch.randn(shape[1], 3), norm_scale=torch.randn(shape[1]),
    )  # fmt: skip
    tensors = [activations, gradients, sampled]
    assert traits.incoming is not None
    assert traits.outgoing is not None
    assert traits.norm_scale is not None
    weights = [w.tolist() for w in (traits.incoming, traits.outgoing, traits.norm_scale)]
    return reference.Case(*(t.tolist() for t in tensors), BOUNDS, *weights), tensors, traits


def assert_close(scores: Tensor, twin: list[float], tolerance: float = 2e-6) -> None:
    expected = torch.tensor(twin, dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance * max(float(expected.abs().max()), 1))


def test_every_criterion_has_a_twin():
    assert reference.TWINS.keys() == CRITERIA.keys()


@for_each("shape", SHAPES)
@for_each("name", CRITERIA)
def test_a_criterion_equals_its_twin(name, shape):
    case, tensors, layer = random_case(shape)
    assert_close(stream([name], *tensors, layer=layer)[name], reference.TWINS[name](case))


@for_each("name", CRITERIA)
def test_a_criterion_equals_its_twin_in_uneven_batches_beside_all_others(name):
    case, tensors, layer = random_case((11, 4, 6), seed=1)
    scores = stream(CRITERIA, *tensors, layer=layer, sizes=[4, 1, 6])
    assert_close(scores[name], reference.TWINS[name](case))


@for_each("name", CRITERIA)
def test_what_is_known_of_a_rectifier_changes_no_score(name):
    case, tensors, layer = random_case((5, 4, 7), seed=2)
    assert_close(stream([name], *tensors, layer=layer, rectified=True)[name], reference.TWINS[name](case))


@for_each("name", sorted(CRITERIA.keys() - {"apoz"}))
def test_a_criterion_equals_its_twin_on_values_of_both_signs(name):
    case, tensors, layer = random_case((8, 4, 5), seed=3)
    tensors[0] = torch.randn(8, 4, 5).tanh()
    case = dataclasses.replace(case, activations=tensors[0].tolist())
    layer = dataclasses.replace(layer, rectified=False, activation="tanh")
    assert_close(stream([name], *tensors, layer=layer)[name], reference.TWINS[name](case))


@for_each("threshold", [0.02, 0.3, 1.0])
@for_each("relative", [True, False])
def test_near_zero_equals_its_twin_at_other_thresholds(threshold, relative):
    activations = torch.randn(40, 6, 8) * torch.tensor([1.0, 0.5, 2.0, 0.01, 3.0, 0.1])[:, None]
    values = activations.tolist()
    limit = threshold * (reference.layer_rms(values) if relative else 1)
    scores = stream([near_zero(threshold, relative=relative)], activations)["near_zero"].tolist()
    below, above = (reference.share_at_most(values, limit * by) for by in (0.99, 1.01))
    assert all(low <= score <= high for low, score, high in zip(below, scores, above, strict=True))
    assert len(set(scores)) > 2


@for_each("tau", [0.0, 0.025, 0.1, 1.0])
def test_dormant_equals_its_twin_at_other_thresholds(tau):
    activations = torch.randn(9, 6, 4).relu() * torch.tensor([1.0, 0.0, 0.02, 0.08, 3.0, 0.9])[:, None]
    case = reference.Case(activations.tolist(), [], [], tau=tau)
    assert stream([dormant(tau)], activations)["dormant"].tolist() == reference.TWINS["dormant"](case)


@for_each("tolerance", [0.0, 1e-3, 0.1, 1.0])
def test_constant_equals_its_twin_at_other_tolerances(tolerance):
    spread = torch.tensor([0.0, 0.05, 0.5, 5.0])[:, None]
    activations = 1 + spread * torch.randn(9, 4, 4)
    case = reference.Case(activations.tolist(), [], [], tolerance=tolerance)
    assert stream([constant(tolerance)], activations)["constant"].tolist() == reference.TWINS["constant"](case)
