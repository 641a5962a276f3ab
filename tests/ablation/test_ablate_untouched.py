"""``ablate`` leaves the model as it was, also if it is stopped, and runs in every mode and type of numbers."""

import copy
import random
from itertools import cycle
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from lightning_neurons import MeasurementError, ablate
from tests.isolation.test_no_trace import Raising, state_of
from tests.models import NETS, ConvNet, cross_entropy, pictures, seeded
from tests.tables import for_each

OPTIONS = {
    "zero": {},
    "mean": {"replacement": "mean"},
    "resample": {"replacement": "resample"},
    "with shortcuts": {"exact": False},
    "with hardly any memory": {"memory_limit": 1},
    "by class": {"per_class": True},
    "a race": {"budget": 0.8},
}


def used(net: nn.Module) -> nn.Module:
    """As after some training: mixed modes, a frozen parameter, gradients, hooks of the user."""
    for number, module in enumerate(net.train().children()):
        module.train(number % 2 == 0)
    next(net.parameters()).requires_grad_(False)
    last = list(net.parameters())[-1]
    last.grad = torch.full_like(last, 3.0)
    last.register_hook(lambda gradient: gradient)
    next(net.children()).register_forward_hook(lambda module, inputs, output: None)
    return net


def two_batches(**options):
    x, y = pictures(**options)
    return [(x[:4], y[:4]), (x[4:], y[4:])]


@pytest.mark.parametrize(
    ("name", "option"), [*((name, "zero") for name in NETS), *(("residual in place", o) for o in OPTIONS)]
)
def test_nothing_of_the_model_changes(name, option):
    net = used(seeded(NETS[name]))
    before, batches = state_of(net), two_batches()
    kept = copy.deepcopy(batches)
    ablate(net, batches, cross_entropy, **OPTIONS[option])
    assert state_of(net) == before
    assert all(
        torch.equal(a, b) for one, other in zip(batches, kept, strict=True) for a, b in zip(one, other, strict=True)
    )


class Stopping(Raising):
    """Raises what it is told, at a given call, after it has changed all that a forward can."""

    error: type[BaseException] = ZeroDivisionError

    def forward(self, x):
        try:
            return super().forward(x)
        except ZeroDivisionError:
            raise self.error("on purpose") from None


@for_each("fail_from", [1, 3, 5])
@for_each("options", [{}, {"replacement": "mean"}, {"budget": 1.0}])
def test_an_exception_of_the_model_passes_through_and_leaves_no_trace(options, fail_from):
    net = Stopping(fail_from).train()
    before, fails = state_of(net), True
    try:
        ablate(net, two_batches(), cross_entropy, **options)
        fails = False
    except ZeroDivisionError:
        pass
    except MeasurementError:  # a race takes a joined batch that fails for one that cannot be joined
        assert "budget" in options
    assert state_of(net) == before
    assert (net.calls, net.outputs) == (0, [])
    assert fails or fail_from > 1  # a forward may begin with the model's own count of calls each time


@for_each("fail_at", [2, 5, 9, 30])
@for_each("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_of_the_loss_leaves_no_trace(fail_at, error):
    net, calls = used(seeded(ConvNet)), 0

    def loss_fn(model, batch):
        nonlocal calls
        calls += 1
        model.extra = calls
        loss = cross_entropy(model, batch)
        if calls == fail_at:
            raise error("on purpose")
        return loss

    before, batches = state_of(net), two_batches()
    try:
        ablate(net, batches, loss_fn)
    except error:
        assert error is not KeyboardInterrupt or fail_at <= 5
    assert calls >= fail_at
    assert state_of(net) == before


@pytest.mark.parametrize("fail_at", [4, 6, 20])
def test_interrupted_in_the_middle_of_the_model_there_is_a_report_and_no_trace(fail_at):
    net, counted = used(seeded(ConvNet)), Mock(calls=0)  # what a hook holds of its own would be put back

    def stop(module, inputs):
        counted.calls += 1
        if counted.calls == fail_at:
            raise KeyboardInterrupt

    net.act.register_forward_pre_hook(stop)
    before = state_of(net)
    report = ablate(net, two_batches(), cross_entropy)
    assert any(note.startswith("interrupted") for note in report.notes)
    assert state_of(net) == before


class Noisy(nn.Module):
    """Draws from every source of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(192, 5), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.fc1(x.flatten(1))) + random.random() * 0
        return self.fc2(torch.cat([x, torch.rand(len(x), 3)], 1)) + float(np.random.rand())


def test_random_numbers_are_the_same_in_every_run():
    net, batch = seeded(Noisy), pictures()
    net.fc1.weight.data[2], net.fc1.bias.data[2], net.fc2.weight.data[:, 3] = 0, -1, 0
    before = state_of(net)
    report = ablate(net, [batch], cross_entropy)
    assert (report.delta_loss["fc1"][2], report.delta_loss["fc1"][3].abs() < 1e-7) == (0, True)
    assert state_of(net) == before


@for_each("option, mode", zip(OPTIONS, cycle([torch.inference_mode, torch.no_grad]), strict=False))
def test_inside_a_mode_without_gradients_the_numbers_are_the_same(option, mode):
    net, chosen = seeded(ConvNet), {"neurons": {"conv1": [0, 1], "fc1": [2, 3], "fc2": [0]}, **OPTIONS[option]}
    expected = ablate(net, two_batches(), cross_entropy, **chosen)
    with mode():
        before = state_of(net)
        batches = [tuple(t.clone() for t in batch) for batch in two_batches()]
        assert batches[0][0].is_inference() == (mode is torch.inference_mode)
        found = ablate(net, batches, cross_entropy, **chosen)
        assert state_of(net) == before
    outside = ablate(net, batches, cross_entropy, **chosen)
    for report in (found, outside):
        for name, delta in expected.delta_loss.items():
            torch.testing.assert_close(report.delta_loss[name], delta, rtol=0, atol=0, equal_nan=True)


@for_each("option, dtype", zip(OPTIONS, cycle([torch.bfloat16, torch.float64]), strict=False))
def test_other_types_of_numbers(option, dtype):
    net = seeded(ConvNet).to(dtype)
    batches = [(x.to(dtype), y) for x, y in two_batches()]
    before = {name: (value.dtype, value.clone()) for name, value in net.state_dict().items()}
    chosen = {"neurons": ["conv2", "fc2"], **OPTIONS[option]}
    report = ablate(net, batches, cross_entropy, **chosen)
    expected = ablate(seeded(ConvNet), two_batches(), cross_entropy, **chosen)
    for name, value in net.state_dict().items():
        assert value.dtype == before[name][0]
        assert torch.equal(value, before[name][1])
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-5
    for name, delta in expected.delta_loss.items():
        assert report.delta_loss[name].dtype == torch.float64
        torch.testing.assert_close(report.delta_loss[name], delta, rtol=0, atol=tolerance, equal_nan=True)


def test_a_model_of_inference_tensors_is_measured_as_any_other():
    expected = ablate(seeded(ConvNet), two_batches(), cross_entropy)
    with torch.inference_mode():
        net = seeded(ConvNet)
    found = ablate(net, two_batches(), cross_entropy)
    assert all(torch.equal(found.delta_loss[name], delta) for name, delta in expected.delta_loss.items())


def test_the_model_trains_on_as_if_nothing_had_been():
    net, other = seeded(ConvNet).train(), seeded(ConvNet).train()
    ablate(net, two_batches(), cross_entropy)
    for model in (net, other):
        torch.manual_seed(1)
        cross_entropy(model, pictures()).backward()
    for one, twin in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, twin.grad)
