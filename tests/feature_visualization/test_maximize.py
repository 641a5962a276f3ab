"""What ``maximize_activation`` reaches on a trained network, and what it says of the data."""

from functools import cache

import pytest
import torch
from torch import nn

from lightning_neurons import maximize_activation
from tests.attribution.trained import digit_pictures, trained_digits
from tests.tables import for_each

WAYS = {
    "default": {},
    "fourier, clip": {"validity": "clip"},
    "pixel, sigmoid": {"parametrization": "pixel"},
    "pixel, clip": {"parametrization": "pixel", "validity": "clip"},
}
RANGE = (0.0, 1.0)


@cache
def of_classes(way):
    return maximize_activation(trained_digits(), range(10), images=digit_pictures()[0], value_range=RANGE, **WAYS[way])


def hooked(net, path, x):
    """The positive part of a layer's normalised output on ``x``: what the demo's layers pass on, seen by a hook."""
    seen = []
    with torch.no_grad():
        handle = net.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(output))
        net(x)
        handle.remove()
    return seen[0].clamp_min(0)


def by_hand(net, target, x):
    """The mean over positions of a neuron, of all neurons for a name, or a logit."""
    if isinstance(target, int):
        with torch.no_grad():
            return net(x)[:, target]
    path, neuron = target if isinstance(target, tuple) else (target, None)
    values = hooked(net, {"conv1": "norm1", "conv2": "norm2"}.get(path, path), x)
    means = values.flatten(2).mean(2) if values.ndim > 2 else values
    return means.mean(1) if neuron is None else means[:, neuron]


def percentile(values):
    """The 99th, between the two nearest of the sorted values."""
    ordered = sorted(values.tolist())
    place = 0.99 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@for_each("way", WAYS)
@for_each("klass", range(10))
def test_every_class_gets_higher_than_on_nearly_all_data(way, klass):
    found = of_classes(way)
    logits = by_hand(trained_digits(), klass, digit_pictures()[0])
    share = 0.9 if way == "fourier, clip" else 1  # which may end short of the maximum
    assert found.activations[klass] > share * percentile(logits)


@for_each("way", WAYS)
def test_the_picture_of_a_class_is_taken_for_it(way):
    with torch.no_grad():
        assert trained_digits()(of_classes(way).inputs).argmax(1).tolist() == list(range(10))


@cache
def of_neurons():
    targets = [("conv2", i) for i in range(0, 32, 5)] + [("conv1", 3), ("fc1", 0), ("fc1", 7), ("fc1", 63), "conv2"]
    targets += ["fc1", 4]
    net, x = trained_digits(), digit_pictures()[0]
    found = maximize_activation(net, targets, images=x, value_range=RANGE)
    return targets, found, [by_hand(net, target, x) for target in targets]


def test_neurons_and_layers_get_higher_than_on_nearly_all_data():
    targets, found, data = of_neurons()
    low = [t for t, reached, own in zip(targets, found.activations, data, strict=True) if reached <= percentile(own)]
    assert low == []


def test_the_numbers_of_the_data_are_those_of_a_plain_forward():
    _, found, data = of_neurons()
    torch.testing.assert_close(found.data_activations, torch.stack(data))
    torch.testing.assert_close(found.data_maximum, torch.stack([own.max() for own in data]))
    torch.testing.assert_close(found.data_p99, torch.tensor([percentile(own) for own in data]))


def test_the_activations_are_those_of_a_plain_forward():
    targets, found, _ = of_neurons()
    own = [by_hand(trained_digits(), t, found.inputs[[row]]).item() for row, t in enumerate(targets)]
    torch.testing.assert_close(found.activations, torch.tensor(own))


@for_each("klass", range(10))
def test_every_probability_gets_higher_than_on_nearly_all_data(klass):
    found, data = of_probabilities()
    assert found.activations[klass] > percentile(data[:, klass])


def test_every_probability_is_nearly_one_and_that_of_a_plain_forward():
    found, data = of_probabilities()
    with torch.no_grad():
        own = trained_digits()(found.inputs).softmax(1).diagonal()
    torch.testing.assert_close(found.activations, own)
    torch.testing.assert_close(found.data_maximum, data.amax(0))
    assert found.activations.min() > 0.95
    assert 0 <= found.trajectory.min() <= found.trajectory.max() <= 1
    torch.testing.assert_close(found.trajectory[-1], own, atol=0.01, rtol=0)


@cache
def of_probabilities():
    net, x = trained_digits(), digit_pictures()[0]
    with torch.no_grad():
        data = net(x).softmax(1)
    return maximize_activation(net, range(10), images=x, value_range=RANGE, of="probability"), data


@for_each("target, minus", [(4, 9), (9, 4), (("fc1", 7), ("fc1", 63)), (3, ("fc1", 7)), ("conv2", 1)])
def test_a_difference_gets_higher_than_on_nearly_all_data(target, minus):
    net, x = trained_digits(), digit_pictures()[0]
    found = maximize_activation(net, target, minus=minus, images=x, value_range=RANGE)
    data = by_hand(net, target, x) - by_hand(net, minus, x)
    assert found.activation > percentile(data)
    torch.testing.assert_close(found.data_activations[0], data)
    own = by_hand(net, target, found.inputs) - by_hand(net, minus, found.inputs)
    torch.testing.assert_close(found.activations, own)


def test_one_logit_has_the_probability_of_a_sigmoid():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    found = maximize_activation(net, 0, input_shape=(1, 4, 4), value_range=RANGE, of="probability", steps=20)
    torch.testing.assert_close(found.activation, net(found.inputs).sigmoid().item())


def test_rows_are_the_seeds_of_each_target_in_turn():
    found = maximize_activation(
        trained_digits(), [5, ("conv2", 3)], input_shape=(1, 8, 8), value_range=RANGE, seed=[4, 0, 2], steps=3
    )
    assert found.targets == ("class 5",) * 3 + ("conv2 3",) * 3
    assert found.seeds == (4, 0, 2, 4, 0, 2)
    assert found.images.shape == (6, 1, 8, 8)
    assert found.trajectory.shape == (3, 6)
    assert found.data_activations.shape == (6, 0)
    assert found.data_p99.isnan().all()
    assert found.data_maximum.isnan().all()
    assert found.frames.shape == (0, 6, 1, 8, 8)


def test_the_image_is_that_of_the_best_seed_of_the_first_target():
    found = maximize_activation(
        trained_digits(), [0, 1], input_shape=(1, 8, 8), value_range=RANGE, seed=range(4), steps=8
    )
    best = max(range(4), key=lambda row: found.activations[row])
    assert torch.equal(found.image, found.images[best])
    assert found.image.shape == (1, 8, 8)
    assert found.activation == found.activations[best].item() == found.activations[:4].max().item()
    assert "class 0" in repr(found)
    assert found.notes == ()


def test_the_numbers_of_the_data_are_repeated_for_every_seed():
    net, x = trained_digits(), digit_pictures()[0]
    found = maximize_activation(net, [2, "fc1"], images=x, value_range=RANGE, seed=[0, 1], steps=1)
    own = torch.stack([by_hand(net, target, x) for target in (2, 2, "fc1", "fc1")])
    torch.testing.assert_close(found.data_activations, own)


@for_each(
    "form",
    [lambda x, y: [(x[:100], y[:100]), (x[100:], y[100:])], lambda x, y: (part for part in x.split(7)), lambda x, y: x],
)
def test_images_may_come_in_any_batches(form):
    x, y = digit_pictures()
    one = maximize_activation(trained_digits(), [1, 2], images=x, value_range=RANGE, steps=5)
    other = maximize_activation(trained_digits(), [1, 2], images=form(x, y), value_range=RANGE, steps=5)
    torch.testing.assert_close(other.images, one.images, atol=1e-4, rtol=0)
    torch.testing.assert_close(other.data_activations, one.data_activations)


def test_the_range_is_that_of_the_images_without_one():
    found = maximize_activation(trained_digits(), 1, images=digit_pictures()[0] * 3 - 1, steps=2)
    assert (found.range.low, found.range.high) == pytest.approx((-1, 2))
