"""What pictures of one's own say, against loops."""

import cmath
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neurons import ArgumentError
from lightning_neurons.attribution.objective import Objective
from lightning_neurons.attribution.readout import Readout
from lightning_neurons.feature_visualization.init import activations_on, batches_of, some_of, spectrum_of
from lightning_neurons.feature_visualization.parametrization import Colours
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each


def magnitudes_by_loop(picture):
    """The magnitudes of one channel's discrete Fourier transform, half of the last axis, a sum for each frequency."""
    space = picture.shape
    kept = [*space[:-1], space[-1] // 2 + 1]
    found = torch.zeros(kept)
    for frequency in itertools.product(*map(range, kept)):
        total = 0j
        for place in itertools.product(*map(range, space)):
            turn = sum(f * p / n for f, p, n in zip(frequency, place, space, strict=True))
            total += picture[place].item() * cmath.exp(-2j * math.pi * turn)
        found[frequency] = abs(total) / math.sqrt(picture.numel())
    return found


@for_each("shape", [(2, 4, 5), (1, 5, 4), (2, 6), (1, 2, 3, 2)])
def test_the_spectrum_against_a_loop(shape):
    latent, mix = torch.randn(3, *shape) + 2, torch.eye(shape[0]) + 0.3 * torch.rand(shape[0], shape[0])
    spectrum = spectrum_of(latent, Colours(mix))
    mean = torch.stack([latent[:, channel].mean() for channel in range(shape[0])])
    torch.testing.assert_close(spectrum.mean, mean)
    expected = torch.zeros_like(spectrum.magnitudes)
    for picture in latent:
        centred = torch.stack([picture[c] - mean[c] for c in range(shape[0])])
        plain = torch.linalg.inv(mix) @ centred.flatten(1)
        for channel in range(shape[0]):
            expected[channel] += magnitudes_by_loop(plain[channel].view(shape[1:])) / len(latent)
    torch.testing.assert_close(spectrum.magnitudes, expected, atol=1e-4, rtol=1e-4)


X = torch.arange(200.0).view(200, 1, 1, 1).expand(200, 1, 2, 2).contiguous()
FORMS = {
    "a tensor": lambda: X,
    "a loader": lambda: DataLoader(TensorDataset(X, torch.zeros(200).long()), 30),
    "a generator": lambda: (x for x in X.split(11)),
    "pairs": lambda: [(x, torch.zeros(len(x)).long()) for x in X.split(150)],
    "tuples of one": lambda: [[x, torch.zeros(len(x)).long()] for x in X.split(1)],
    "one batch in a list": lambda: [X],
}


@for_each("form", FORMS)
def test_all_pictures_come_once_and_in_order_in_small_parts(form):
    batches = list(batches_of(FORMS[form]()))
    assert max(map(len, batches)) <= 64
    assert torch.equal(torch.cat(batches), X)


@for_each("images", [TensorDataset(X), "pictures", {"x": X}, 5, X.numpy(), [{"x": X}], ["a"], [np.zeros((2, 2))]])
def test_anything_else_is_refused(images):
    with pytest.raises(ArgumentError, match=r"^images=.*expected (a tensor|images of floating point)"):
        list(batches_of(images))


@for_each(
    "images, message",
    [
        (X.int(), r"torch.int32 \(200, 1, 2, 2\).*expected images of floating point"),
        (X[:, 0, 0, 0], r"torch.float32 \(200,\).*expected images of floating point"),
        ([X, X[..., :1]], r"\(1, 2, 1\).*expected images of one shape, \(1, 2, 2\)"),
        ([X, X * torch.nan], "NaN or infinite values.*expected finite values"),
        (X / 0, "NaN or infinite values.*expected finite values"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused(images, message):
    with pytest.raises(ArgumentError, match=f"^images=.*{message}"):
        list(batches_of(images))


@for_each("count", [1, 64, 512, 513, 1024, 3000])
def test_statistics_take_at_most_512_pictures_from_everywhere(count):
    everything = torch.arange(float(count)).view(count, 1)
    some = some_of(everything.split(64))
    assert min(count, 256) <= len(some) <= 512
    if count <= 512:
        assert torch.equal(some, everything)
    assert some.unique().numel() == len(some)
    assert some.min() == 0
    assert some.max() >= count - 1 - 2 * count / 256


@for_each("size", [1, 3, 5])
def test_statistics_of_small_batches_take_at_most_512_pictures(size):
    assert len(some_of(torch.zeros(2000, 1).split(size))) <= 512


def test_activations_on_pictures_against_a_plain_forward():
    net, (x, _) = seeded(ConvNet), pictures(10)
    objectives = [
        Objective(None, 2),
        Objective("conv1", 3),
        Objective("conv2", None),
        Objective(None, 1, "probability", Objective("fc1", 0)),
    ]
    readout = Readout(net, ["conv1", "conv2", "fc1"])
    with readout.open():
        found = activations_on(readout, objectives, x.split(4))
    layers, logits = net.by_hand(x)
    expected = [
        logits[:, 2],
        layers["conv1"][0][:, 3].mean((1, 2)),
        layers["conv2"][0].mean((1, 2, 3)),
        logits.softmax(1)[:, 1] - layers["fc1"][0][:, 0],
    ]
    torch.testing.assert_close(found, torch.stack(expected).detach())
    assert not found.requires_grad


def test_the_last_call_of_a_layer_that_runs_twice_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, x):
            return self.cell(torch.relu(self.cell(x)) + 1)

    net, x = seeded(Twice), torch.randn(5, 3)
    readout = Readout(net, ["cell"], stop=True)
    with readout.open():
        found = activations_on(readout, [Objective("cell", 1)], [x])
    torch.testing.assert_close(found[0], net(x)[:, 1].detach())
