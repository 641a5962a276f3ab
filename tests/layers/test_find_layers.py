"""Which modules are layers, whatever they are called with, and how they are chosen."""

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import ArgumentError, UnknownNameError, find_neurons, measure, register_layer
from lightning_neurons.layers.registry import LAYER_FAMILIES
from tests.models import ConvNet, Recurrent, cross_entropy, pictures, seeded
from tests.tables import for_each


@for_each(
    "layer, shape, neurons, axis",
    [
        (nn.Conv1d(2, 3, 3), (2, 2, 7), 3, 1),
        (nn.Conv2d(2, 4, 3), (2, 2, 7, 7), 4, 1),
        (nn.Conv3d(2, 5, 3), (2, 2, 5, 5, 5), 5, 1),
        (nn.ConvTranspose1d(2, 3, 3), (2, 2, 7), 3, 1),
        (nn.ConvTranspose2d(2, 4, 3), (2, 2, 7, 7), 4, 1),
        (nn.ConvTranspose3d(2, 5, 3), (2, 2, 3, 3, 3), 5, 1),
        (nn.Linear(2, 6), (3, 2), 6, -1),
        (nn.Linear(2, 6), (3, 5, 2), 6, -1),
    ],
)
def test_every_kind_of_layer_is_found_with_its_neurons_and_axis(layer, shape, neurons, axis):
    (found,) = find_neurons(nn.Sequential(layer, nn.ReLU()), torch.randn(shape))
    assert (found.name, found.type, found.neurons, found.axis) == ("0", type(layer).__name__, neurons, axis)
    assert found.activation_point == "0 > relu (1)"
    assert (found.calls, found.rectified, found.note) == (1, True, "")


@for_each("lazy", [(nn.LazyConv2d(4, 3),), (nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())])
def test_a_lazy_layer_is_refused_by_name_until_it_has_seen_a_batch(lazy):
    net = nn.Sequential(*lazy, nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 5, 5)
    with pytest.raises(ArgumentError, match=r"0: LazyConv2d.*run one batch through the model"):
        find_neurons(net, x)
    net(x)
    assert [(layer.type, layer.neurons) for layer in find_neurons(net, x)] == [("Conv2d", 4), ("Linear", 2)]


def test_a_layer_that_runs_three_times_has_three_calls_with_a_chain_each():
    layers = {layer.name: layer for layer in find_neurons(seeded(Recurrent), pictures()[0])}
    assert [layers[name].calls for name in ("start", "cell", "end")] == [1, 3, 1]
    assert [[str(link) for link in chain] for chain in layers["cell"].chains] == [["tanh (act)"]] * 3
    assert layers["cell"].bounds == (-1, 1)


def test_a_layer_that_never_runs_is_reported_with_a_note_and_measured_around():
    net = seeded(ConvNet)
    net.unused = nn.Linear(3, 2)
    x, y = pictures()
    unused = find_neurons(net, x)[-1]
    assert (unused.name, unused.calls, unused.chains, unused.readers) == ("unused", 0, (), None)
    assert "did not run" in unused.note
    report = measure(net, [(x, y)], loss_fn=cross_entropy)
    assert "did not run" in report.layers[-1].note
    assert all("unused" not in by_layer for by_layer in report.scores.values())


def test_the_projections_of_multihead_attention_are_not_seen_and_it_is_said():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
    layers = {found.name: found for found in find_neurons(layer, torch.randn(2, 5, 8))}
    assert list(layers) == ["self_attn.out_proj", "linear1", "linear2"]
    assert layers["self_attn.out_proj"].calls == 0
    assert "weights are used by a function" in layers["self_attn.out_proj"].note
    assert layers["linear1"].activation_point == "linear1 > relu > dropout (dropout)"
    assert layers["linear1"].readers == (("linear2", 1),)


class Maxout(nn.Module):
    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.units, self.linear = units, nn.Linear(inputs, 2 * units)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(-1, (self.units, 2)).amax(-1)


def test_a_registered_layer_type_counts_and_its_inner_linear_does_not():
    register_layer(Maxout, neurons=lambda module: module.units, axis=-1)
    try:
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Maxout(6, 3), nn.Dropout(), nn.Linear(3, 2))
        first, maxout, last = find_neurons(net, torch.randn(5, 4))
    finally:
        del LAYER_FAMILIES[Maxout]
    assert (maxout.name, maxout.type, maxout.neurons) == ("2", "Maxout", 3)
    assert maxout.activation_point == "2 > dropout (3)"
    assert (first.readers, maxout.readers, last.name) == ((("2", 1),), (("4", 1),), "4")


def test_registering_the_batch_axis_or_something_that_is_no_module_is_refused():
    with pytest.raises(ArgumentError, match=r"axis=0.*batch"):
        register_layer(Maxout, neurons=lambda module: module.units, axis=0)
    assert Maxout not in LAYER_FAMILIES


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(self.left(a)) + torch.tanh(self.right(b))


@for_each("form", ["tuple", "dict", "list"])
def test_inputs_may_be_positional_or_named(form):
    a, b = torch.randn(5, 3), torch.randn(5, 2)
    layers = find_neurons(TwoInputs(), {"tuple": (a, b), "dict": {"b": b, "a": a}, "list": [a, b]}[form])
    assert [layer.activation_point for layer in layers] == ["left > relu", "right > tanh"]


def test_a_compiled_inner_net_is_found_and_measured_under_its_own_names():
    inner, (x, y) = seeded(ConvNet), pictures()
    plain, compiled = nn.Sequential(inner), nn.Sequential(torch.compile(inner, backend="eager"))
    expected = find_neurons(plain, x)
    compiled(x)  # hooks that are added after the first compiled call would never fire
    assert find_neurons(compiled, x) == expected
    scores = [measure(net, [(x, y)], loss_fn=cross_entropy).scores["taylor"] for net in (plain, compiled)]
    assert list(scores[1]) == ["0.conv1", "0.conv2", "0.fc1", "0.fc2"]
    for name, score in scores[0].items():
        assert torch.equal(scores[1][name], score)


@for_each(
    "patterns, names",
    [
        (["conv1"], ["conv1"]),
        (["fc*", "conv2"], ["conv2", "fc1", "fc2"]),
        (["Conv2d"], ["conv1", "conv2"]),
        ([nn.Linear], ["fc1", "fc2"]),
        ([nn.modules.conv._ConvNd, "fc2"], ["conv1", "conv2", "fc2"]),
        (["*"], ["conv1", "conv2", "fc1", "fc2"]),
    ],
)
def test_layers_are_chosen_by_pattern_class_name_and_type_in_the_order_of_the_model(patterns, names):
    assert [layer.name for layer in find_neurons(ConvNet(), pictures()[0], layers=patterns)] == names


def test_choosing_some_layers_changes_nothing_that_is_known_of_them():
    x = pictures()[0]
    everything = {layer.name: layer for layer in find_neurons(ConvNet(), x)}
    for name in everything:
        assert find_neurons(ConvNet(), x, layers=[name]) == [everything[name]]


@for_each(
    "patterns, message",
    [
        (["cnv1"], r"nothing matches 'cnv1'. Did you mean 'conv1'"),
        (["conv1", "head.*"], r"nothing matches 'head.\*'"),
        ([nn.Conv1d], r"nothing matches 'Conv1d'. Did you mean 'Conv2d'"),
        ([nn.ReLU], r"nothing matches 'ReLU'"),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(patterns, message):
    with pytest.raises(UnknownNameError, match=message):
        find_neurons(ConvNet(), pictures()[0], layers=patterns)


@for_each("patterns", ["conv1", []])
def test_layers_must_be_a_list_that_is_not_empty(patterns):
    with pytest.raises(ArgumentError, match="layers="):
        find_neurons(ConvNet(), pictures()[0], layers=patterns)
