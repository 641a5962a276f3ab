"""Trained networks on real pictures. Collected only where the data are at hand."""

import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import find_neurons, measure
from lightning_neurons.criteria.deadness import SILENT
from lightning_neurons.layers.layer import candidates
from lightning_neurons.measurement.passes import Passes
from tests.conftest import REAL_DATA

COLLECTED = (REAL_DATA / "mobilenet_v3_small.safetensors").is_file()
if COLLECTED and str(REAL_DATA) not in sys.path:
    sys.path.append(str(REAL_DATA))


def with_data(test):
    """The test where there are data; nothing that could be collected elsewhere."""
    return test if COLLECTED else None


@cache
def resnet() -> nn.Module:
    from cifar_resnet import cifar_resnet

    return cifar_resnet(20, str(REAL_DATA / "cifar_resnet20.safetensors"))


@cache
def mobilenet() -> nn.Module:
    from mobilenet_v3 import mobilenet_v3

    return mobilenet_v3("small", weights=str(REAL_DATA / "mobilenet_v3_small.safetensors"))


@cache
def cifar(count: int) -> tuple[Tensor, Tensor]:
    import lnn_data

    images, labels = lnn_data.load_cifar10("test", count)
    return lnn_data.to_tensor(images), torch.from_numpy(labels)


@cache
def imagenet(count: int) -> tuple[Tensor, Tensor]:
    import lnn_data

    images, labels = lnn_data.load_imagenet_sample(count)
    return lnn_data.to_tensor(images, lnn_data.TF_MEAN, lnn_data.TF_STD), torch.from_numpy(labels)


def cross_entropy(model, batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class GateSums:
    """A receiver that sums activation times gradient over samples and positions."""

    def __init__(self, model: nn.Module) -> None:
        self.modules, self.sums, self.layers = candidates(model), {}, {}

    def learn(self, layers) -> None:
        self.layers = dict(layers)

    def receive(self, layer, activation, gradient, need) -> None:
        self.sums[layer] = (activation.double() * gradient.double()).transpose(0, 1).flatten(1).sum(1)


HOMOGENEOUS = {None, "relu"}
"""Functions through which activation times gradient passes unchanged."""


def worst_gate_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[float, int]:
    """Over all layers that end in a norm or a rectified norm: sum(a g) against gamma dL/dgamma + beta dL/dbeta."""
    sums = GateSums(model)
    Passes(model, [sums]).differentiate(lambda b: F.cross_entropy(model(b[0]), b[1], reduction="sum"), batch)
    model.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1], reduction="sum").backward()
    modules, errors = dict(model.named_modules()), []
    for name, found in sums.sums.items():
        layer = sums.layers[name]
        if layer.chain and layer.chain[0].kind == "norm" and layer.activation in HOMOGENEOUS:
            norm = modules[layer.chain[0].module]
            expected = (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach().double()
            errors.append(float((found - expected).norm() / expected.norm()))
    model.zero_grad()
    return max(errors), len(errors)


@with_data
def test_every_layer_of_resnet20_is_found_with_its_activation_point():
    layers = find_neurons(resnet(), cifar(2)[0])
    points = {layer.name: layer.activation_point for layer in layers}
    expected = {"conv1": "conv1 > batch_norm (bn1) > relu (relu)", "linear": "linear"}
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            at = f"layer{stage}.{block}"
            expected[f"{at}.conv1"] = f"{at}.conv1 > batch_norm ({at}.bn1) > relu ({at}.relu1)"
            expected[f"{at}.conv2"] = f"{at}.conv2 > batch_norm ({at}.bn2)"  # a sum reads it
    assert points == expected
    assert sum(layer.neurons for layer in layers) == 16 + 6 * (16 + 32 + 64) + 10
    readers = {layer.name: layer.readers for layer in layers}
    assert readers["layer2.1.conv1"] == (("layer2.1.conv2", 1),)
    assert readers["conv1"] is readers["layer2.1.conv2"] is None


@with_data
def test_every_layer_of_mobilenet_is_found_with_its_activation_point():
    net = mobilenet()
    layers = {layer.name: layer for layer in find_neurons(net, imagenet(2)[0])}
    modules = dict(net.named_modules())
    assert list(layers) == [n for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 54
    names = {"ReLU": "relu", "Hardswish": "hardswish"}
    for name, layer in layers.items():
        path, _, last = name.rpartition(".")
        parent = modules[path]
        if last == "fc1":
            point = f"{name} > relu ({path}.activation)"
        elif last == "fc2":
            point = f"{name} > hardsigmoid ({path}.scale_activation)"
        elif path == "classifier":
            point = f"{name} > hardswish (classifier.1) > dropout (classifier.2)" if last == "0" else name
        else:
            point = f"{name} > batch_norm ({path}.1)"
            if len(parent) == 3:
                point += f" > {names[type(parent[2]).__name__]} ({path}.2)"
        assert layer.activation_point == point


@with_data
def test_activation_times_gradient_equals_the_gradients_of_the_norms():
    error, layers = worst_gate_error(resnet(), cifar(16))
    assert layers == 19
    assert error < 1e-4
    error, layers = worst_gate_error(mobilenet(), imagenet(8))
    assert layers == 16
    assert error < 1e-4


@with_data
def test_in_resnet20_exactly_the_rectified_neurons_that_never_fire_are_dead():
    x, y = cifar(128)
    net = resnet()
    report = measure(net, list(zip(x.split(48), y.split(48), strict=True)), loss_fn=cross_entropy)
    largest: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, i, out, name=name: largest.update({name: out.amax((0, 2, 3))}))
        for name, module in net.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    rectified = [layer for layer in report.layers if layer.rectified]
    assert len(rectified) == 10
    for layer in rectified:
        fires = largest[layer.chain[-1].module] > 0
        assert torch.equal(report.deadness_by["apoz"][layer.name] == 1, ~fires)
    for scores in report.scores["gradient"].values():
        assert scores.sum().item() == pytest.approx(1, abs=1e-5)


THRESHOLD, TOLERANCE = SILENT, 1e-3


def truth(net: nn.Module, blocks: tuple[str, ...], batches: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """By layer, on all positions of all pictures: which neurons are silent, zero, constant. Plain module hooks only."""
    modules = dict(net.named_modules())
    ends = {}
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d) and name.startswith(blocks):
            path, _, last = name.rpartition(".")
            end = {"fc1": "activation", "fc2": "scale_activation"}.get(last) or str(len(modules[path]) - 1)
            ends[name] = modules[f"{path}.{end}"]
    kept: dict[str, list[Tensor]] = {name: [] for name in ends}
    handles = [
        # (neuron, picture, position); one number per picture and position is small enough in two blocks.
        end.register_forward_hook(lambda m, i, out, name=name: kept[name].append(out.transpose(0, 1).flatten(1)))
        for name, end in ends.items()
    ]
    with torch.no_grad():
        for x in batches:
            net(x)
    for handle in handles:
        handle.remove()
    found: dict[str, dict[str, Tensor]] = {}
    for name, parts in kept.items():
        values = torch.cat(parts, 1).double()
        limit = THRESHOLD * values.square().mean().sqrt()
        spread, rms = values.std(1, correction=0), values.square().mean(1).sqrt()
        found[name] = {
            "silent": values.abs().amax(1) <= limit,
            "zero": values.amax(1) == 0,
            "constant": spread <= TOLERANCE * rms,
        }
    return found


@with_data
def test_dead_and_constant_neurons_of_two_mobilenet_blocks_are_exactly_those_found_by_hand():
    net, x = mobilenet(), imagenet(64)[0]
    batches = list(x.split(16))
    report = measure(net, batches, criteria=["near_zero", "apoz", "constant"], layers=["features.1.*", "features.7.*"])
    expected = truth(net, ("features.1.", "features.7."), batches)
    assert [layer.name for layer in report.layers] == list(expected)
    silent = {name: int(layer["silent"].sum()) for name, layer in expected.items() if layer["silent"].any()}
    constant = {name: int(layer["constant"].sum()) for name, layer in expected.items() if layer["constant"].any()}
    assert silent == {"features.1.block.1.fc1": 3, "features.7.block.2.fc1": 32}
    assert constant == silent | {"features.1.block.1.fc2": 16, "features.7.block.2.fc2": 120}
    for name, layer in expected.items():
        assert torch.equal(report.dead(name), layer["silent"]), name
        assert torch.equal(report.deadness_by["constant"][name] == 1, layer["constant"]), name
        if name in report.deadness_by["apoz"]:
            assert torch.equal(report.deadness_by["apoz"][name] == 1, layer["zero"]), name
