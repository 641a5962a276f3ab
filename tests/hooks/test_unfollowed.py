"""Chains that are followed through transposes and detached values, and those that cannot be, which is said."""

import warnings
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import find_neurons, measure
from tests.tables import for_each

MEAN, SCALE = torch.linspace(-0.1, 0.1, 8), torch.linspace(0.5, 2, 8).view(1, 8)


@torch.library.custom_op("test_unfollowed::rectify", mutates_args=())
def rectify(x: Tensor) -> Tensor:
    return x.clamp(min=0)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    script_relu = torch.jit.script(F.relu)


def shuffled(x: Tensor) -> Tensor:
    return F.relu(x.view(-1, 2, 4).transpose(1, 2).contiguous().view(x.shape))


def overwritten(x: Tensor) -> Tensor:
    x.data.clamp_(min=0)
    return x


def logged(x: Tensor) -> Tensor:
    x.detach().chunk(2, -1)[0].sigmoid().mean()
    x.detach().abs().max()
    return torch.relu(x)


FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda x: x.t().clamp(min=0).t(),
    "transpose": lambda x: F.relu(x.transpose(0, 1)).transpose(0, 1).contiguous(),
    "T": lambda x: torch.tanh(x.T).mT,
    "sign": lambda x: x.clamp(-1, 1) + (torch.sign(x) - x.clamp(-1, 1)).detach(),
    "relu": lambda x: (F.relu(x) - x).detach() + x,
    "data": lambda x: x + (F.relu(x) - x).data,
    "mask": lambda x: x * (x.detach() > 0).float(),
    "stopped": lambda x: x.detach().clamp(min=0),
    "logged": logged,
    "as another": lambda x: F.relu(x.view_as(torch.zeros(16, 8))),
    "in another form": lambda x: F.relu(x.view_as(torch.zeros(16, 1, 8))).view_as(x),
    "of ATen": lambda x: torch.ops.aten.relu_.default(torch.ops.aten.mul(x, 2.0)),
    "less a mean": lambda x: F.relu(x - MEAN),
    "like the layer": lambda x: F.relu(x * SCALE.to(x) - MEAN.view(1, -1).to(x)),
    "addcmul": lambda x: F.relu(torch.addcmul(MEAN, SCALE, x)),
    "quantized": lambda x: torch.fake_quantize_per_tensor_affine(F.relu(x), 0.1, 0, 0, 255),
}
SAID: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "chunk": (lambda x: torch.cat([part.clamp(min=0) for part in x.chunk(2, -1)], -1), "chunk and then to clamp"),
    "gated": (lambda x: x[:, :4].repeat(1, 2) * torch.sigmoid(x[:, 4:].repeat(1, 2)), "getitem and then to sigmoid"),
    "samples": (lambda x: torch.stack([row.relu() for row in x]), "unbind and then to relu"),
    "maxout": (lambda x: torch.stack([x, torch.zeros_like(x)]).amax(0), "stack and then to amax"),
    "flat": (lambda x: F.relu(x.flatten()).view_as(x), "flatten and then to relu"),
    "merged": (lambda x: F.relu(x.view(-1, 2)).view(x.shape), "view and then to relu"),
    "bits": (lambda x: x.view(torch.int32).view(torch.float32).relu(), "view and then to relu"),
    "flip": (lambda x: x.flip(-1).clamp(min=0).flip(-1), "flip and then to clamp"),
    "largest": (lambda x: x * (x >= x.topk(3, -1).values[:, -1:]), "topk"),
    "norm": (lambda x: x / x.norm(dim=-1, keepdim=True), "norm"),
    "glu": (lambda x: F.glu(x, -1).repeat(1, 2), "glu"),
    "vmap": (torch.func.vmap(lambda row: row.clamp(min=0)), "a transform of torch.func"),
    "data": (overwritten, "autograd's back"),
    "mean of the batch": (lambda x: F.relu(x - x.mean(0)), "mean"),
    "pixel shuffle": (
        lambda x: F.pixel_shuffle(x.view(-1, 8, 1, 1), 2).relu().flatten(1),
        "pixel_shuffle and then to relu",
    ),
    "channel shuffle": (
        lambda x: F.channel_shuffle(x.view(-1, 8, 1), 2).relu().flatten(1),
        "channel_shuffle and then to relu",
    ),
    "shuffled by hand": (shuffled, "view and then to relu"),
    "strided": (lambda x: x.as_strided(x.shape, x.stride()).relu(), "as_strided and then to relu"),
    "turned": (lambda x: x.rot90(2, (0, 1)).relu(), "rot90 and then to relu"),
    "padded": (lambda x: F.relu(F.pad(x, (0, 1)))[:, :8], "pad and then to relu"),
    "complex": (
        lambda x: torch.view_as_real(torch.view_as_complex(x.view(-1, 4, 2))).relu().flatten(1),
        "view and then",
    ),
    "levels": (lambda x: torch.bucketize(x, torch.linspace(-1, 1, 5)).float(), "bucketize"),
    "mask of numpy": (lambda x: x * torch.from_numpy(np.sign(x.detach().numpy())), "numpy or plain Python"),
    "in numpy": (lambda x: torch.from_numpy(np.maximum(x.numpy(force=True), 0)), "numpy or plain Python"),
    "in Python": (lambda x: x.detach().clone().apply_(lambda value: max(value, 0.0)), "numpy or plain Python"),
    "script": (script_relu, "TorchScript"),
    "gate in a script": (lambda x: x * script_relu(x), "TorchScript"),
    "nowhere": (lambda x: torch.ones(len(x), 8), "cannot be looked into, or to nothing"),
    "blurred": (
        lambda x: F.conv1d(x[..., None], torch.ones(8, 1, 3), padding=1, groups=8).relu()[..., 0],
        "conv1d and then to relu",
    ),
    "operation": (rectify, "the operation test_unfollowed.rectify.default of somebody's own"),
}


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.layer, self.head = function, nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.layer(x)))


def network(function: Callable[[Tensor], Tensor]) -> tuple[Net, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    net = Net(function).eval()
    with torch.no_grad():
        net.layer.bias[1] = -40.0
    return net, [(torch.randn(16, 5), torch.arange(16) % 3) for _ in range(2)]


def by_hand(net: Net, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and Taylor score of every neuron's value behind the function."""
    values, scores = [], []
    for x, y in batches:
        value = net.function(net.layer(x)).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net.head(value), y, reduction="sum"), value)
        values.append(value.detach())
        scores.append((value.detach() * gradient).abs())
    return torch.cat(values).double().mean(0), torch.cat(scores).double().mean(0)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@for_each("name", FOLLOWED)
def test_transposes_and_detached_values_are_followed(name):
    net, batches = network(FOLLOWED[name])
    mean, taylor = by_hand(net, batches)
    report = measure(net, batches, criteria=["mean", "taylor", "near_zero"], loss_fn=loss)
    torch.testing.assert_close(report.scores["mean"]["layer"].double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(report.scores["taylor"]["layer"].double(), taylor, rtol=1e-4, atol=1e-6)
    assert not any("followed" in note or "reunite" in note for note in report.notes)
    is_rectified = name not in ("T", "sign")
    assert {layer.name: layer.rectified for layer in report.layers}["layer"] == is_rectified
    assert report.dead("layer").tolist() == [is_rectified and neuron == 1 for neuron in range(8)]


@for_each("name", SAID)
def test_what_cannot_be_followed_is_said_in_the_report(name):
    function, words = SAID[name]
    net, batches = network(function)
    mean = torch.cat([net.layer(x).detach() for x, _ in batches]).double().mean(0)
    report = measure(net, batches, criteria=["mean", "near_zero"], loss_fn=loss)
    torch.testing.assert_close(report.scores["mean"]["layer"].double(), mean, rtol=1e-4, atol=1e-6)
    (note,) = [note for note in report.notes if note.startswith("layer: ")]
    assert words in note


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_module_in_torchscript_is_said_in_the_report():
    net, batches = network(torch.jit.trace(nn.ReLU(), torch.zeros(16, 8)))
    (note,) = [note for note in measure(net, batches, criteria=["mean"]).notes if note.startswith("layer: ")]
    assert "go on to TorchScript" in note


def test_data_that_are_as_wide_as_a_layer_are_no_constant():
    class Gated(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.layer(x) * x.mean(0).repeat(2)[:8]))

    layers = find_neurons(Gated(F.relu), torch.randn(16, 5))
    assert layers[0].activation_point == "layer"


def test_what_goes_wrong_while_a_call_is_followed_ends_the_chain_alone():
    net, batches = network(F.relu)
    with patch("lightning_neurons.hooks.trace.place_behind", side_effect=LookupError):
        report = measure(net, batches, criteria=["mean"])
    mean = torch.cat([net.layer(x).detach() for x, _ in batches]).double().mean(0)
    torch.testing.assert_close(report.scores["mean"]["layer"].double(), mean, rtol=1e-4, atol=1e-6)
    assert {layer.name: layer.activation_point for layer in report.layers}["layer"] == "layer"


class Attends(nn.Module):
    """Heads, a residual sum, a gate and pooling: other layers' values come in, or nothing more is done to a neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.gate, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        attention = (q @ k.mT / 2).softmax(-1) @ v
        hidden = self.out(attention.transpose(1, 2).flatten(2)) + x
        hidden = hidden * torch.sigmoid(self.gate(hidden.mean(1, keepdim=True)))
        return self.head(hidden.amax(1))


def test_nothing_is_said_where_no_more_is_done_to_a_neuron():
    net = Attends()
    batches = [(torch.randn(4, 6, 8), torch.arange(4) % 3)]
    report = measure(net, batches, criteria=["mean"])
    assert {layer.name: layer.note for layer in report.layers} == dict.fromkeys(("qkv", "out", "gate", "head"), "")
    assert report.notes == ("measured on 4 samples",)


def test_layers_with_the_same_words_are_named_together():
    net = nn.Sequential(*(Net(SAID["flip"][0]) for _ in range(7)))
    for one in net:
        one.head = nn.Linear(8, 5)
    report = measure(net, [torch.randn(4, 5)], criteria=["mean"])
    (note,) = [note for note in report.notes if "flip" in note]
    assert note.startswith("0.layer, 1.layer, 2.layer, 3.layer, 4.layer and 2 more layers: ")
