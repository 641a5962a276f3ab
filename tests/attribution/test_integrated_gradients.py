"""Integrated gradients: complete, and the plain sum where a number of steps is asked for."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import ArgumentError, integrated_gradients, saliency
from lightning_neurons.attribution.integrated_gradients import MOST_POINTS
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each


def midpoint_sum(function, x, baseline, steps):
    """The mean gradient at the middles of equal steps, times the way."""
    total = torch.zeros_like(x)
    for i in range(steps):
        at = (baseline + (i + 0.5) / steps * (x - baseline)).requires_grad_()
        total += torch.autograd.grad(function(at).sum(), at)[0]
    return total / steps * (x - baseline)


def convolutional(count=3):
    return seeded(ConvNet, double=True), pictures(count, double=True)[0]


def of_class(model, klass, of="logit"):
    def function(x):
        logits = model(x)
        return {"logit": logits, "probability": logits.softmax(1), "loss": -logits.log_softmax(1)}[of][:, klass]

    return function


class Step(nn.Module):
    """Jumps where its mean passes a threshold, beside a linear part."""

    def __init__(self, height: float = 1.0) -> None:
        super().__init__()
        self.linear, self.height = nn.Linear(4, 2), height

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.height * (x.mean(1, keepdim=True) > 0.3)


class Rough(nn.Module):
    """So many bends that no number of points is enough."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(1e5 * x).sin().sum(1), x.sum(1)], 1)


@for_each("of", ["logit", "probability", "loss"])
@for_each("baseline", [None, 0.5, -1])
def test_it_is_complete_on_a_trained_network(trained, of, baseline):
    net, x, labels = trained
    x, labels = x[:12], labels[:12]
    found = saliency(net, x, labels, method="integrated_gradients", of=of, baseline=baseline).flatten(1).sum(1)
    with torch.no_grad():
        start = torch.full_like(x, baseline or 0)
        difference = torch.stack([
            of_class(net, k, of)(x)[i] - of_class(net, k, of)(start)[i] for i, k in enumerate(labels)
        ])
    assert bool(((found - difference).abs() <= 1e-3 * difference.abs() + 1e-5).all())


def test_it_says_what_it_divides_up_and_what_it_misses(trained):
    net, x, labels = trained
    found = integrated_gradients(net, x[:40], labels[:40])
    with torch.no_grad():
        difference = (net(x[:40]) - net(0 * x[:40]))[torch.arange(40), labels[:40]].double()
    torch.testing.assert_close(found.difference, difference, rtol=1e-4, atol=1e-5)
    gap = found.attributions.double().flatten(1).sum(1) - found.difference
    torch.testing.assert_close(found.gap, gap, rtol=1e-3, atol=1e-4)
    assert bool(found.complete.all())
    assert bool((found.tolerance >= 1e-3 * found.difference.abs()).all())
    assert 32 <= int(found.points.min()) < int(found.points.max()) <= MOST_POINTS
    assert torch.equal(found.attributions, saliency(net, x[:40], labels[:40], method="integrated_gradients"))


@for_each("target", ["conv2", ("conv1", 3), ("fc1", 2)])
def test_it_is_complete_for_neurons(target):
    model, x = convolutional()
    layer, index = (target, slice(None)) if isinstance(target, str) else target
    found = saliency(model, x, target, method="integrated_gradients").flatten(1).sum(1)
    with torch.no_grad():
        at, start = (model.by_hand(v)[0][layer][-1][:, index].reshape(3, -1).mean(1) for v in (x, 0 * x))
    torch.testing.assert_close(found, at - start, rtol=1e-3, atol=1e-6)


@for_each("steps", [None, 1, 7])
@for_each("baseline", [None, 2.0])
def test_it_is_exact_for_a_linear_model(steps, baseline):
    model, x = nn.Linear(6, 3).double(), torch.randn(5, 6, dtype=torch.float64)
    found = saliency(model, x, 2, method="integrated_gradients", steps=steps, baseline=baseline)
    torch.testing.assert_close(found, model.weight[2].detach() * (x - (baseline or 0)))


@for_each("steps", [1, 2, 33, 100])
@for_each("of", ["logit", "probability", "loss"])
def test_a_number_of_steps_is_the_midpoint_sum(steps, of):
    model, x = convolutional()
    found = integrated_gradients(model, x, 1, steps=steps, of=of)
    torch.testing.assert_close(found.attributions, midpoint_sum(of_class(model, 1, of), x, 0 * x, steps))
    assert found.points.tolist() == [steps] * 3


def test_a_number_of_steps_of_a_neuron_is_the_midpoint_sum():
    model, x = convolutional()
    expected = midpoint_sum(lambda v: model.by_hand(v)[0]["conv2"][-1][:, 1].mean((1, 2)), x, 0 * x, 9)
    torch.testing.assert_close(saliency(model, x, ("conv2", 1), method="integrated_gradients", steps=9), expected)


BASELINES = {
    "number": lambda x: 0.3,
    "whole number": lambda x: 1,
    "sample": lambda x: torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x[0].shape),
    "batch": lambda x: x.flip(0) / 2,
    "float32": lambda x: torch.full(x.shape[1:], 0.25),
    "whole numbers": lambda x: torch.ones(x.shape[1:], dtype=torch.int64),
}


@for_each("kind", BASELINES)
def test_the_baseline_may_be_a_number_a_sample_or_a_batch(kind):
    model, x = convolutional(40)
    baseline = BASELINES[kind](x)
    everywhere = torch.as_tensor(baseline, dtype=x.dtype).expand_as(x)
    found = saliency(model, x, 1, method="integrated_gradients", steps=4, baseline=baseline)
    torch.testing.assert_close(found, midpoint_sum(of_class(model, 1), x, everywhere, 4))


def test_classes_stay_those_of_the_inputs_all_along_the_line():
    model, x = convolutional(6)
    model.fc2.bias.data.zero_()
    x *= 20
    classes = model(x).argmax(1)
    assert bool((classes != model(0 * x).argmax(1)).any())
    expected = torch.stack([midpoint_sum(of_class(model, int(k)), x, 0 * x, 8)[i] for i, k in enumerate(classes)])
    torch.testing.assert_close(saliency(model, x, method="integrated_gradients", steps=8), expected)


def test_samples_on_their_baseline_get_nothing():
    model, x = convolutional()
    found = integrated_gradients(model, x, 1, baseline=x)
    assert not found.attributions.any()
    assert bool(found.complete.all())


def test_each_sample_takes_as_many_points_as_it_needs():
    net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    net[0].bias.data.copy_(torch.linspace(-3, -1, 8))
    net[0].weight.data.fill_(1.0)
    x = torch.tensor([[0.1], [4.0]], dtype=torch.float64)
    points = integrated_gradients(net, x, 0, baseline=-0.1).points.tolist()
    assert points[0] == 32
    assert points[1] > 32


def test_samples_do_not_depend_on_the_others(trained):
    net, x, _ = trained
    together = integrated_gradients(net, x[:34], 3)
    for i in (0, 33):
        alone = integrated_gradients(net, x[i : i + 1], 3)
        torch.testing.assert_close(together.attributions[i : i + 1], alone.attributions, rtol=1e-2, atol=1e-3)


def test_a_jump_is_found_by_no_gradient_and_said():
    model, x = seeded(Step), torch.tensor([[1.0] * 4, [0.1] * 4, [2.0] * 4])
    with pytest.warns(UserWarning, match=r"2 of 3 samples are not complete to 0\.1 % after 2,048 points") as said:
        found = saliency(model, x, 0, method="integrated_gradients")
    assert len(said) == 1
    torch.testing.assert_close(found, model.linear.weight[0].detach() * x, rtol=1e-3, atol=1e-4)


def test_what_is_not_complete_can_be_read_off():
    model, x = seeded(Step), torch.tensor([[1.0] * 4, [0.1] * 4])
    found = integrated_gradients(model, x, 0)
    assert found.complete.tolist() == [False, True]
    torch.testing.assert_close(found.gap.float(), torch.tensor([-1.0, 0.0]), rtol=1e-3, atol=1e-4)


def test_who_names_the_steps_is_not_warned():
    saliency(seeded(Step), torch.ones(2, 4), 0, method="integrated_gradients", steps=50)  # warnings are errors


@for_each("count", [1, 3])
def test_there_are_never_more_points_than_the_most(count):
    x = torch.rand(count, 4, dtype=torch.float64)
    found = integrated_gradients(Rough(), x, 0)
    assert int(found.points.max()) <= MOST_POINTS


def test_it_stops_only_where_it_is_complete_or_has_taken_the_most_points(trained):
    net, x, _ = trained
    found = integrated_gradients(net, x[:48], [2, 7, 8] * 16, of="loss")
    assert bool((found.complete | (found.points >= MOST_POINTS)).all())


@for_each("sample, klass", [(1, 0), (9, 8)])
def test_a_continuous_model_is_not_said_to_jump(trained, sample, klass):
    net, x, _ = trained
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        saliency(net, x[sample : sample + 1], klass, method="integrated_gradients", of="probability")
    assert [str(one.message) for one in said if "jumps" in str(one.message)] == []


def test_half_precision_is_not_said_to_jump():
    saliency(seeded(ConvNet).bfloat16(), pictures(2)[0].bfloat16(), 1, method="integrated_gradients")


NO_BASELINES = {
    "word": "black",
    "list": [0.0, 1.0],
    "other shape": torch.zeros(3, 8, 9),
    "other batch": torch.zeros(2, 3, 8, 8),
    "no axes": torch.tensor(0.5),
    "nan": float("nan"),
    "infinite": float("inf"),
    "flag": True,
    "tensor with nan": torch.full((3, 8, 8), float("nan")),
}


@for_each("case", NO_BASELINES)
def test_a_baseline_that_is_none(case):
    question = seeded(ConvNet), pictures(3)[0], 1
    with pytest.raises(ArgumentError, match=r"baseline=.*number.*tensor of shape \(3, 8, 8\)"):
        saliency(*question, method="integrated_gradients", baseline=NO_BASELINES[case], steps=2)
    with pytest.raises(ArgumentError, match=r"baseline="):
        integrated_gradients(*question, baseline=NO_BASELINES[case], steps=2)


@for_each("number", [np.float32(0.5), np.float64(0.5), np.int64(2)])
def test_a_baseline_may_be_a_number_of_numpy(number):
    question = seeded(ConvNet), pictures(3)[0], 1
    found = saliency(*question, method="integrated_gradients", baseline=number, steps=2)
    assert torch.equal(found, saliency(*question, method="integrated_gradients", baseline=float(number), steps=2))
