"""Activation functions that are written out: measured behind them, as the same network is with hooks on modules."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import find_neurons, measure
from tests.tables import for_each


def assigned(x: Tensor) -> Tensor:
    x[x < 0] = 0
    return x


def picked(x: Tensor) -> Tensor:
    mask = x < 0
    x[mask] = 0.1 * x[mask]
    return x


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.797885 * (x + 0.044715 * torch.pow(x, 3.0))))


def srelu(x: Tensor) -> Tensor:
    return torch.where(x > 1, 1 + 0.5 * (x - 1), torch.where(x < -1, -1 + 0.5 * (x + 1), x))


def times_itself(x: Tensor) -> Tensor:
    x *= torch.sigmoid(x)
    return x


RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: x.clamp_min_(0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "threshold": lambda x: torch.threshold(x, 0.0, 0.0),
    "max": lambda x: torch.max(torch.tensor(0.0), x),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "setitem": assigned,
    "masked_fill": lambda x: x.masked_fill(~(x > 0), 0),
    "mul": lambda x: x * (x > 0).to(x.dtype),
    "add": lambda x: (x + x.abs()) / 2,
    "pow": lambda x: F.relu(x) ** 2,
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky": lambda x: torch.where(x > 0, x, 0.1 * x),
    "picked": picked,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_new": gelu_new,
    "hardswish": lambda x: x * F.relu6(x + 3) / 6,
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "swish in place": times_itself,
    "srelu": srelu,
    "sin": torch.sin,
    "square": lambda x: x**2,
    "one over": lambda x: 1 / (1 + torch.exp(-x)),
}


class Net(nn.Module):
    """A convolution, a norm, and a linear layer on positions, each with the activation function behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.linear, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.function(self.norm(self.conv(x)))
        return first, self.function(self.linear(first.flatten(2).transpose(1, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x)[1].mean(1))


def network(function: Callable[[Tensor], Tensor]) -> tuple[Net, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    net = Net(function).eval()
    with torch.no_grad():
        net.norm.bias[2] = net.linear.bias[1] = -40.0
    return net, [(torch.randn(8, 3, 6, 6), torch.arange(8) % 4) for _ in range(3)]


def by_hand(net: Net, batches) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By layer, values behind the function ``(neuron, value)``, and Fisher information per sample."""
    values: dict[str, list[Tensor]] = {"conv": [], "linear": []}
    fisher: dict[str, list[Tensor]] = {"conv": [], "linear": []}
    for x, y in batches:
        first = net.function(net.norm(net.conv(x)))
        second = net.function(net.linear(first.flatten(2).transpose(1, 2)))
        loss = F.cross_entropy(net.head(second.mean(1)), y, reduction="sum")
        for name, value, g in zip(values, (first, second), torch.autograd.grad(loss, [first, second]), strict=True):
            axis = 1 if name == "conv" else 2
            values[name].append(value.detach().movedim(axis, 0).flatten(1))
            fisher[name].append((value.detach() * g).movedim(axis, 1).flatten(2).sum(2).square())
    return (
        {name: torch.cat(found, 1).double() for name, found in values.items()},
        {name: torch.cat(found).double().mean(0) / 2 for name, found in fisher.items()},
    )


@for_each("name", [*RECTIFIERS, *OTHERS])
def test_values_are_those_behind_the_function(name):
    net, batches = network({**RECTIFIERS, **OTHERS}[name])
    values, fisher = by_hand(net, batches)
    criteria = ["mean", "rms", "fisher", *["apoz"] * (name in RECTIFIERS)]
    report = measure(net, batches, criteria=criteria, loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    layers = {layer.name: layer for layer in report.layers}
    for layer in values:
        assert layers[layer].rectified == (name in RECTIFIERS)
        assert not layers[layer].note
        close = {"rtol": 1e-3, "atol": 1e-5 * values[layer].abs().max().item(), "check_dtype": False}
        torch.testing.assert_close(report.scores["mean"][layer], values[layer].mean(1), **close)
        torch.testing.assert_close(report.scores["rms"][layer], values[layer].square().mean(1).sqrt(), **close)
        scale = fisher[layer].max().item()
        torch.testing.assert_close(
            report.scores["fisher"][layer], fisher[layer], rtol=1e-3, atol=1e-4 * scale, check_dtype=False
        )
        if name in RECTIFIERS:
            zeros = (values[layer] == 0).double().mean(1)
            torch.testing.assert_close(report.deadness_by["apoz"][layer], zeros, atol=1e-6, rtol=0, check_dtype=False)


class Chain(nn.Module):
    """A layer and whatever follows."""

    def __init__(self, layer: nn.Module, then: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.then = layer, then
        self.norm, self.other = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.scale, self.layer_norm = nn.Parameter(torch.rand(4)), nn.LayerNorm(4)
        self.register_buffer("shift", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.layer(x))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.relu(x) * 2

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


POINTS = {
    "frozen norm": (lambda m, x: F.relu(x * m.scale + m.shift), "layer > mul > add > relu"),
    "layer scale": (lambda m, x: m.scale * F.gelu(x), "layer > gelu > mul"),
    "a norm and back": (
        lambda m, x: F.relu(m.norm(x.transpose(1, 2)).transpose(1, 2)), "layer > batch_norm (norm) > relu"
    ),
    "a norm over tokens": (
        lambda m, x: F.relu(m.norm(x.flatten(0, 1)).reshape_as(x)), "layer > batch_norm (norm) > relu"
    ),
    "logged": (lambda m, x: F.relu(x) + 0 * x.detach().abs().mean().item(), "layer > relu > add"),
    "halves": (lambda m, x: x[..., :2] * torch.sigmoid(x[..., 2:]), "layer"),
    "two layers": (lambda m, x: x * torch.sigmoid(m.other(x)), "layer"),
    "a residual sum": (lambda m, x: F.relu(F.relu(x) + m.other(x).mean()), "layer"),
    "softmax": (lambda m, x: torch.relu(x.softmax(-1)), "layer"),
    "a norm behind": (lambda m, x: m.layer_norm(x * torch.sigmoid(x)), "layer > mul(sigmoid)"),
    "rms norm": (lambda m, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * m.scale, "layer"),
}  # fmt: skip


@for_each("name", POINTS)
def test_where_the_chain_ends(name):
    then, point = POINTS[name]
    assert find_neurons(Chain(nn.Linear(3, 4), then), torch.randn(2, 5, 3))[0].activation_point == point


def test_the_axis_is_that_of_the_activation_point():
    net = Chain(nn.Conv2d(3, 4, 1), lambda m, x: m.layer_norm(x.permute(0, 2, 3, 1)).square())
    (layer, *_) = find_neurons(net, torch.randn(2, 3, 5, 6))
    assert (layer.activation_point, layer.axis) == ("layer > layer_norm (layer_norm) > square", -1)


@for_each(
    "then, note",
    [
        (lambda m, x: torch.cat([F.relu(x), F.relu(-x)], -1), "its values go to relu and neg, which do not reunite"),
        (lambda m, x: F.relu(F.max_pool1d(x, 2)), "its values are pooled before they go to relu"),
        (lambda m, x: Doubled.apply(x), "its values go on to an autograd function"),
    ],
)
def test_a_layer_says_where_its_chain_cannot_be_followed(then, note):
    assert find_neurons(Chain(nn.Conv1d(3, 4, 1), then), torch.randn(2, 3, 4))[0].note.startswith(note)
