"""The contract: criteria of one's own, how criteria are named, what a view offers."""

import pytest
import torch
from torch import nn

from lightning_neurons import measure
from lightning_neurons.criteria import (
    ACTIVATION_CRITERIA,
    CRITERIA,
    GRADIENT_CRITERIA,
    Criterion,
    LayerView,
    Statistic,
    resolve,
)
from lightning_neurons.criteria.deadness import near_zero
from lightning_neurons.errors import ArgumentError, UnknownNameError
from tests.criteria.streams import stream
from tests.tables import for_each

CUBES = Statistic("cubes", lambda view: (view.activation**3).sum(-1))
THIRD_MOMENT = Criterion("third_moment", (CUBES,), lambda summary: summary.per_value(CUBES))
LOWEST = Statistic("minus_lowest", lambda view: -view.activation.amin(-1), reduce="max")
RANGE = Criterion("lowest", (LOWEST,), lambda summary: -summary.total(LOWEST))
SLOPE = Statistic("slope", lambda view: view.gradient.sum(-1), "gradient", torch.abs)
STEEPNESS = Criterion("steepness", (SLOPE,), lambda summary: summary.per_sample(SLOPE))


def test_a_criterion_of_ones_own_is_streamed_like_any_other():
    activations = torch.randn(9, 3, 5)
    found = stream([THIRD_MOMENT, "rms", RANGE], activations, sizes=[2, 7])
    torch.testing.assert_close(found["third_moment"], (activations**3).mean((0, 2)).double())
    torch.testing.assert_close(found["lowest"], activations.amin((0, 2)).double())
    assert found.keys() == {"third_moment", "rms", "lowest"}


def test_a_criterion_of_ones_own_can_read_gradients():
    gradients = torch.randn(6, 2, 3)
    found = stream([STEEPNESS], torch.ones(6, 2, 3), gradients, sizes=[4, 2])["steepness"]
    torch.testing.assert_close(found, gradients.sum(-1).abs().mean(0).double())


def test_a_criterion_of_ones_own_works_in_measure_without_registration():
    net, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 3)
    loss = lambda model, batch: model(batch).square().sum(1)
    report = measure(net, [inputs], loss_fn=loss, criteria=[THIRD_MOMENT, STEEPNESS, "mean"])
    torch.testing.assert_close(report.scores["third_moment"]["0"], (net[:2](inputs) ** 3).mean(0).double())
    assert report.scores["steepness"]["0"].shape == (4,)
    assert [n.neuron for n in report.ranking("third_moment", layer="2")] in ([0, 1], [1, 0])


def test_a_refusal_of_ones_own_leaves_the_layer_out():
    picky = Criterion("picky", THIRD_MOMENT.statistics, THIRD_MOMENT.score, refuse=lambda traits: f"not {traits.name}")
    report = measure(nn.Sequential(nn.Linear(3, 2)), [torch.randn(4, 3)], criteria=[picky, "mean"])
    assert report.refused == {"picky": {"0": "not 0"}}
    assert report.scores["picky"] == {}
    assert report.scores["mean"].keys() == {"0"}


def test_names_and_objects_can_be_mixed_and_repeated():
    found = resolve(["rms", CRITERIA["taylor"], "rms", THIRD_MOMENT])
    assert [c.name for c in found] == ["rms", "taylor", "third_moment"]


def test_the_defaults_are_known_and_the_cheapest_passes_suffice_for_them():
    assert all(CRITERIA[name].needs == {"activation"} for name in ACTIVATION_CRITERIA)
    assert all(CRITERIA[name].needs == {"gradient"} for name in GRADIENT_CRITERIA)


@for_each("given, nearest", [("tailor", "'taylor'"), ("grad", "'gradient'"), ("apo", "'apoz'")])
def test_an_unknown_name_suggests_the_nearest(given, nearest):
    with pytest.raises(UnknownNameError) as error:
        resolve(["mean", given])
    for part in ("criteria", repr(given), "Did you mean", nearest, "Known: mean, rms"):
        assert part in str(error.value)


@for_each(
    "given, got, allowed",
    [
        ("rms", "criteria='rms'", "a list, such as ['rms']"),
        ([], "criteria=[]", "at least one criterion"),
        ([3], "criteria=3", "names of criteria or Criterion objects"),
        ([THIRD_MOMENT, Criterion("third_moment", (), lambda s: s)], "'third_moment'", "criteria of different names"),
        (["near_zero", near_zero(0.5)], "'near_zero'", "criteria of different names"),
        (
            ["mean", Criterion("mine", (Statistic("total", lambda view: view.positive),), lambda s: s)],
            "'total'",
            "statistics of different names",
        ),
    ],
)
def test_a_bad_list_of_criteria_says_what_came_and_what_is_allowed(given, got, allowed):
    with pytest.raises(ArgumentError) as error:
        resolve(given)
    assert got in str(error.value)
    assert f"expected {allowed}" in str(error.value)


def test_a_view_without_gradient_says_how_to_get_one():
    with pytest.raises(LookupError, match="name 'gradient' in the statistic's `needs`"):
        LayerView(torch.ones(1, 1, 1)).gate_gradient  # noqa: B018


@for_each("dtype", [torch.float16, torch.bfloat16])
def test_a_view_adds_half_precision_in_single_precision(dtype):
    view = LayerView(torch.full((1, 1, 4096), 300.0, dtype=dtype), torch.full((1, 1, 4096), 300.0, dtype=dtype))
    value = float(torch.tensor(300.0, dtype=dtype))
    assert view.total.item() == 4096 * value
    assert view.squares.item() == pytest.approx(4096 * value**2, rel=1e-4)
    assert view.gate_gradient.item() == pytest.approx(4096 * value**2, rel=1e-4)
    assert view.positive.item() == 4096
