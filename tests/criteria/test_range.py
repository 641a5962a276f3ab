"""Values as large and as small as their type holds: scores are those of naive code, and who fires is not dead."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import measure
from lightning_neurons.criteria import CRITERIA
from tests import reference
from tests.criteria.streams import BOUNDS, stream, traits
from tests.tables import for_each

SHARES = ("near_zero", "saturated", "apoz")
"""Of ``near_zero`` the histogram resolves a part of the range; who is dead is exact in all of it."""


@pytest.fixture(params=["little", "much"])
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few values are summed in float64 from the start; let the others' way be gone with few as well."""
    if request.param == "much":
        monkeypatch.setattr("lightning_neurons.criteria.view._LITTLE", 0)


def expected(name: str, tensors: list[Tensor]) -> Tensor:
    weights = traits(tensors[0].shape[1])
    case = reference.Case(*(t.tolist() for t in tensors), BOUNDS)
    assert weights.incoming is not None
    case = dataclasses.replace(case, incoming=weights.incoming.tolist())
    return torch.tensor(reference.TWINS[name](case), dtype=torch.float64)


def assert_right(tensors: list[Tensor], **kwargs: bool) -> None:
    found = stream([n for n, c in CRITERIA.items() if c.statistics], *tensors, **kwargs)
    for name, scores in found.items():
        twin = expected(name, tensors)
        if name in SHARES:
            assert (scores == 1).tolist() == (twin == 1).tolist(), name
        elif name == "variance":
            squares = expected("rms", tensors).square()
            assert ((scores - twin).abs() <= 1e-5 * squares).all(), name
        elif name.startswith("second_order"):
            assert torch.allclose(scores, twin, rtol=1e-5, atol=1e-6 * float(twin.abs().max())), name
        else:
            torch.testing.assert_close(scores, twin, rtol=1e-5, atol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("_size")
@for_each("space", [1, 6, 64])
@for_each(
    "size, slope", [(1e-30, 1.0), (1e-21, 1e-12), (1e-9, 1e-25), (1e-5, 1e-30), (1e9, 1.0), (1e20, 1e12), (1e25, 1e-30)]
)
def test_a_layer_of_any_size_has_the_scores_of_naive_code(size, slope, space):
    activations, gradients, sampled = (torch.randn(5, 4, space) for _ in range(3))
    activations[:, 1] = 0
    activations[:, 2] = activations[:, 2].relu()
    activations[0, 2, 0] = 1
    assert_right([activations * size, gradients * slope, sampled * slope])


@pytest.mark.usefixtures("_size")
@for_each("space", [1, 6])
def test_neurons_of_any_size_do_not_disturb_one_another(space):
    sizes = torch.tensor([1.0, 1e-25, 1e20, 1e-18, 0])[:, None]
    activations = (torch.rand(7, 5, space) + 0.5) * sizes
    gradients = torch.randn(7, 5, space)
    assert_right([activations, gradients, gradients], rectified=True)


@for_each("space", [1, 6])
def test_float64_goes_further(space):
    values = torch.randn(5, 2, space, dtype=torch.float64).abs() + 0.1
    values[:, 1] = 0
    huge = stream(["max", "mean", "active_share", "rms", "near_zero", "variance", "constant"], values * 1e200)
    for name in ("max", "mean", "active_share"):
        torch.testing.assert_close(huge[name], expected(name, [values * 1e200] * 3))
    assert huge["near_zero"].tolist() == [0, 1]
    assert huge["rms"].tolist() == [math.inf, 0], "as naive code has it: the squares do not fit into float64"
    assert [math.isnan(huge[name][0].item()) for name in ("variance", "constant")] == [True, True]


@for_each("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_the_end_of_its_range(dtype):
    largest = torch.finfo(dtype).max
    values = torch.tensor([[[largest, largest]], [[largest, -largest]]], dtype=dtype)
    scores = stream(["max", "mean", "rms", "near_zero", "active_share"], values)
    assert scores["max"].item() == scores["rms"].item() == largest
    assert scores["mean"].item() == largest / 2
    assert (scores["near_zero"].item(), scores["active_share"].item()) == (0, 0.75)


@for_each("scale", [1e-20, 1e-12, 1e12])
def test_fisher_of_small_and_large_losses_is_that_of_float64(scale):
    torch.manual_seed(0)
    net, inputs = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 1)), torch.randn(256, 5)
    report = measure(net, [inputs], loss_fn=lambda m, x: scale * m(x).sum(), loss_reduction="sum", layers=["0"])
    hidden = net[0](inputs).detach().relu().double()
    gates = hidden * (scale * net[2].weight[0].detach().double())
    torch.testing.assert_close(report.scores["fisher"]["0"], gates.square().mean(0) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(report.scores["taylor"]["0"], gates.abs().mean(0), rtol=1e-6, atol=0)


def test_who_was_silent_where_others_were_infinite_is_unknown():
    """Neuron 0 fires, 1 is silent, 2 is silent and has a NaN, 3 fires and has an infinity, 4 has nothing finite."""
    values = torch.zeros(6, 5, 3)
    values[2, 0], values[1, 3] = 1.0, 1.0
    values[4, 2, 0], values[4, 3, 1], values[:, 4] = math.nan, math.inf, -math.inf
    layer = traits(5)
    measures = stream([n for n, c in CRITERIA.items() if c.kind == "deadness"], values, layer=layer)
    for name in ("near_zero", "apoz", "constant", "dormant"):
        known = [None if math.isnan(d) else d == 1 for d in measures[name].tolist()]
        assert known == [False, True, None, False, None], name


def test_by_class_only_the_class_that_was_not_finite_is_unknown():
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[-1.0], [1.0]]))
    inputs, targets = torch.tensor([[1.0], [2.0], [math.nan], [3.0]]), torch.tensor([0, 0, 1, 1])
    report = measure(net, [(inputs, targets)], criteria=["near_zero"], per_class=True)
    first, second = report.per_class["near_zero"]["0"].tolist()
    assert first == [1, 0]
    assert math.isnan(second[0])
    assert second[1] == 0
    assert report.unknown("0").tolist() == [True, False]
    assert report.dead("0").tolist() == [False, False]
    at = report.deadness_at(0.1)["0"].tolist()
    assert math.isnan(at[0])
    assert at[1] < 1
