"""Criteria on weights, through ``measure``: which weights are a neuron's, and where there are none."""

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import measure
from lightning_neurons.criteria import CRITERIA, LayerTraits
from tests import reference
from tests.tables import for_each

INCOMING = ("weight_l1", "weight_l2")
OUTGOING = ("outgoing_l1", "outgoing_l2")


def scores_of(model: nn.Module, inputs: Tensor, names, layer: str = "0", **options) -> dict[str, list[float]]:
    report = measure(model, [inputs], criteria=list(names), **options)
    return {name: by_layer[layer].tolist() for name, by_layer in report.scores.items()}


def assert_norms_of(scores: dict[str, list[float]], names: tuple[str, str], rows: list[list[float]]) -> None:
    assert scores[names[0]] == pytest.approx(reference.l1(rows))
    assert scores[names[1]] == pytest.approx(reference.l2(rows))


@for_each(
    "layer, shape",
    [
        (nn.Linear(4, 6), (4,)),
        (nn.Conv1d(4, 6, 3), (4, 8)),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
        (nn.Conv3d(4, 6, 2), (4, 3, 3, 3)),
    ],
)
def test_incoming_weights_are_those_that_make_the_neuron(layer, shape):
    rows = layer.weight.flatten(1).tolist()
    assert_norms_of(scores_of(nn.Sequential(layer), torch.randn(2, *shape), INCOMING), INCOMING, rows)


@for_each("groups", [1, 2])
def test_incoming_weights_of_a_transposed_convolution_lie_on_its_second_axis(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    each = 6 // groups
    rows = []
    for neuron in range(6):
        group, place = divmod(neuron, each)
        inputs = range(group * 4 // groups, (group + 1) * 4 // groups)
        rows.append([w for i in inputs for w in layer.weight[i, place].flatten().tolist()])
    assert_norms_of(scores_of(nn.Sequential(layer), torch.randn(2, 4, 5, 5), INCOMING), INCOMING, rows)


def test_biases_are_left_out():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.bias.fill_(100)
    assert max(scores_of(nn.Sequential(layer), torch.randn(2, 3), INCOMING)["weight_l1"]) < 3


def test_outgoing_weights_are_the_columns_of_the_next_layer():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    assert_norms_of(scores_of(net, torch.randn(2, 3), OUTGOING), OUTGOING, net[2].weight.t().tolist())


def test_outgoing_weights_are_known_when_only_their_layer_is_measured():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    assert_norms_of(scores_of(net, torch.randn(2, 3), OUTGOING, layers=["0"]), OUTGOING, net[2].weight.t().tolist())


def test_outgoing_weights_of_a_convolution_are_all_taps_of_all_its_readers():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2))
    weight = net[2].weight  # (6, 2, 3, 3): outputs 0..2 read neurons 0 and 1
    rows = [weight[3 * (i // 2) : 3 * (i // 2) + 3, i % 2].flatten().tolist() for i in range(4)]
    assert_norms_of(scores_of(net, torch.randn(2, 1, 6, 6), OUTGOING), OUTGOING, rows)


def test_outgoing_weights_pass_through_a_flattening():
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    rows = [net[3].weight[:, 4 * i : 4 * i + 4].flatten().tolist() for i in range(3)]
    assert_norms_of(scores_of(net, torch.randn(2, 1, 3, 3), OUTGOING), OUTGOING, rows)


def test_the_scale_of_the_norm_behind_is_taken_without_its_sign():
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU())
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.5, -2.0, 0.0]))
    assert scores_of(net, torch.randn(2, 1, 3, 3), ["norm_scale"])["norm_scale"] == [0.5, 2, 0]


@for_each("norm", [None, nn.BatchNorm2d(3, affine=False)])
def test_norm_scale_is_refused_without_a_scale(norm):
    net = nn.Sequential(nn.Conv2d(1, 3, 2), *([norm] if norm else []), nn.ReLU())
    report = measure(net, [torch.randn(2, 1, 3, 3)], criteria=["rms", "norm_scale"])
    assert report.scores["norm_scale"] == {}
    for part in ("no normalisation layer with a scale", "'0'", "'weight_l2'"):
        assert part in report.refused["norm_scale"]["0"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return hidden + self.second(hidden)


@for_each("name", OUTGOING)
def test_outgoing_weights_are_refused_where_a_residual_sum_reads_too(name):
    report = measure(Residual(), [torch.randn(2, 3)], criteria=["rms", name])
    for part in ("'first'", "residual sum", "'weight_l2'"):
        assert part in report.refused[name]["first"]


@for_each("name", INCOMING)
def test_incoming_weights_are_refused_where_there_are_none(name):
    reason = CRITERIA[name].refuse(LayerTraits("pool")) or ""
    assert "'pool' has no weight tensor" in reason
    assert "'rms'" in reason


@for_each("name", [*INCOMING, *OUTGOING, "norm_scale"])
def test_no_data_is_needed(name):
    assert CRITERIA[name].statistics == ()
    assert CRITERIA[name].needs == frozenset()
