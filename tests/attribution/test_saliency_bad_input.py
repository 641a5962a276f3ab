"""Every wrong argument is refused in words that name it and what would work."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import ArgumentError, MeasurementError, UnknownNameError, integrated_gradients, saliency
from lightning_neurons.attribution.saliency import METHODS
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each


def asked(target=1, *, model=None, x=None, **options):
    """The saliency of three pictures for a network with four classes."""
    model, x = seeded(ConvNet) if model is None else model, pictures(3)[0] if x is None else x
    return saliency(model, x, target, **options)


CLASSES = {
    "too large": (4, r"target=4 .*0 to 3"),
    "negative": (-1, r"target=-1 .*0 to 3"),
    "one too large": ([0, 7, 1], r"target=7 .*0 to 3"),
    "one negative": (torch.tensor([0, 1, -2]), r"target=-2 .*0 to 3"),
}


@for_each("case", CLASSES)
@for_each("method", METHODS)
@for_each("of", ["logit", "probability", "loss"])
def test_a_class_that_the_model_does_not_have(case, method, of):
    target, words = CLASSES[case]
    with pytest.raises(ArgumentError, match=words):
        asked(target, method=method, of=of)


WRONG = {
    "fraction": 1.0,
    "flag": True,
    "empty list": [],
    "flags": [True, False, True],
    "words": [1, "a", 2],
    "set": {1, 2, 3},
    "dict": {"class": 1},
    "numpy array": np.array([0, 1, 2]),
    "table": torch.zeros(3, 4, dtype=torch.int64),
    "tensor of a fraction": torch.tensor(1.0),
    "pair with a word": ("conv1", "2"),
    "pair with a fraction": ("conv1", 2.0),
    "pair with a flag": ("conv1", True),
    "three": ("conv1", 2, 3),
}


@for_each("case", WRONG)
def test_a_target_of_another_kind(case):
    with pytest.raises(ArgumentError, match=r'(?s)target=.*a class index.*\("layer", neuron\) or the name of a layer'):
        asked(WRONG[case])


@for_each("case", ["empty list", "numpy array", "table"])
def test_what_a_target_may_be_includes_a_class_per_sample(case):
    with pytest.raises(ArgumentError, match=r"one (class )?(per|for each)"):
        asked(WRONG[case])


PER_SAMPLE = {
    "too few": [1, 2],
    "too many": torch.tensor([1, 2, 3, 0]),
    "none": torch.tensor([], dtype=torch.int64),
    "fractions": torch.tensor([1.0, 2.0, 3.0]),
    "list of fractions": [1.0, 2.5, 0.0],
    "tensor of flags": torch.tensor([True, False, True]),
}


@for_each("case", PER_SAMPLE)
def test_classes_that_are_not_one_for_each_sample(case):
    with pytest.raises(ArgumentError, match=r"target=.*one whole number for each of the 3 samples"):
        asked(PER_SAMPLE[case])


@for_each("target", ["conv3", ("conv3", 1), "act"])
def test_an_unknown_layer_names_the_nearest(target):
    with pytest.raises(UnknownNameError, match=r"target: nothing matches .*Known: conv1, conv2, fc1, fc2"):
        asked(target)
    if target != "act":
        with pytest.raises(UnknownNameError, match=r"Did you mean 'conv[12]'"):
            asked(target)


@for_each("neuron", [6, -1, 10**9])
def test_a_neuron_that_the_layer_does_not_have(neuron):
    with pytest.raises(ArgumentError, match=r"target=\('conv1', .*neurons of 0 to 5 in 'conv1'"):
        asked(("conv1", neuron))


@for_each("of", ["loss", "probability"])
@for_each("target", ["conv1", ("conv1", 2)])
def test_only_classes_have_losses_and_probabilities(of, target):
    with pytest.raises(ArgumentError, match=rf'of=\'{of}\' .*"logit" where target is a neuron or a layer'):
        asked(target, of=of)


OPTIONS = {
    "method, nearly": (
        {"method": "grad_camm"},
        r"method='grad_camm' .*'integrated_gradients'.*did you mean 'grad_cam'",
    ),
    "method, far": ({"method": "lime"}, r"method='lime' .*'gradient', 'grad_x_input', 'smoothgrad'"),
    "method, none": ({"method": None}, r"method=None .*'gradient'"),
    "of": ({"of": "logits"}, r"of='logits' .*did you mean 'logit'"),
    "absolute": ({"absolute": 1}, r"absolute=1 .*True or False"),
    "smoothing, negative": ({"smoothing": -0.5}, r"smoothing=-0\.5 .*at least 0"),
    "smoothing, nan": ({"smoothing": float("nan")}, r"smoothing=nan .*at least 0"),
    "smoothing, infinite": ({"smoothing": float("inf")}, r"smoothing=inf .*at least 0"),
    "smoothing, word": ({"smoothing": "1"}, r"smoothing='1' .*at least 0"),
    "smoothing, flag": ({"smoothing": True}, r"smoothing=True .*at least 0"),
    "seed": ({"seed": -1}, r"seed=-1 .*at least 0"),
    "samples, zero": ({"method": "smoothgrad", "samples": 0}, r"samples=0 .*at least 1"),
    "samples, fraction": ({"method": "smoothgrad", "samples": 2.0}, r"samples=2\.0 .*at least 1"),
    "noise, negative": ({"method": "smoothgrad", "noise": -0.1}, r"noise=-0\.1 .*a share in \[0, 1\]"),
    "noise, large": ({"method": "smoothgrad", "noise": 1.1}, r"noise=1\.1 .*a share in \[0, 1\]"),
    "steps, zero": ({"method": "integrated_gradients", "steps": 0}, r"steps=0 .*at least 1"),
    "steps, fraction": ({"method": "integrated_gradients", "steps": 1.5}, r"steps=1\.5 .*at least 1"),
    "forward": ({"forward": 3}, r"forward=3 "),
}


@for_each("case", OPTIONS)
def test_an_option_out_of_range(case):
    options, words = OPTIONS[case]
    with pytest.raises(ArgumentError, match=words):
        asked(**options)


OWNERS = {"samples": "smoothgrad", "noise": "smoothgrad", "steps": "integrated_gradients",
          "baseline": "integrated_gradients", "layer": "grad_cam"}  # fmt: skip
VALUES = {"samples": 4, "noise": 0.0, "steps": 4, "baseline": 0, "layer": "conv1"}


@for_each("option", OWNERS)
@for_each("method", METHODS)
def test_options_of_another_method(option, method):
    if OWNERS[option] == method:
        assert asked(method=method, **{option: VALUES[option]}).shape == (3, 3, 8, 8)
        return
    with pytest.raises(
        ArgumentError, match=rf'{option}=.*None with method="{method}"; it belongs to "{OWNERS[option]}"'
    ):
        asked(method=method, **{option: VALUES[option]})


@for_each("bad", [float("nan"), float("inf"), -float("inf")])
@for_each("method", METHODS)
def test_inputs_that_are_not_finite(bad, method):
    x = pictures(3)[0]
    x[1, 2, 3, 4] = bad
    with pytest.raises(ArgumentError, match=r"inputs=.*NaN or infinite.*finite values"):
        asked(x=x, method=method)


@for_each("method", METHODS)
@for_each("target", [1, None, "conv1", []])
def test_an_empty_batch(method, target):
    if target == []:
        target = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ArgumentError, match=r"inputs=\(0, 3, 8, 8\) .*at least one sample"):
        asked(target, x=torch.zeros(0, 3, 8, 8), method=method)


@for_each("method", METHODS)
@for_each("target", [1, None, ("fc1", 1)])
def test_a_size_that_the_model_refuses(method, target):
    words = r"ConvNet refuses inputs of shape \(3, 3, 9, 12\): RuntimeError: mat1 and mat2 .*"
    with pytest.raises(MeasurementError, match=words) as raised:
        asked(target, x=torch.rand(3, 3, 9, 12), method=method)
    assert isinstance(raised.value.__cause__, RuntimeError)


@for_each("model", [ConvNet, lambda x: x, "net"])
def test_what_is_no_model(model):
    with pytest.raises(ArgumentError, match=r"model=.*a torch\.nn\.Module \(an instance, not its class\)"):
        asked(model=model)
    with pytest.raises(ArgumentError, match=r"model=.*an instance"):
        integrated_gradients(model, pictures(3)[0], 1)


class Cut(ConvNet):
    """No gradient gets through."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            return super().forward(x.detach())
        if self.how == "ignore":
            return super().forward(torch.ones(x.shape))
        with torch.no_grad():
            return super().forward(x)


@for_each("how", ["detach", "no_grad", "ignore"])
@for_each("method", ["gradient", "grad_x_input", "smoothgrad", "integrated_gradients"])
@for_each("target, name", [(1, "class 1"), (("conv1", 2), "conv1 2")])
def test_a_model_that_lets_no_gradient_through(how, method, target, name):
    with pytest.raises(MeasurementError, match=rf"target: {name} does not depend on the inputs .*detach.*no_grad"):
        asked(target, model=seeded(Cut, how), method=method)


def test_a_target_that_does_not_run():
    model = seeded(ConvNet)
    model.spare = nn.Conv2d(3, 3, 3)
    with pytest.raises(ArgumentError, match=r"target or layer='spare' .*runs in the model's forward"):
        asked(("spare", 1), model=model)


def test_a_lazy_model():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(ArgumentError, match=r"model=.*run one batch through the model first"):
        asked(model=model)
    assert isinstance(model[1], nn.LazyLinear)


class Pair(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right


@for_each("form, names", [(tuple, "0, 1"), (list, "0, 1"), (dict, "left, right")])
def test_two_tensors_of_floating_point_are_refused(form, names):
    pair = {"left": torch.rand(2, 3), "right": torch.rand(2, 3)}
    with pytest.raises(ArgumentError, match=rf"inputs='{names}'.*one tensor of floating point.*forward="):
        saliency(Pair(), pair if form is dict else form(pair.values()), 1)


@for_each("inputs", [None, "text", 3, [], {}, {"x": 1}, [[1.0, 2.0]]])
def test_what_is_no_batch_is_refused(inputs):
    with pytest.raises(ArgumentError, match=r"inputs=.*a tensor, or a tuple or dict of tensors"):
        saliency(nn.Linear(2, 2), inputs, 1)
