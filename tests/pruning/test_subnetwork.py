"""From the neurons of a sub-network to a network that has no others."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lightning_neurons import ArgumentError, PruningPlan, UnknownNameError, class_study, plan_keeping, prune
from tests.models import pictures, seeded
from tests.pruning.nets import NETS, ResNet, Vgg, net_and_inputs
from tests.tables import for_each

X, Y = pictures(16, double=True)
KEPT = {"features.0": [1, 3], "features.4": [0, 2, 5], "features.7": [4], "classifier.0": [0, 1, 6]}
FINAL = {
    "features.0": "features.2",
    "features.4": "features.6",
    "features.7": "features.9",
    "classifier.0": "classifier.1",
}


def silenced(net: nn.Module, kept: dict[str, list[int]], final: dict[str, str]) -> nn.Module:
    """A copy in which all other neurons give 0."""
    net = copy.deepcopy(net)
    for layer, indices in kept.items():

        def hook(module, inputs, output, indices=indices):
            mask = torch.zeros(output.shape[1], dtype=output.dtype)
            mask[indices] = 1
            return output * mask.view(1, -1, *[1] * (output.ndim - 2))

        net.get_submodule(final[layer]).register_forward_hook(hook)
    return net


@for_each("layers", [[*KEPT], ["features.4"], ["classifier.0", "features.0"]])
def test_the_smaller_network_answers_as_the_silenced_one(layers):
    net, kept = seeded(Vgg, double=True), {layer: KEPT[layer] for layer in layers}
    with torch.no_grad():
        expected = silenced(net, kept, FINAL)(X)
    plan = plan_keeping(net, X[:2], kept)
    widths = {"features.0": 4, "features.4": 6, "features.7": 5, "classifier.0": 8}
    assert {layer: sorted({*range(widths[layer])} - {*gone}) for layer, gone in plan.neurons.items()} == kept
    report = prune(net, X[:2], plan, compensation="none")
    with torch.no_grad():
        torch.testing.assert_close(net(X), expected, rtol=1e-5, atol=1e-5)
    assert all(report.widths[layer] == len(indices) for layer, indices in kept.items())
    assert report.cost.macs_after < report.cost.macs
    assert report.cost.parameters_after == sum(p.numel() for p in net.parameters())


def test_planning_only_reads():
    net = seeded(Vgg, double=True).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    assert plan_keeping(net, X[:2], KEPT).neurons == plan_keeping(net, X[:2], KEPT).neurons
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_coupled_neurons_stay_while_one_of_them_is_kept():
    net = seeded(lambda: ResNet(projection=True), double=True)
    coupled = ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
    kept = {"conv1": [0], "layer1.0.conv2": [2], "layer1.1.conv2": [0], "layer1.0.conv1": [3]}
    plan = plan_keeping(net, X[:2], kept)
    for layer in coupled:
        assert plan.neurons[layer] == (1, 3)
    assert plan.neurons["layer1.0.conv1"] == (0, 1, 2)
    prune(net, X[:2], plan, compensation="none")
    assert net.layer1[1].conv2.out_channels == 2
    assert net(X).shape == (16, 4)


def test_a_coupled_layer_that_is_not_named_keeps_all():
    net = seeded(lambda: ResNet(projection=True), double=True)
    plan = plan_keeping(net, X[:2], {"conv1": [0], "layer1.0.conv2": [0], "layer1.1.conv1": [2]})
    assert {layer: gone for layer, gone in plan.neurons.items() if gone} == {"layer1.1.conv1": (0, 1, 3)}
    assert any("stays whole" in note for note in plan.notes)


def test_where_coupled_layers_keep_everything_between_them_nothing_goes_and_it_is_said():
    net = seeded(lambda: ResNet(projection=True), double=True)
    kept = {"conv1": [0, 1], "layer1.0.conv2": [2], "layer1.1.conv2": [3], "layer1.0.conv1": [1]}
    plan = plan_keeping(net, X[:2], kept)
    assert {layer for layer, gone in plan.neurons.items() if gone} == {"layer1.0.conv1"}
    assert any("conv1" in note and "stays whole" in note for note in plan.notes)


def test_the_output_layer_cannot_be_cut_and_stays_with_a_note():
    net = seeded(Vgg, double=True)
    plan = plan_keeping(net, X[:2], {"classifier.3": [0, 1], "features.4": [1]})
    assert {layer: gone for layer, gone in plan.neurons.items() if gone} == {"features.4": (0, 2, 3, 4, 5)}
    assert any("classifier.3" in note and "stays whole" in note for note in plan.notes)


@for_each("name", NETS)
def test_every_kind_of_network_becomes_smaller_and_runs(name):
    net, x = net_and_inputs(name)
    widths = {n: len(m.weight) for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    plan = plan_keeping(net, x, {layer: range((width + 1) // 2) for layer, width in widths.items()})
    assert plan
    shape = net(x).shape
    report = prune(net, x, plan, compensation="none")
    assert net(x).shape == shape
    assert report.cost.macs_after < report.cost.macs
    for layer, gone in plan.neurons.items():
        assert layer not in widths or min(gone, default=widths[layer]) >= (widths[layer] + 1) // 2


def test_keeping_everything_removes_nothing():
    net = seeded(Vgg, double=True)
    plan = plan_keeping(net, X[:2], {"features.0": range(4), "features.4": range(6)})
    assert not plan
    assert isinstance(plan, PruningPlan)


@for_each("classes", [0, [1, 3]])
@for_each("make", [Vgg, lambda: ResNet(projection=False), NETS["LeNet"]])
def test_the_sub_network_of_classes_becomes_a_network(make, classes):
    net = seeded(make, double=True)
    report = class_study(net, [(X, Y)], share=0.4)
    result = prune(net, X[:2], plan_keeping(net, X[:2], report.subnetwork(classes)), compensation="none")
    assert result.cost.macs_after < result.cost.macs
    logits = net(X)
    assert logits.shape == (16, 4)
    F.cross_entropy(logits, Y).backward()
    inside = report.subnetwork(classes)
    assert all(result.widths[layer] >= len(inside[layer]) for layer in inside)


def test_a_plain_network_has_the_accuracy_that_the_study_measured():
    net = seeded(NETS["LeNet"], double=True)
    report = class_study(net, [(X, Y)], share=0.5)
    for klass in report.classes:
        smaller = copy.deepcopy(net)
        prune(smaller, X[:2], plan_keeping(smaller, X[:2], report.subnetwork(klass)), compensation="none")
        with torch.no_grad():
            right = smaller(X).argmax(1) == Y
        assert report.accuracy("subnetwork", klass).on_all == pytest.approx(right.double().mean().item())


WRONG = {
    "no module": ({"model": Vgg}, ArgumentError, "an instance, not its class"),
    "an unknown layer": ({"kept": {"features.O": [0]}}, UnknownNameError, "features.0"),
    "a neuron too many": ({"kept": {"features.0": [4]}}, ArgumentError, "features.0"),
    "a negative neuron": ({"kept": {"features.0": [-1]}}, ArgumentError, "features.0"),
    "a neuron twice": ({"kept": {"features.0": [1, 1]}}, ArgumentError, "features.0"),
    "a layer that keeps nothing": (
        {"kept": {"features.0": [1], "features.4": []}}, ArgumentError, r"kept\['features.4'\]=\[\] .* at least one"
    ),
    "a list": ({"kept": [1, 2]}, ArgumentError, "a mapping of layers"),
    "a word": ({"kept": {"features.0": "all"}}, ArgumentError, "features.0"),
    "a whole plan": ({"kept": PruningPlan({"features.0": (1,)})}, ArgumentError, "a mapping of layers"),
}  # fmt: skip


@for_each("name", WRONG)
def test_bad_input(name):
    options, error, said = WRONG[name]
    given = {"model": seeded(Vgg, double=True), "kept": KEPT, **options}
    with pytest.raises(error, match=said):
        plan_keeping(given["model"], X[:2], given["kept"])
