"""The range of pictures, between latent values and what the model sees."""

import math
from unittest.mock import Mock

import pytest
import torch

from lightning_neurons import maximize_activation
from lightning_neurons.feature_visualization.parametrization import Colours, Fourier, Pixel
from lightning_neurons.feature_visualization.value_range import VALIDITIES, Range
from tests.attribution.trained import digit_pictures, trained_digits
from tests.models import ConvNet, seeded
from tests.tables import for_each

SMALL = {"input_shape": (3, 8, 8), "value_range": (0.0, 1.0)}
STILL = {"jitter": 0, "scale": 0, "rotation": 0}
BOUNDS = [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-3.5, -1.25)]
NORMALISATIONS = {
    "none": (None, None),
    "scalar": (0.5, 0.25),
    "per channel": ([0.4, 0.5, 0.6], (0.2, 0.25, 0.3)),
    "tensors": (torch.tensor([0.4, 0.5, 0.6]), torch.tensor(0.25)),
    "scalar tensors": (torch.tensor(0.5), torch.tensor([0.25])),
    "scalar mean, std by channel": (0.5, [0.2, 0.25, 0.3]),
    "mean by channel alone": ([0.4, 0.5, 0.6], None),
    "mean alone": (0.5, None),
    "std alone": (None, 0.25),
}


def maximized(target=1, *, model=None, **options):
    return maximize_activation(seeded(ConvNet) if model is None else model, target, **(SMALL | options))


def range_(low=0.0, high=1.0, validity="sigmoid", channels=1):
    return Range(low, high, torch.zeros(channels), torch.ones(channels), validity)


@for_each("validity", VALIDITIES)
@for_each("low, high", BOUNDS)
def test_any_latent_picture_becomes_one_in_the_range(low, high, validity):
    latent = torch.tensor([-math.inf, -1e30, -20.0, -2.0, 0.0, 2.0, 20.0, 1e30, math.inf]).view(1, 1, -1)
    valid = range_(low, high, validity).valid(latent)
    assert low == valid.min()
    assert high == valid.max()
    assert valid[0, 0, 4].item() == pytest.approx((low + high) / 2)
    assert (valid.diff() >= 0).all()


@for_each("low, high", BOUNDS)
def test_values_are_those_of_the_closed_form(low, high):
    for value in (-3.0, -1.7, -0.2, 0.0, 0.4, 1.9, 3.0):
        latent = torch.tensor([[[value]]])
        bent = low + (high - low) / (1 + math.exp(-value))
        cut = min(max((low + high) / 2 + (high - low) * value / 4, low), high)
        assert range_(low, high, "sigmoid").valid(latent).item() == pytest.approx(bent, rel=1e-5)
        assert range_(low, high, "clip").valid(latent).item() == pytest.approx(cut, rel=1e-5)


@for_each("validity", VALIDITIES)
@for_each("low, high", BOUNDS)
def test_the_slope_in_the_middle_is_a_quarter_of_the_range(low, high, validity):
    latent = torch.zeros(1, 1, 1, requires_grad=True)
    range_(low, high, validity).valid(latent).sum().backward()
    assert latent.grad.item() == pytest.approx((high - low) / 4)


@for_each("validity", VALIDITIES)
@for_each("low, high", BOUNDS)
def test_latent_is_the_inverse_inside_of_the_range(low, high, validity):
    valid = range_(low, high, validity)
    pictures = low + (high - low) * torch.linspace(0.002, 0.998, 50).view(1, 2, 25)
    torch.testing.assert_close(valid.valid(valid.latent(pictures)), pictures, rtol=1e-4, atol=1e-4 * (high - low))
    latent = torch.linspace(-1.9, 1.9, 50).view(1, 2, 25)
    torch.testing.assert_close(valid.latent(valid.valid(latent)), latent, rtol=1e-3, atol=1e-3)


@for_each("validity", VALIDITIES)
def test_the_bounds_and_what_lies_beyond_have_finite_latent_values(validity):
    pictures = torch.tensor([-5.0, -1.0, 3.0, 9.0]).view(1, 1, 4)
    valid = range_(-1.0, 3.0, validity)
    assert valid.latent(pictures).isfinite().all()
    expected = torch.tensor([-1.0, -1.0, 3.0, 3.0]).view(1, 1, 4)
    torch.testing.assert_close(valid.valid(valid.latent(pictures)), expected, atol=0.01, rtol=0)


@for_each("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 3)])
def test_inputs_are_normalised_by_channel_and_back(shape):
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    valid, pictures = Range(0.0, 1.0, mean, std, "clip"), torch.rand(shape)
    inputs = valid.inputs(pictures)
    for channel in range(3):
        expected = (pictures[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(inputs[:, channel], expected)
    torch.testing.assert_close(valid.pictures(inputs), pictures)


@for_each("low, high", BOUNDS)
def test_shown_runs_from_zero_to_one(low, high):
    pictures = torch.tensor([low, (low + high) / 2, high]).view(1, 1, 3)
    torch.testing.assert_close(range_(low, high).shown(pictures), torch.tensor([[[0.0, 0.5, 1.0]]]))


@for_each("described", [Pixel((2, 6)), Fourier((2, 6), Colours(torch.eye(2)))])
def test_projected_describes_the_nearest_picture(described):
    latent = 4 * torch.randn(3, 2, 6)
    projected = described.decode(range_(validity="clip").projected(described.encode(latent), described))
    torch.testing.assert_close(projected, latent.clamp(-2, 2), atol=1e-5, rtol=1e-5)


@for_each("low, high", [(0.0, 1.0), (-1.0, 1.0), (0, 255)])
@for_each("validity", ["sigmoid", "clip"])
@for_each("kind", ["fourier", "pixel", "maco"])
def test_pictures_stay_in_the_range_at_every_step(low, high, validity, kind):
    images = low + (high - low) * torch.rand(5, 3, 8, 8)
    found = maximized(
        [1, 2], validity=validity, parametrization=kind, value_range=(low, high), images=images, frames=33, steps=32,
        learning_rate=0.5,
    )  # fmt: skip
    assert found.frames.shape == (33, 2, 3, 8, 8)
    assert low <= found.frames.min() <= found.frames.max() <= high
    assert torch.equal(found.frames[-1], found.images)
    assert len(found.frames.unique(dim=0)) == 33
    assert 0 <= found.shown.min() <= found.shown.max() <= 1
    torch.testing.assert_close(found.shown * (high - low) + low, found.images)


@for_each("name", NORMALISATIONS)
def test_the_model_sees_normalised_pictures(name):
    mean, std = NORMALISATIONS[name]
    net, kept = seeded(ConvNet), Mock(seen=[])  # what a hook holds of its own would be put back
    net.conv1.register_forward_pre_hook(lambda module, inputs: kept.seen.append(inputs[0].detach().clone()))
    found = maximized(2, model=net, mean=mean, std=std, steps=6, frames=7, **STILL)
    center = torch.zeros(3) if mean is None else torch.as_tensor(mean).expand(3)
    spread = torch.ones(3) if std is None else torch.as_tensor(std).expand(3)
    expected = (found.frames - center.view(3, 1, 1)) / spread.view(3, 1, 1)
    assert len(kept.seen) == 7
    torch.testing.assert_close(torch.stack(kept.seen), expected)
    torch.testing.assert_close(found.inputs, expected[-1])
    torch.testing.assert_close(found.activation, net(found.inputs)[0, 2].item())


def test_normalised_images_are_looked_at_as_the_model_takes_them():
    net, (x, _) = trained_digits(), digit_pictures()
    found = maximize_activation(net, 3, images=(x - 0.3) / 0.4, value_range=(0.0, 1.0), mean=0.3, std=0.4, steps=2)
    with torch.no_grad():
        torch.testing.assert_close(found.data_activations[0], net((x - 0.3) / 0.4)[:, 3])
    assert maximize_activation(net, 3, images=(x - 0.3) / 0.4, mean=0.3, std=0.4, steps=1).range.high == pytest.approx(
        1
    )
