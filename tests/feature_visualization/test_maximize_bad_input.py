"""Arguments that ``maximize_activation`` cannot use: what it says, and that nothing has changed."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_neurons import ArgumentError, MeasurementError, UnknownNameError, maximize_activation
from tests.isolation.test_no_trace import state_of
from tests.models import ConvNet, seeded
from tests.tables import for_each

X = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GOOD = {"input_shape": (3, 8, 8), "value_range": (0.0, 1.0), "steps": 2}
NAN_PICTURE = torch.where(X > 0.99, torch.nan, X)
NOT_IN_RANGE = r"images=.*expected images in value_range=\(0.0, 1.0\).*mean= and std="

BAD = {
    "no shape": ({"input_shape": None}, r"input_shape=None.*shape of one input.*images="),
    "a number as shape": ({"input_shape": 8}, "input_shape=8.*shape of one input"),
    "text as shape": ({"input_shape": "388"}, "input_shape='388'.*shape of one input"),
    "an empty shape": ({"input_shape": ()}, r"input_shape=\(\).*shape of one input"),
    "a length of 0": ({"input_shape": (3, 0, 8)}, "input_shape=0.*at least 1"),
    "half a length": ({"input_shape": (3, 8.5, 8)}, "input_shape=8.5.*whole number"),
    "another shape than images": ({"input_shape": (3, 9, 9), "images": X}, r"input_shape=\(3, 9, 9\).*\(3, 8, 8\)"),
    "no range": ({"value_range": None}, "value_range=None.*least, largest.*images="),
    "a range the wrong way round": ({"value_range": (1, 0)}, r"value_range=\(1, 0\).*least, largest"),
    "a range of nothing": ({"value_range": (1, 1)}, r"value_range=\(1, 1\).*least, largest"),
    "an infinite range": ({"value_range": (0, torch.inf)}, r"value_range=.*least, largest"),
    "a NaN in the range": ({"value_range": (torch.nan, 1.0)}, r"value_range=.*least, largest"),
    "three in the range": ({"value_range": (0, 1, 2)}, r"value_range=.*least, largest"),
    "a number as range": ({"value_range": 1.0}, r"value_range=1.0.*least, largest"),
    "text as range": ({"value_range": "01"}, r"value_range='01'.*least, largest"),
    "normalised images": ({"images": 4 * X - 2}, NOT_IN_RANGE),
    "images too bright": ({"images": 255 * X}, NOT_IN_RANGE),
    "images of one value": ({"images": X * 0, "value_range": None}, "images='only 0.0'.*value_range="),
    "images with NaN": ({"images": NAN_PICTURE}, "images=.*finite values"),
    "images with infinity": ({"images": NAN_PICTURE.nan_to_num(torch.inf), "value_range": None}, "images=.*finite"),
    "a data set": ({"images": TensorDataset(X)}, "images='TensorDataset'.*iterable of batches"),
    "text as images": ({"images": "digits"}, "images='str'.*iterable of batches"),
    "no images": ({"images": X[:0]}, "images=.*at least one image"),
    "no batches": ({"images": []}, "images=.*at least one image"),
    "empty batches": ({"images": [X[:0]]}, "images=.*at least one image"),
    "images of two shapes": ({"images": [X, X[..., :5]], "input_shape": None}, r"images=.*of one shape, \(3, 8, 8\)"),
    "one number as images": ({"images": torch.tensor(0.5)}, "images=.*"),
    "numbers as images": ({"images": torch.rand(5), "input_shape": None}, "images=.*images of floating"),
    "whole numbers as images": ({"images": (255 * X).int()}, "images=.*images of floating"),
    "a std of 0": ({"std": 0}, "std=0.*above 0"),
    "a std of 0 in a channel": ({"std": [1, 0, 1]}, r"std=\[1, 0, 1\].*above 0"),
    "a negative std": ({"std": -1.0}, "std=-1.0.*above 0"),
    "a std of NaN": ({"std": torch.nan}, "std=nan.*a number, or one for each of the 3 channels"),
    "two means": ({"mean": [0.5, 0.5]}, r"mean=\[0.5, 0.5\].*one for each of the 3 channels"),
    "text as mean": ({"mean": "half"}, "mean='half'.*one for each of the 3 channels"),
    "an unknown parametrization": ({"parametrization": "furier"}, "parametrization='furier'.*did you mean 'fourier'"),
    "maco without images": ({"parametrization": "maco"}, "images=None.*maco"),
    "maco with grey": ({"parametrization": "maco", "start": "grey", "images": X}, "start='grey'.*noise.*maco"),
    "maco with blur": ({"parametrization": "maco", "blur": 1.0, "images": X}, "blur=1.0.*maco"),
    "fourier of a vector": ({"parametrization": "fourier", "input_shape": (3,)}, 'parametrization=.*"pixel" for'),
    "maco of a vector": (
        {"parametrization": "maco", "images": X[..., 0, 0], "input_shape": None}, 'parametrization=.*"pixel" for inputs'
    ),
    "an unknown validity": ({"validity": "clamp"}, "validity='clamp'.*'sigmoid', 'clip'"),
    "an unknown start": ({"start": "gray"}, "start='gray'.*did you mean 'grey'"),
    "a number as start": ({"start": 0.5}, "start=0.5.*an image"),
    "a start of another shape": ({"start": X}, r"start=\(5, 3, 8, 8\).*image of shape \(3, 8, 8\)"),
    "a start beyond the range": ({"start": 2 * X[0]}, "start=.*an image with values from 0 to 1, before"),
    "a start with NaN": ({"start": X[0] * torch.nan}, "start=.*expected an image with values from 0 to 1"),
    "the loss": ({"of": "loss"}, "of='loss'.*'logit', 'probability'"),
    "the probability of a neuron": ({"target": ("conv1", 1), "of": "probability"}, "of='probability'.*\"logit\""),
    "the probability less a neuron": ({"minus": ("conv1", 1), "of": "probability"}, "of=.*\"logit\" where minus"),
    "no such output": ({"target": 4}, "target=4.*0 to 3"),
    "a negative output": ({"target": -1}, "target=-1.*0 to 3"),
    "no such output to subtract": ({"minus": 99}, "minus=99.*0 to 3"),
    "no such neuron": ({"target": ("conv1", 6)}, r"target=\('conv1', 6\).*0 to 5 in 'conv1'"),
    "a negative neuron": ({"target": ("conv1", -1)}, r"target=\('conv1', -1\).*0 to 5"),
    "no such neuron to subtract": ({"minus": ("conv1", 6)}, r"minus=\('conv1', 6\).*0 to 5"),
    "half a neuron": ({"target": ("conv1", 1.5)}, "target=.*a class index"),
    "no targets": ({"target": []}, r"target=\[\].*at least one"),
    "half a class": ({"target": 1.5}, "target=1.5.*a class index"),
    "true as class": ({"target": True}, "target=True.*a class index"),
    "none as target": ({"target": None}, "target=None.*a class index"),
    "one of several": ({"target": [1, None]}, "target=None.*a class index"),
}  # fmt: skip

NUMBERS = [
    ("steps", [0, -1, 2.5, "3", None, True], "whole number of at least 1"),
    ("frames", [-1, 2.5, "3", None], "whole number of at least 0"),
    ("learning_rate", [-0.1, torch.nan, torch.inf, "fast"], "number of at least 0"),
    ("total_variation", [-0.1, torch.nan, torch.inf, "much", None], "number of at least 0"),
    ("l2", [-0.1, torch.nan, torch.inf, "much", None], "number of at least 0"),
    ("blur", [-0.1, torch.nan, torch.inf, "much", None], "number of at least 0"),
    ("jitter", [-0.1, 4.5, torch.nan, "much"], r"number in \[0, 4\]"),
    ("scale", [-0.1, 0.95, torch.nan, "much"], r"number in \[0, 0.9\]"),
    ("rotation", [-0.1, 181, torch.nan, "much"], r"number in \[0, 180\]"),
    ("seed", [-1, 0.5, "0", None, [], [0, -1], 2**63, np.arange(2)], "whole number"),
]
CASES = BAD | {
    f"{name}={value!r}": ({name: value}, f"{name}=.*{allowed}") for name, values, allowed in NUMBERS for value in values
}


@for_each("case", CASES)
def test_a_bad_argument_is_named_with_what_would_work(case):
    options, message = CASES[case]
    options = {"target": 1} | GOOD | options
    net, target = seeded(ConvNet).train(), options.pop("target")
    before, kept = state_of(net), copy.deepcopy(options.get("images")) if case not in ("a data set",) else None
    with pytest.raises(ArgumentError, match=re.compile(f"^{message}", re.DOTALL)) as caught:
        maximize_activation(net, target, **options)
    assert state_of(net) == before
    assert str(caught.value).endswith((".", "?"))
    if isinstance(kept, torch.Tensor):
        assert torch.equal(options["images"].nan_to_num(), kept.nan_to_num())


@for_each("target", ["conv3", ("conv3", 0), ("conv", 0)])
def test_an_unknown_layer_names_the_nearest(target):
    with pytest.raises(
        UnknownNameError, match=r"^target: nothing matches .*Did you mean 'conv1', 'conv2'|'conv2', 'conv1'"
    ):
        maximize_activation(seeded(ConvNet), target, **GOOD)
    with pytest.raises(UnknownNameError, match=r"^minus: nothing matches"):
        maximize_activation(seeded(ConvNet), 1, minus=target, **GOOD)


@for_each("option", [{"scale": 0.1}, {"rotation": 1}])
def test_signals_can_be_neither_turned_nor_grown(option):
    name = next(iter(option))
    with pytest.raises(ArgumentError, match=f"^{name}=.*without two axes of positions"):
        maximize_activation(nn.Flatten(), 1, input_shape=(2, 9), value_range=(0.0, 1.0), **option)
    with pytest.raises(ArgumentError, match=r"^jitter=1 is not allowed"):
        maximize_activation(nn.Flatten(), 1, input_shape=(9,), value_range=(0.0, 1.0), jitter=1)


@for_each("model", [ConvNet, lambda x: x, None, "net"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ArgumentError, match=r"^model=.*torch.nn.Module"):
        maximize_activation(model, 1, **GOOD)


@for_each("target", [1, ("conv1", 1), ("fc1", 2), "fc1"])
def test_a_shape_that_the_model_refuses_is_named_with_the_cause(target):
    net = seeded(ConvNet).train()
    before, shape = state_of(net), (4, 8, 8)
    with pytest.raises(
        MeasurementError, match=r"ConvNet refuses inputs of shape \(1, 4, 8, 8\): RuntimeError"
    ) as caught:
        maximize_activation(net, target, **(GOOD | {"input_shape": shape}))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert state_of(net) == before


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.relu(self.conv(x.detach())).mean((2, 3))


class WithoutGradients(Detached):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


@for_each("make", [Detached, WithoutGradients])
@for_each("target", [1, ("conv", 1), "conv"])
def test_a_model_that_detaches_its_input_is_refused(make, target):
    net = seeded(make).train()
    before = state_of(net)
    with pytest.raises(MeasurementError, match=r"^target: it does not depend on the inputs.*detach"):
        maximize_activation(net, target, total_variation=1.0, **GOOD)
    assert state_of(net) == before


def test_outputs_that_are_no_logits_are_refused():
    class Boxes(nn.Module):
        def forward(self, x):
            return [x, x]

    with pytest.raises(MeasurementError, match=r"returned list.*logits.*forward="):
        maximize_activation(Boxes(), 1, **GOOD)


def test_a_layer_that_does_not_run_is_refused():
    net = seeded(ConvNet)
    net.spare = nn.Linear(3, 3)
    with pytest.raises(ArgumentError, match=r"^target.*='spare'.*runs in the model's forward"):
        maximize_activation(net, ("spare", 1), **GOOD)


def test_a_range_that_is_taken_from_images_holds_all_of_them():
    images = torch.full((1500, 1, 4, 4), 0.5)
    images[:, :, 0] = 0.25
    images[1] = 1.0
    found = maximize_activation(nn.Flatten(), 1, images=images, steps=1)
    assert (found.range.low, found.range.high) == (0.25, 1.0)
    images[2] = 9.0
    with pytest.raises(ArgumentError, match="mean= and std="):
        maximize_activation(nn.Flatten(), 1, images=images, steps=1, value_range=(0.0, 1.0))
