"""Gradients against finite differences, closed forms and loops."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from lightning_neurons import saliency
from tests.models import NETS, pictures, seeded
from tests.tables import for_each

EPSILON = 1e-6
METHODS = ("gradient", "grad_x_input", "integrated_gradients", "grad_cam")
LAYERS = [
    (name, layer)
    for name, make in NETS.items()
    for layer, module in make().named_modules()
    if isinstance(module, nn.Conv2d | nn.Linear)
]


def finite_differences(function, x):
    """Central differences of ``function``, which gives a number per row, at every single value of ``x``."""
    found = torch.zeros_like(x)
    with torch.no_grad():
        for i, sample in enumerate(x):
            offsets = EPSILON * torch.eye(sample.numel(), dtype=x.dtype).view(-1, *sample.shape)
            found[i] = ((function(sample + offsets) - function(sample - offsets)) / (2 * EPSILON)).view(sample.shape)
    return found


def convolutional(count=3):
    return seeded(NETS["convolutional"], double=True), pictures(count, double=True)[0]


OF = {
    "logit": lambda logits: logits,
    "probability": lambda logits: logits.exp() / logits.exp().sum(1, keepdim=True),
    "loss": lambda logits: -(logits.exp() / logits.exp().sum(1, keepdim=True)).log(),
}


@for_each("net", NETS)
@for_each("of", OF)
def test_a_class_has_the_gradient_of_finite_differences(net, of):
    model, (x, _) = seeded(NETS[net], double=True), pictures(2, double=True)
    found = saliency(model, x, 2, of=of)
    torch.testing.assert_close(found, finite_differences(lambda x: OF[of](model(x))[:, 2], x), rtol=1e-5, atol=1e-7)


@for_each("net, layer", LAYERS)
def test_a_neuron_has_the_gradient_of_its_mean_activation(net, layer):
    model, (x, _) = seeded(NETS[net], double=True), pictures(2, double=True)

    def activation(x):
        return model.by_hand(x)[0][layer][-1][:, 1].reshape(len(x), -1).mean(1)

    found = saliency(model, x, (layer, 1))
    torch.testing.assert_close(found, finite_differences(activation, x), rtol=1e-5, atol=1e-7)


@for_each("net, layer", LAYERS)
def test_a_layer_has_the_gradient_of_the_mean_of_its_neurons(net, layer):
    model, (x, _) = seeded(NETS[net], double=True), pictures(2, double=True)
    found = saliency(model, x, layer)
    expected = finite_differences(lambda x: model.by_hand(x)[0][layer][-1].flatten(1).mean(1), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


MAKES = {
    "list": list,
    "tuple": tuple,
    "numpy's numbers": lambda classes: list(np.array(classes)),
    "int64": torch.tensor,
    "int32": lambda classes: torch.tensor(classes, dtype=torch.int32),
}


@for_each("make", MAKES)
@for_each("of", OF)
def test_each_sample_may_have_a_class_of_its_own(make, of):
    model, x = convolutional(4)
    classes = [3, 0, 0, 2]
    found = saliency(model, x, MAKES[make](classes), of=of)
    for i, klass in enumerate(classes):
        torch.testing.assert_close(found[i : i + 1], saliency(model, x[i : i + 1], klass, of=of))


def test_two_classes_for_two_samples_are_no_neuron():
    model, x = convolutional(2)
    found = saliency(model, x, (3, 1))
    torch.testing.assert_close(found[1:], saliency(model, x[1:], 1))


@for_each("klass", [np.int64(2), torch.tensor(2)])
def test_one_class_may_come_in_any_form(klass):
    model, x = convolutional()
    assert torch.equal(saliency(model, x, klass), saliency(model, x, 2))


@for_each("method", METHODS)
@for_each("of", OF)
def test_without_a_target_each_sample_has_its_predicted_class(method, of):
    model, (x, _) = seeded(NETS["read, then rectified in place"], double=True), pictures(6, double=True)
    model.fc.bias.data.zero_()
    predicted = model(x).argmax(1)
    assert len(predicted.unique()) > 1
    assert torch.equal(saliency(model, x, method=method, of=of), saliency(model, x, predicted, method=method, of=of))


@for_each("target", [1, ("conv1", 2), "conv2", None])
def test_grad_x_input_is_their_product(target):
    model, x = convolutional()
    assert torch.equal(saliency(model, x, target, method="grad_x_input"), saliency(model, x, target) * x)


@for_each("method", [*METHODS, "smoothgrad"])
def test_absolute_values_are_those_of_the_finished_map(method):
    model, x = convolutional()
    options = {"method": method, "smoothing": 0.8}
    signed = saliency(model, x, 1, **options)
    assert torch.equal(saliency(model, x, 1, **options, absolute=True), signed.abs())
    assert method == "grad_cam" or bool((signed < 0).any())


def blurred(values, sigma):
    """Each value is a mean of its neighbours, edges repeated, by loops over places."""
    reach = max(1, round(3 * sigma))
    weights = [math.exp(-((i / sigma) ** 2) / 2) for i in range(-reach, reach + 1)]
    for axis in range(2, values.ndim):
        out, last = torch.zeros_like(values), values.shape[axis] - 1
        for place in range(last + 1):
            for offset, weight in zip(range(-reach, reach + 1), weights, strict=True):
                neighbour = min(max(place + offset, 0), last)
                out.select(axis, place).add_(values.select(axis, neighbour), alpha=weight / sum(weights))
        values = out
    return values


@for_each("sigma", [0.3, 1, 2.5, 20.0])
@for_each("space", [(7,), (5, 8), (3, 4, 5)])
def test_smoothing_is_a_gaussian_with_repeated_edges(sigma, space):
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * math.prod(space), 3)).double()
    x = torch.randn(2, 2, *space, dtype=torch.float64)
    torch.testing.assert_close(saliency(model, x, 0, smoothing=sigma), blurred(saliency(model, x, 0), sigma))


@for_each("target", [0, ("1", 0), "1"])
def test_smoothing_keeps_a_constant_map(target):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 1, bias=False))
    model[1].weight.data.fill_(0.25)
    torch.testing.assert_close(
        saliency(model, torch.rand(2, 1, 6, 6), target, smoothing=3), torch.full((2, 1, 6, 6), 0.25)
    )


SLOPES = {
    "logit": lambda p, weight: weight[1],
    "probability": lambda p, weight: p[1] * (weight[1] - p @ weight),
    "loss": lambda p, weight: p @ weight - weight[1],
}


@for_each("of", SLOPES)
def test_a_linear_model_has_a_closed_form(of):
    model, x = nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    expected = torch.stack([SLOPES[of](p, model.weight) for p in model(x).softmax(1)]).detach()
    torch.testing.assert_close(saliency(model, x, 1, of=of), expected)


@for_each("method", METHODS)
@for_each("target", [2, None, "conv2"])
def test_a_sample_does_not_depend_on_the_others_of_its_batch(method, target):
    model, x = convolutional(70)
    found = saliency(model, x, target, method=method, **({"steps": 5} if method == "integrated_gradients" else {}))
    for i in (0, 31, 32, 69):
        alone = saliency(model, x[i : i + 1], target, method=method, **({"steps": 5} if method[0] == "i" else {}))
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-9, atol=1e-12)


class Powers(nn.Module):
    """Two outputs: the sum of squares and the sum of cubes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(x**2).flatten(1).sum(1), (x**3).flatten(1).sum(1)], 1)


@for_each("target", [1, None, ("conv1", 0)])
def test_smoothgrad_without_noise_is_the_gradient(target):
    model, x = convolutional(40)
    assert torch.equal(saliency(model, x, target, method="smoothgrad", noise=0), saliency(model, x, target))


def test_smoothgrad_depends_on_its_seed_alone():
    model, x = convolutional(40)
    first = saliency(model, x, 1, method="smoothgrad", samples=2, seed=5)
    torch.manual_seed(99)
    assert torch.equal(saliency(model, x, 1, method="smoothgrad", samples=2, seed=5), first)
    assert not torch.equal(saliency(model, x, 1, method="smoothgrad", samples=2, seed=6), first)


def test_smoothgrad_has_sixteen_samples_and_fifteen_percent_noise_unless_told():
    model, x = convolutional()
    told = saliency(model, x, 1, method="smoothgrad", samples=16, noise=0.15, seed=0)
    assert torch.equal(saliency(model, x, 1, method="smoothgrad"), told)


@for_each("scale", [1.0, 10.0])
def test_smoothgrad_tends_to_the_mean_over_the_noise(scale):
    x = scale * torch.tensor([[0.0, 0.5, 1.0], [-2.0, 1.0, 2.0]], dtype=torch.float64)
    deviation = 0.2 * torch.tensor([[1.0], [4.0]], dtype=torch.float64) * scale
    samples = 800
    options = {"method": "smoothgrad", "noise": 0.2, "samples": samples}
    squares, cubes = (saliency(Powers(), x, i, **options) for i in (0, 1))
    error = 2 * deviation / math.sqrt(samples)
    assert bool(((squares - 2 * x).abs() < 4.5 * error).all())
    assert bool((squares != 2 * x).all())
    spread = ((6 * x * deviation) ** 2 + 18 * deviation**4).sqrt() / math.sqrt(samples)
    assert bool(((cubes - 3 * (x**2 + deviation**2)).abs() < 4.5 * spread).all())


def test_smoothgrad_of_constant_samples_has_no_noise():
    x = torch.full((2, 1, 4, 4), 0.7)
    torch.testing.assert_close(saliency(Powers(), x, 1, method="smoothgrad"), 3 * x**2)
