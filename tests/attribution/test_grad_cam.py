"""Maps of layers against twins with hooks, autograd and interpolation."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import ArgumentError, MeasurementError, UnknownNameError, activation_map, saliency
from tests.models import NETS, ConvNet, pictures, seeded
from tests.tables import for_each

CONVOLUTIONS = [
    (name, layer)
    for name, make in NETS.items()
    for layer, module in make().named_modules()
    if isinstance(module, nn.Conv2d)
]
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def cam(score, activation, shape):
    """Grad-CAM sample by sample and channel by channel."""
    gradient = torch.autograd.grad(score.sum(), activation)[0]
    maps = []
    for a, g in zip(activation, gradient, strict=True):
        total = sum(channel * slope.mean() for channel, slope in zip(a, g, strict=True))
        maps.append(total.clamp_min(0)[None])
    space = shape[2:]
    resized = F.interpolate(torch.stack(maps), tuple(space), mode=MODES[len(space)], align_corners=False)
    return resized.detach().expand(shape)


def hooked(model, module, x):
    """The output of the model and what a module of it returned."""
    kept = []
    handle = module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    out = model(x)
    handle.remove()
    return out, kept[-1]


def stack(dimensions):
    convolution, pool = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"MaxPool{dimensions}d")
    return nn.Sequential(
        convolution(2, 4, 3, padding=1), nn.ReLU(), pool(2), convolution(4, 6, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


@for_each("net, layer", CONVOLUTIONS)
@for_each("of", ["logit", "probability", "loss"])
def test_it_is_that_of_autograd_at_the_activation_point(net, layer, of):
    model, (x, _) = seeded(NETS[net], double=True), pictures(3, double=True)
    activations, logits = model.by_hand(x)
    score = {"logit": logits, "probability": logits.softmax(1), "loss": -logits.log_softmax(1)}[of][:, 1]
    found = saliency(model, x, 1, method="grad_cam", layer=layer, of=of)
    torch.testing.assert_close(found, cam(score, activations[layer][-1], x.shape))
    assert bool((found >= 0).all())


def test_it_is_that_of_a_hook_on_the_activation_module():
    model, (x, labels) = seeded(ConvNet, double=True), pictures(6, double=True)
    logits, activation = hooked(model, model.act, x)
    expected = cam(logits[torch.arange(6), labels], activation, x.shape)
    torch.testing.assert_close(saliency(model, x, labels, method="grad_cam", layer="conv2"), expected)
    assert bool(expected.any())


@for_each("dimensions", [1, 2, 3])
def test_it_works_with_any_number_of_axes(dimensions):
    model, x = stack(dimensions), torch.randn(3, 2, *range(6, 6 + dimensions))
    model(x)
    for layer, module in (("0", model[1]), ("3", model[4])):
        logits, activation = hooked(model, module, x)
        found = saliency(model, x, 2, method="grad_cam", layer=layer)
        torch.testing.assert_close(found, cam(logits[:, 2], activation, x.shape))
    assert torch.equal(saliency(model, x, 2, method="grad_cam"), found)


def test_a_neuron_can_be_looked_at_through_a_layer_in_front_of_it():
    model, (x, _) = seeded(ConvNet, double=True), pictures(3, double=True)
    activations, _ = model.by_hand(x)
    expected = cam(activations["fc1"][-1][:, 4], activations["conv1"][-1], x.shape)
    torch.testing.assert_close(saliency(model, x, ("fc1", 4), method="grad_cam", layer="conv1"), expected)


@for_each("target", ["conv2", ("conv2", 1)])
def test_a_layer_can_be_looked_at_through_itself(target):
    model, (x, _) = seeded(ConvNet, double=True), pictures(3, double=True)
    activation = model.by_hand(x)[0]["conv2"][-1]
    score = activation.flatten(2).mean((1, 2)) if target == "conv2" else activation[:, 1].mean((1, 2))
    found = saliency(model, x, target, method="grad_cam", layer="conv2")
    torch.testing.assert_close(found, cam(score, activation, x.shape))


@for_each("net", ["convolutional", "residual", "residual in place", "relu as a statement"])
def test_the_last_convolution_is_taken_unless_told(net):
    model, (x, _) = seeded(NETS[net]), pictures(3)
    last = [layer for name, layer in CONVOLUTIONS if name == net][-1]
    told = saliency(model, x, 0, method="grad_cam", layer=last)
    assert torch.equal(saliency(model, x, 0, method="grad_cam"), told)


class OutOfOrder(nn.Module):
    """Registers its last convolution first."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early, self.head = nn.Conv2d(4, 5, 3), nn.Conv2d(3, 4, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.late(torch.relu(self.early(x)))).mean((2, 3)))


def test_the_last_convolution_is_the_last_to_run():
    model, (x, _) = seeded(OutOfOrder), pictures(3)
    told = saliency(model, x, 0, method="grad_cam", layer="late")
    assert torch.equal(saliency(model, x, 0, method="grad_cam"), told)


def test_maps_have_the_shape_of_the_inputs_and_no_channels_of_their_own():
    model, (x, _) = seeded(ConvNet), pictures(70)
    found = saliency(model, x, method="grad_cam", smoothing=0.7)
    assert found.shape == x.shape
    assert torch.equal(found[:, 0], found[:, 2])
    found[0, 0, 0, 0] = -7  # memory of its own
    assert float(found[0, 1, 0, 0]) != -7


def test_a_layer_behind_the_target_is_refused():
    with pytest.raises(MeasurementError, match=r"layer: conv1 2 does not depend on conv2; take one in front"):
        saliency(seeded(ConvNet), pictures(2)[0], ("conv1", 2), method="grad_cam")


@for_each("net, layer", CONVOLUTIONS)
@for_each("neuron", [None, 0, 4])
def test_where_a_neuron_is_active(net, layer, neuron):
    model, (x, _) = seeded(NETS[net], double=True), pictures(70, double=True)
    with torch.no_grad():
        activation = model.by_hand(x)[0][layer][-1]
        chosen = sum(activation[:, i] for i in range(activation.shape[1])) / activation.shape[1]
        chosen = chosen if neuron is None else activation[:, neuron]
        expected = F.interpolate(chosen[:, None], (8, 8), mode="bilinear", align_corners=False)[:, 0]
    found = activation_map(model, x, layer, neuron)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


@for_each("dimensions", [1, 2, 3])
def test_where_a_neuron_is_active_along_any_number_of_axes(dimensions):
    model, x = stack(dimensions), torch.randn(3, 2, *range(6, 6 + dimensions))
    _, activation = hooked(model, model[4] if model(x) is not None else None, x)
    expected = F.interpolate(activation[:, 2:3], x.shape[2:], mode=MODES[dimensions], align_corners=False)[:, 0]
    torch.testing.assert_close(activation_map(model, x, "3", 2), expected.detach())


@for_each("wrap", [lambda x: (x,), lambda x: {"x": x}])
def test_inputs_of_any_form_have_maps(wrap):
    model, (x, _) = seeded(ConvNet), pictures(3)
    assert torch.equal(activation_map(model, wrap(x), "conv1", 2), activation_map(model, x, "conv1", 2))
    found = saliency(model, wrap(x), 1, method="grad_cam")
    assert torch.equal(found, saliency(model, x, 1, method="grad_cam"))


REFUSED = {
    "unknown": ("conv9", None, UnknownNameError, "layer: .*'conv9'.*'conv"),
    "neuron too large": ("conv1", 6, ArgumentError, "neuron=.*0 to 5"),
    "neuron negative": ("conv1", -1, ArgumentError, "neuron=.*0 to 5"),
    "fraction of a neuron": ("conv1", 1.5, ArgumentError, "neuron=1.5.*0 to 5"),
    "no positions": ("fc1", None, ArgumentError, "layer='fc1'.*convolution"),
    "number": (3, None, ArgumentError, "layer=3.*name of a layer"),
    "pair": (("conv1", 1), None, ArgumentError, "layer=.*name of a layer"),
}


@for_each("case", REFUSED)
def test_a_map_of_something_else_is_refused(case):
    layer, neuron, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        activation_map(seeded(ConvNet), pictures(2)[0], layer, neuron)


def test_a_map_needs_pictures_and_a_model():
    with pytest.raises(ArgumentError, match=r"inputs=.*images"):
        activation_map(seeded(ConvNet), torch.rand(2, 3), "conv1")
    with pytest.raises(MeasurementError, match=r"ConvNet refuses inputs of shape \(2, 3, 9, 12\): RuntimeError: .*"):
        activation_map(seeded(ConvNet), torch.rand(2, 3, 9, 12), "fc1")


LAYERS = {
    "unknown": ("conv3", UnknownNameError, r"layer: nothing matches 'conv3'.*'conv"),
    "no positions": ("fc1", ArgumentError, r"layer='fc1' .*positions.*convolution"),
    "number": (3, ArgumentError, r"layer=3 .*name of a layer"),
    "pair": (("conv1", 2), ArgumentError, r"layer=.*name of a layer"),
    "list": (["conv1"], ArgumentError, r"layer=.*name of a layer"),
    "silent": ("spare", ArgumentError, r"layer='spare' .*runs"),
}


@for_each("case", LAYERS)
def test_a_layer_that_grad_cam_cannot_take(case):
    layer, kind, words = LAYERS[case]
    model = seeded(ConvNet)
    model.spare = nn.Conv2d(3, 3, 3)
    with pytest.raises(kind, match=words):
        saliency(model, pictures(3)[0], 1, method="grad_cam", layer=layer)


def test_grad_cam_needs_a_convolution():
    with pytest.raises(MeasurementError, match=r"grad_cam needs a layer with positions, a convolution"):
        saliency(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), pictures(3)[0], 1, method="grad_cam")


def test_an_empty_batch_has_no_maps():
    with pytest.raises(ArgumentError, match=r"inputs=\(0, 3, 8, 8\) .*at least one sample"):
        activation_map(seeded(ConvNet), pictures(2)[0][:0], "conv1")


def test_a_class_is_no_model():
    with pytest.raises(ArgumentError, match=r"model=.*instance"):
        activation_map(ConvNet, pictures(2)[0], "conv1")
