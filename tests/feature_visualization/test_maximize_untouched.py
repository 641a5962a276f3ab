"""Whatever the model and the mode: it runs no further than it must, and is afterwards as it was."""

import random
from unittest.mock import Mock

import lightning as L  # noqa: N812
import pytest
import torch
from torch import nn

from lightning_neurons import MeasurementError, maximize_activation
from tests.ablation.test_ablate_untouched import used
from tests.attribution.trained import digit_pictures, trained_digits
from tests.isolation.test_no_trace import state_of
from tests.models import NETS, ConvNet, Recurrent, ResidualNet, pictures, seeded
from tests.tables import for_each

OPTIONS = {
    "default": {},
    "pixel, clip": {"parametrization": "pixel", "validity": "clip"},
    "maco": {"parametrization": "maco"},
    "penalties": {"total_variation": 1.0, "l2": 1.0, "blur": 0.5},
    "normalised": {"mean": 0.5, "std": 0.5},
    "a picture": {"start": "first"},
    "frames": {"frames": 3},
}
X = pictures(5)[0].sigmoid()


def maximized(net, target=1, **options):
    if options.get("start") == "first":
        options["start"] = X[0]
    images = (X - 0.5) / 0.5 if options.get("mean") else X
    return maximize_activation(net, target, **({"images": images, "value_range": (0.0, 1.0), "steps": 5} | options))


def layers_of(net):
    return [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(
    ("name", "option"), [*((name, "default") for name in NETS), *(("residual in place", o) for o in OPTIONS)]
)
def test_nothing_of_the_model_changes(name, option):
    net = used(seeded(NETS[name]))
    before, python, kept = state_of(net), random.getstate(), X.clone()
    for target in (1, (layers_of(net)[0], 1), layers_of(net)[-1]):
        maximized(net, target, **OPTIONS[option])
    assert state_of(net) == before
    assert random.getstate() == python
    assert torch.equal(X, kept)
    assert all(p.grad_fn is None and p.is_leaf for p in net.parameters())


@pytest.mark.parametrize("name", NETS)
def test_a_net_in_training_gives_the_same_as_in_evaluation(name):
    net = seeded(NETS[name])
    for target in (2, (layers_of(net)[1], 1)):
        found = maximized(net.eval(), target)
        assert torch.equal(maximized(net.train(), target).images, found.images)


class Failing(ConvNet):
    """Uses random numbers, changes itself, and raises what it is told at a given call."""

    def __init__(self, good=0, error=ZeroDivisionError):
        super().__init__()
        self.good, self.error, self.seen = good, error, []

    def forward(self, x):
        self.seen.append(random.random())
        torch.rand(1)
        self.bn1.running_mean += 1
        if len(self.seen) > self.good:
            raise self.error("on purpose")
        return super().forward(x)


ERRORS = [(ZeroDivisionError, MeasurementError), (KeyboardInterrupt, KeyboardInterrupt)]


@for_each("number, good", enumerate([0, 1, 3, 5, 6]))
@for_each("which, target", enumerate([1, ("conv2", 1)]))
def test_an_exception_in_the_forward_leaves_no_trace(number, good, which, target):
    error, raised = ERRORS[(number + which) % 2]
    net = used(seeded(Failing, good, error))
    before, python = state_of(net), random.getstate()
    with pytest.raises(raised, match="on purpose"):
        maximized(net, target)
    assert state_of(net) == before
    assert random.getstate() == python
    assert net.seen == []


MODES = [torch.no_grad, torch.inference_mode]


@for_each("number, option", enumerate(OPTIONS))
@for_each("which, target", enumerate([1, ("conv2", 1)]))
def test_gradients_are_found_where_they_are_switched_off(number, option, which, target):
    net, mode = seeded(ConvNet), MODES[(number + which) % 2]
    expected = maximized(net, target, **OPTIONS[option])
    with mode():
        found = maximized(net, target, **OPTIONS[option])
        torch.testing.assert_close(found.images, expected.images)
        torch.testing.assert_close(found.data_activations, expected.data_activations)


def test_images_and_start_of_inference_mode_will_do():
    with torch.inference_mode():
        images = X.clone()
    expected = maximized(seeded(ConvNet), start=X[0])
    assert torch.equal(maximized(seeded(ConvNet), images=images, start=images[0]).images, expected.images)


@pytest.mark.parametrize("target, last", [(("conv1", 1), 0), (("conv2", 1), 1), ("conv2", 1), (("fc1", 1), 2)], ids=str)
def test_the_forward_ends_behind_the_layer(target, last):
    net, hooks = seeded(ConvNet), [Mock(return_value=None) for _ in range(4)]
    for name, hook in zip(["conv1", "conv2", "fc1", "fc2"], hooks, strict=True):
        net.get_submodule(name).register_forward_pre_hook(hook)
    maximized(net, target, steps=7)
    everything = 1 + 7 + 1 + 1  # to learn, to climb, to read what is reached, and the images
    assert [hook.call_count for hook in hooks] == [everything] * (last + 1) + [1] * (3 - last)


class Catching(ConvNet):
    """Goes on whatever happens, and notes whether it did."""

    def __init__(self):
        super().__init__()
        self.late = []

    def forward(self, x):
        try:
            return super().forward(x)
        except Exception:  # noqa: BLE001
            return torch.zeros(len(x), 4)


def test_a_model_that_catches_exceptions_is_left_early_all_the_same():
    net, hook = seeded(Catching), Mock(return_value=None)
    net.fc2.register_forward_pre_hook(hook)
    found = maximized(net, ("conv2", 1))
    assert torch.equal(found.images, maximized(seeded(ConvNet), ("conv2", 1)).images)
    assert hook.call_count == 1


@for_each("after, kind", [(nn.Identity, "fourier"), (lambda: nn.BatchNorm2d(4).eval(), "pixel")])
def test_a_neuron_that_is_silent_at_the_start_wakes(after, kind):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), after(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.ones(4, 1, 3, 3))
        net[0].bias.fill_(-5.0)
    found = maximize_activation(
        net, ("0", 2), input_shape=(1, 8, 8), value_range=(0.0, 1.0), parametrization=kind, frames=1
    )
    assert found.trajectory[0] < 0
    assert found.activation > 1


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = trained_digits()

    def forward(self, x):
        return self.net(x)


def test_a_lightning_module_and_a_forward_of_ones_own():
    x = digit_pictures()[0]
    options = {"images": x, "value_range": (0.0, 1.0), "steps": 6}
    module = Module().train()
    before = state_of(module)
    for target in (3, ("net.conv2", 3)):
        plain = target if isinstance(target, int) else ("conv2", 3)
        expected = maximize_activation(trained_digits(), plain, **options)
        found = maximize_activation(module, target, **options)
        other = maximize_activation(module, target, forward=lambda model, inputs: model.net(inputs), **options)
        assert torch.equal(found.images, expected.images)
        assert torch.equal(other.images, expected.images)
    assert state_of(module) == before
    negative = maximize_activation(module, 3, forward=lambda model, inputs: -model(inputs), **options)
    with torch.no_grad():
        torch.testing.assert_close(negative.activation, -trained_digits()(negative.inputs)[0, 3].item())


@for_each("kind", [torch.bfloat16, torch.float64, torch.float16])
@for_each("target", [1, ("conv2", 1), ("fc1", 0)])
def test_models_of_other_numbers(kind, target):
    net = seeded(ConvNet).to(kind)
    found = maximized(net, target, images=X.to(kind), steps=20)
    expected = maximized(seeded(ConvNet), target, steps=20)
    assert next(net.parameters()).dtype == kind
    assert found.images.dtype == torch.float32
    torch.testing.assert_close(found.activations, expected.activations, atol=0.05, rtol=0.05)
    torch.testing.assert_close(found.data_activations, expected.data_activations, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("target, last", [(("cell", 2), -1), ("cell", -1), (("start", 1), -1)], ids=str)
def test_the_last_call_of_a_layer_counts(target, last):
    net = seeded(Recurrent)
    found = maximized(net, target, steps=30)
    name, neuron = target if isinstance(target, tuple) else (target, slice(None))
    with torch.no_grad():
        own = net.by_hand(found.inputs)[0][name][last][:, neuron].mean()
    torch.testing.assert_close(found.activation, own.item())
    assert found.activation > found.trajectory[0]


@pytest.mark.parametrize("layer, neuron", [("conv1", 2), ("conv2", 1), ("conv3", 1), ("fc", 3)])
def test_sums_in_place_change_nothing(layer, neuron):
    net = seeded(ResidualNet, inplace=True)
    found = maximized(net, (layer, neuron), steps=20)
    expected = maximized(seeded(ResidualNet, inplace=False), (layer, neuron), steps=20)
    torch.testing.assert_close(found.images, expected.images, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        own = net.by_hand(found.inputs)[0][layer][0][:, neuron].mean()
    torch.testing.assert_close(found.activation, own.item())
