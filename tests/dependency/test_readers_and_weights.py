"""Who reads a layer's neurons, and by which weights: compared with loops over single weights."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import find_neurons
from lightning_neurons.hooks.weights import incoming_weight, outgoing_weight, traits_of
from lightning_neurons.layers.layer import modules_by_name
from tests.models import ConvNet, ResidualNet, pictures
from tests.tables import for_each


def reader_of_first(*modules: nn.Module, shape) -> tuple[tuple[str, int], ...] | None:
    return find_neurons(nn.Sequential(*modules), torch.randn(shape))[0].readers


def test_a_flattened_picture_gives_each_neuron_its_positions_in_the_linear_reader():
    readers = reader_of_first(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 5), shape=(2, 3, 8, 8)
    )
    assert readers == (("4", 9),)


@for_each(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(3),
        nn.AdaptiveMaxPool2d(3),
        nn.Upsample(3),
        nn.ZeroPad2d(1),
    ],
)
def test_pooling_padding_and_resizing_hand_the_neurons_on(pool):
    assert reader_of_first(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Conv2d(4, 2, 3), shape=(2, 3, 8, 8)) == (("3", 1),)


def test_a_residual_sum_a_lonely_end_and_a_norm_have_no_readers_that_are_layers():
    readers = {layer.name: layer.readers for layer in find_neurons(ResidualNet(inplace=False), pictures()[0])}
    assert readers == {"conv1": None, "conv2": (("conv3", 1),), "conv3": None, "fc": None}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.left(x).mean() + self.right(F.avg_pool2d(x, 2)).mean()


def test_several_layers_may_read_the_same_neurons():
    net = Branches()
    stem = find_neurons(net, torch.randn(2, 3, 8, 8))[0]
    assert stem.readers == (("left", 1), ("right", 1))
    expected = [torch.cat([net.left.weight[:, i].flatten(), net.right.weight[:, i].flatten()]) for i in range(4)]
    assert torch.equal(sorted_rows(traits_of(stem, modules_by_name(net)).outgoing), sorted_rows(torch.stack(expected)))


def sorted_rows(weights: Tensor) -> Tensor:
    """The order of the weights within a row means nothing."""
    return weights.detach().sort(1).values


def contributions(module: nn.Module, inputs: int, space: tuple[int, ...]) -> Tensor:
    """By input and output, whether and how strongly one reads the other: probing with one input at a time."""
    silent = module(torch.zeros(1, inputs, *space))
    rows = []
    for i in range(inputs):
        x = torch.zeros(1, inputs, *space)
        x[0, i] = torch.randn(space)
        rows.append((module(x) - silent)[0].flatten(1).abs().sum(1) > 1e-6)
    return torch.stack(rows)


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (1, 3), groups=2),
    nn.Conv2d(4, 8, 3, groups=4),
    nn.Conv1d(6, 3, 3, groups=3),
    nn.Conv3d(2, 3, 2),
    nn.ConvTranspose2d(4, 6, 3),
    nn.ConvTranspose2d(4, 6, (1, 3), groups=2),
    nn.ConvTranspose1d(4, 8, 3, groups=4),
    nn.ConvTranspose3d(2, 3, 2),
]


def single_weights(module: nn.Module) -> list[tuple[int, int, Tensor]]:
    """Every pair of an input and an output that are connected, with the weights between them."""
    inputs, outputs, groups = module.in_channels, module.out_channels, module.groups
    found = []
    for i in range(inputs):
        for o in range(outputs):
            if i // (inputs // groups) == o // (outputs // groups):
                i_in, o_in = i % (inputs // groups), o % (outputs // groups)
                weight = module.weight[i, o_in] if module.transposed else module.weight[o, i_in]
                found.append((i, o, weight.detach().flatten()))
    return found


@for_each("module", CONVOLUTIONS)
def test_weights_of_grouped_depthwise_and_transposed_convolutions_equal_naive_loops(module):
    pairs = single_weights(module)
    space = (5,) * (module.weight.ndim - 2)
    connected = torch.zeros(module.in_channels, module.out_channels, dtype=torch.bool)
    for i, o, _ in pairs:
        connected[i, o] = True
    assert torch.equal(connected, contributions(module, module.in_channels, space))  # the loop itself is right
    incoming = [torch.cat([w for _, o, w in pairs if o == n]) for n in range(module.out_channels)]
    outgoing = [torch.cat([w for i, _, w in pairs if i == n]) for n in range(module.in_channels)]
    assert torch.equal(sorted_rows(incoming_weight(module, module.out_channels)), sorted_rows(torch.stack(incoming)))
    assert torch.equal(sorted_rows(outgoing_weight(module)), sorted_rows(torch.stack(outgoing)))


def test_weights_behind_a_flattened_picture_are_those_of_the_neurons_own_positions():
    net = ConvNet()
    conv2 = find_neurons(net, pictures()[0])[1]
    assert conv2.readers == (("fc1", 16),)
    expected = [net.fc1.weight[:, 16 * c : 16 * (c + 1)].flatten() for c in range(5)]
    assert torch.equal(sorted_rows(traits_of(conv2, modules_by_name(net)).outgoing), sorted_rows(torch.stack(expected)))


@for_each("tokens", [3, 4])
def test_flattened_tokens_never_give_a_neuron_the_weights_of_others(tokens):
    width = 4
    net = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Flatten(), nn.Linear(tokens * width, 5))
    first = find_neurons(net, torch.randn(2, tokens, 2))[0]
    right = torch.stack([net[3].weight[:, d::width].flatten() for d in range(width)])
    outgoing = traits_of(first, modules_by_name(net)).outgoing
    assert outgoing is None or torch.equal(sorted_rows(outgoing), sorted_rows(right))
    assert first.readers in {None, (("3", tokens),)}


def test_a_mean_over_channels_is_not_taken_for_the_channels():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(x)).mean(1).mean(2))  # over channels, then over columns

    net = Mean()
    assert find_neurons(net, torch.randn(2, 3, 6, 6))[0].readers is None


def test_the_norms_scale_is_found_behind_the_layer_and_nowhere_else():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.LayerNorm(2), nn.Linear(2, 2)
    )
    first, second, third = (traits_of(layer, modules_by_name(net)) for layer in find_neurons(net, torch.randn(5, 3)))
    assert torch.equal(first.norm_scale, net[1].weight)
    assert torch.equal(second.norm_scale, net[4].weight)
    assert third.norm_scale is None


@for_each("computed", ["spectral norm", "noise"])
def test_to_look_at_a_weight_that_is_computed_at_every_reading_changes_nothing(computed):
    class Noise(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.randn_like(weight) * self.training

    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    layer = find_neurons(net, torch.randn(4, 6))[0]
    if computed == "noise":
        nn.utils.parametrize.register_parametrization(net[0], "weight", Noise())
    else:
        nn.utils.parametrizations.spectral_norm(net[0])
    net.train()
    random, state = torch.get_rng_state(), {name: value.clone() for name, value in net.state_dict().items()}
    incoming = traits_of(layer, modules_by_name(net)).incoming
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(part.training for part in net[0].modules())
    assert torch.equal(incoming, net.eval()[0].weight)
