"""The distillation loss and its gradient, against the formula written out in numpy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_neurons import PruningError
from lightning_neurons.pruning.distillation import checked_logits, distillation_gradient, distillation_loss
from tests.tables import for_each

SHAPES = [((5, 3), 1), ((1, 2), 1), ((4, 3, 6), 1), ((2, 4, 3, 5), 1), ((5, 3), -1), ((4, 6, 3), -1), ((2, 3, 5, 4), 3)]
TEMPERATURES = [0.5, 1.0, 2.0, 7.0]


def logits(shape: tuple[int, ...], seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(tensor: Tensor, class_axis: int) -> np.ndarray:
    """``(sample and position, class)``."""
    array = np.moveaxis(tensor.double().numpy(), class_axis, -1)
    return array.reshape(-1, array.shape[-1])


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def loss_by_hand(student: Tensor, teacher: Tensor, temperature: float, class_axis: int) -> float:
    """One position after the other."""
    found = []
    for s, t in zip(rows(student, class_axis), rows(teacher, class_axis), strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        found.append(sum(p[k] * (np.log(p[k]) - np.log(q[k])) for k in range(len(p))))
    return temperature**2 * float(np.mean(found))


def gradient_by_hand(
    student: Tensor, teacher: Tensor, temperature: float, weight: float, class_axis: int
) -> np.ndarray:
    """``weight * T * (softmax(student / T) - softmax(teacher / T)) / positions``, in the order of ``rows``."""
    pairs = list(zip(rows(student, class_axis), rows(teacher, class_axis), strict=True))
    found = [softmax(s / temperature) - softmax(t / temperature) for s, t in pairs]
    return weight * temperature * np.stack(found) / len(pairs)


@for_each("temperature", TEMPERATURES)
@for_each("shape, class_axis", SHAPES)
def test_the_loss_is_the_formula(shape, class_axis, temperature):
    student, teacher = logits(shape, 1), logits(shape, 2)
    found = distillation_loss(student.float(), teacher.float(), temperature=temperature, class_axis=class_axis)
    expected = loss_by_hand(student.float(), teacher.float(), temperature, class_axis)
    assert expected > 0
    assert float(found) == pytest.approx(expected, rel=1e-5)


@for_each("temperature", TEMPERATURES)
@for_each("shape, class_axis", SHAPES)
def test_the_gradient_is_the_difference_of_the_probabilities(shape, class_axis, temperature):
    student, teacher = logits(shape, 1).float(), logits(shape, 2).float()
    found = distillation_gradient(student, teacher, temperature=temperature, weight=0.7, class_axis=class_axis)
    expected = gradient_by_hand(student, teacher, temperature, 0.7, class_axis)
    assert found.shape == student.shape
    assert np.abs(expected).max() > 0
    assert rows(found, class_axis) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert np.abs(rows(found, class_axis).sum(-1)).max() < 1e-6  # probabilities sum to one on both sides


def test_the_default_is_a_temperature_of_two_on_the_second_axis():
    student, teacher = logits((3, 4, 5), 1), logits((3, 4, 5), 2)
    assert float(distillation_loss(student, teacher)) == pytest.approx(loss_by_hand(student, teacher, 2.0, 1), rel=1e-5)


def test_a_model_that_says_the_same_up_to_a_constant_learns_nothing():
    teacher = logits((6, 4), 3).float()
    same = teacher + torch.arange(6.0)[:, None]  # softmax does not see it
    options = {"temperature": 3.0, "class_axis": 1}
    assert float(distillation_loss(same, teacher, **options)) == pytest.approx(0, abs=1e-6)
    assert distillation_gradient(same, teacher, weight=5.0, **options).abs().max() < 1e-6


def test_a_weight_of_nothing_is_a_gradient_of_nothing_and_weights_are_factors():
    student, teacher = logits((6, 4), 3), logits((6, 4), 4)
    one, none, four = (
        distillation_gradient(student, teacher, temperature=2.0, weight=weight, class_axis=1) for weight in (1, 0, 4)
    )
    assert torch.equal(none, torch.zeros(6, 4))
    assert torch.equal(four, 4 * one)


@for_each("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradients_are_in_float32_and_those_of_what_the_logits_are(dtype):
    student, teacher = logits((6, 4), 3).to(dtype), logits((6, 4), 4).to(dtype)
    found = distillation_gradient(student, teacher, temperature=2.0, weight=1.0, class_axis=1)
    assert found.dtype == torch.float32
    assert rows(found, 1) == pytest.approx(gradient_by_hand(student, teacher, 2.0, 1.0, 1), rel=1e-4, abs=1e-7)


@for_each("context", [torch.no_grad, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_gradient_is_the_same_wherever_it_is_asked_for_and_leaves_no_graph(context):
    student, teacher = logits((6, 4), 3).float().requires_grad_(), logits((6, 4), 4).float().requires_grad_()
    options = {"temperature": 2.0, "weight": 1.0, "class_axis": 1}
    expected = distillation_gradient(student.detach(), teacher.detach(), **options)
    with context():
        found = distillation_gradient(student * 1, teacher * 1, **options)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert student.grad is None
    assert teacher.grad is None


def test_logits_far_apart_have_finite_losses_and_gradients():
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    assert float(distillation_loss(student, teacher, temperature=1.0)) == pytest.approx(2e4)
    gradient = distillation_gradient(student, teacher, temperature=1.0, weight=1.0, class_axis=1)
    assert gradient.tolist() == [[1.0, -1.0, 0.0]]


@for_each("other", [(5, 4), (4, 3), (5, 3, 1), (3,)])
def test_logits_of_other_shapes_are_refused_with_both_shapes(other):
    with pytest.raises(PruningError, match="they are not for the same classes") as refused:
        distillation_gradient(torch.zeros(5, 3), torch.zeros(other), temperature=1.0, weight=1.0, class_axis=1)
    assert str((5, 3)) in str(refused.value)
    assert str(other) in str(refused.value)


WANTED = torch.arange(6.0).view(2, 3)
IDS = torch.arange(6).view(2, 3)
OUTPUTS = {
    "a tensor": WANTED,
    "a tuple": (WANTED,),
    "a list beside whole numbers": [IDS, WANTED],
    "a dict": {"scores": WANTED, "ids": IDS},
    "a dict that names them": {"hidden": torch.zeros(2, 5), "logits": WANTED},
    "an object that names them": SimpleNamespace(hidden=torch.zeros(2, 5), logits=WANTED),
}


@for_each("name", OUTPUTS)
def test_logits_are_found_in(name):
    assert checked_logits(OUTPUTS[name], 1) is WANTED


NONE = {
    "nothing": (None, "has 0 tensors that could be logits"),
    "an empty tuple": ((), "has 0 tensors"),
    "whole numbers": (IDS, "has 0 tensors"),
    "an object without tensors": (SimpleNamespace(logits=None), "has 0 tensors"),
    "two tensors": ((WANTED, WANTED), r"has 2 tensors that could be logits \[\(2, 3\), \(2, 3\)\]"),
    "a dict of two": ({"a": WANTED, "b": torch.zeros(4)}, r"has 2 tensors .*\(4,\)"),
    "a number for each sample": (torch.zeros(7), r"shape \(7,\) has no logits of several classes on axis 1"),
    "one class": (torch.zeros(7, 1), r"shape \(7, 1\) has no logits of several classes on axis 1"),
    "a loss": (torch.zeros(()), r"shape \(\) has no logits"),
}


@for_each("name", NONE)
def test_outputs_without_one_set_of_logits_are_refused(name):
    output, message = NONE[name]
    with pytest.raises(PruningError, match=message):
        checked_logits(output, 1)


def test_classes_lie_on_the_axis_that_is_named():
    output = torch.zeros(2, 1, 4)
    assert checked_logits(output, -1) is output
    with pytest.raises(PruningError, match=r"on axis 1; pass output= or class_axis="):
        checked_logits(output, 1)


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(PruningError, match="on axis 2"):
        checked_logits(torch.zeros(2, 3), 2)
