"""The same numbers as captum."""

import captum.attr
import torch

from lightning_neurons import saliency
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each

TARGETS = {"one class": 0, "a class per sample": [0, 3, 1, 2, 2]}


def question(target):
    x = pictures(5)[0]
    told = TARGETS[target] if isinstance(TARGETS[target], int) else torch.tensor(TARGETS[target])
    return seeded(ConvNet), x, TARGETS[target], told


def same(found, expected):
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert bool(found.any())


@for_each("target", TARGETS)
def test_gradient(target):
    net, x, ours, theirs = question(target)
    expected = captum.attr.Saliency(net).attribute(x.clone().requires_grad_(), theirs, abs=False)
    same(saliency(net, x, ours), expected)
    expected = captum.attr.Saliency(net).attribute(x.clone().requires_grad_(), theirs)
    same(saliency(net, x, ours, absolute=True), expected)


@for_each("target", TARGETS)
def test_grad_x_input(target):
    net, x, ours, theirs = question(target)
    expected = captum.attr.InputXGradient(net).attribute(x.clone().requires_grad_(), theirs)
    same(saliency(net, x, ours, method="grad_x_input"), expected)


@for_each("target", TARGETS)
@for_each("steps", [2, 16, 50])
@for_each("baseline", [None, 0.4])
def test_integrated_gradients(target, steps, baseline):
    net, x, ours, theirs = question(target)
    expected = captum.attr.IntegratedGradients(net).attribute(
        x, baselines=baseline or 0, target=theirs, n_steps=steps, method="riemann_middle"
    )
    same(saliency(net, x, ours, method="integrated_gradients", steps=steps, baseline=baseline), expected.float())


def test_integrated_gradients_that_are_complete_are_those_of_many_steps():
    net, x, ours, theirs = question("one class")
    expected = captum.attr.IntegratedGradients(net).attribute(
        x, target=theirs, n_steps=3000, method="riemann_middle", internal_batch_size=500
    )
    found = saliency(net, x, ours, method="integrated_gradients")
    assert float((found - expected).norm() / expected.norm()) < 0.01


@for_each("target", TARGETS)
@for_each("layer, module", [("conv2", "act"), ("conv2", "bn2")])
def test_grad_cam(target, layer, module):
    net, x, ours, theirs = question(target)
    if module == "bn2":  # what is not rectified is the activation point of a network without the rectifier
        net.act = torch.nn.Identity()
    theirs = captum.attr.LayerGradCam(net, getattr(net, module)).attribute(x, theirs, relu_attributions=True)
    expected = captum.attr.LayerAttribution.interpolate(theirs, (8, 8), "bilinear")
    same(saliency(net, x, ours, method="grad_cam", layer=layer), expected.expand(x.shape))


@for_each("neuron", [0, 4])
def test_the_gradient_of_a_neuron(neuron):
    net, x, _, _ = question("one class")
    gradient = captum.attr.NeuronGradient(net, net.fc2).attribute(x.clone().requires_grad_(), neuron % 4)
    same(saliency(net, x, ("fc2", neuron % 4)), gradient)
