"""What a class study refuses, how it says so, and that it leaves no trace then."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_neurons import ArgumentError, MeasurementError, UnknownNameError, class_study, plan_keeping
from tests.ablation.silenced import batches_of, net_of
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each

X, Y = pictures(12)


class Labelled(nn.Module):
    """It returns a dictionary, in which nothing is called logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net_of()

    def forward(self, x):
        return {"one": self.net(x), "two": x}


def not_finite(value, sample=3):
    """The logits of one sample are not finite."""

    def forward(model, batch):
        logits = model(batch[0]).clone()
        logits[sample, 1] = value
        return logits

    return forward


def broken(layer, value):
    net = net_of()
    net.get_submodule(layer).bias.data[0] = value
    return net


BETWEEN = "a share between 0 and 1"
WRONG = {
    "a class without samples": ({"classes": [0, 3]}, ArgumentError, "classes=3 .* samples: 0, 1, 2"),
    "an unknown class": ({"classes": [17]}, ArgumentError, "classes=17"),
    "a negative class": ({"classes": [-1]}, ArgumentError, r"classes=\[-1\]"),
    "a class twice": ({"classes": [1, 1]}, ArgumentError, "each once"),
    "no classes": ({"classes": []}, ArgumentError, r"classes=\[\]"),
    "a number of classes": ({"classes": 3}, ArgumentError, "classes=3 .* a list of class numbers"),
    "names of classes": ({"classes": ["cat", "dog"]}, ArgumentError, "a list of class numbers"),
    "half a class": ({"classes": [0.5, 1]}, ArgumentError, "a list of class numbers"),
    "a threshold above all": ({"threshold": 1e9}, ArgumentError, "threshold=1.*class 0.*keeps nothing"),
    "a threshold below all": ({"threshold": -1e9}, ArgumentError, "threshold=-1.*class 0.*keeps everything"),
    "NaN": ({"threshold": float("nan")}, ArgumentError, "threshold=nan .* a number"),
    "all neurons": ({"share": 1}, ArgumentError, f"share=1.*{BETWEEN}"),
    "all importance": ({"cumulative": 1.0}, ArgumentError, f"cumulative=1.0.*{BETWEEN}"),
    "no importance": ({"cumulative": 0.0}, ArgumentError, f"cumulative=0.0.*{BETWEEN}"),
    "more than all": ({"share": 1.5}, ArgumentError, "share=1.5"),
    "less than none": ({"share": -0.1}, ArgumentError, "share=-0.1"),
    "a share that is NaN": ({"share": float("nan")}, ArgumentError, "share=nan"),
    "a share that is a flag": ({"share": True}, ArgumentError, "share=True"),
    "no neurons": ({"share": 0}, ArgumentError, f"share=0.*{BETWEEN}"),
    "importance with masking": (
        {"method": "masking", "importance": "fisher"}, ArgumentError, "importance='fisher'.*the default"
    ),
    "two rules": ({"share": 0.5, "threshold": 0.1}, ArgumentError, "at most one of them"),
    "unknown importance": ({"importance": "mean_"}, UnknownNameError, "importance: .*Did you mean 'mean'"),
    "deadness": ({"importance": "dormant"}, UnknownNameError, "importance: nothing matches 'dormant'"),
    "unknown method": ({"method": "thresholds"}, ArgumentError, "did you mean 'thresholding'"),
    "unknown replacement": ({"replacement": "resample"}, ArgumentError, "replacement='resample'"),
    "no controls": ({"controls": 0}, ArgumentError, "controls=0"),
    "unknown layers": ({"layers": ["9"]}, UnknownNameError, "'9'"),
    "the output layer alone": ({"layers": ["6"]}, ArgumentError, "layers that lead to those of the logits: 0, 3"),
    "no targets": ({"batches": [X]}, MeasurementError, "found no targets"),
    "targets that are floats": ({"batches": [(X, Y.float())]}, MeasurementError, "targets"),
    "targets beyond the outputs": ({"batches": [(X, Y + 1)]}, MeasurementError, "a target is 4, .* 4 outputs"),
    "the same, later": ({"batches": [(X, Y), (X, Y + 1)]}, MeasurementError, "a target is 4, .* 4 outputs"),
    "one class alone": ({"batches": [(X, Y * 0)]}, ArgumentError, "two classes or more"),
    "no batches": ({"batches": []}, MeasurementError, "no batch"),
    "batches without samples": ({"batches": [(X[:0], Y[:0])]}, MeasurementError, "no batch"),
    "a tensor": ({"batches": X}, ArgumentError, "an iterable of batches"),
    "no logits": ({"model": Labelled()}, MeasurementError, "returned dict: .* logits"),
    "logits with positions": (
        {"forward": lambda m, b: m(b[0])[..., None]}, MeasurementError, r"returned \(12, 4, 1\)"
    ),
    "no module": ({"model": ConvNet}, ArgumentError, "an instance, not its class"),
    "a function": ({"model": lambda x: x}, ArgumentError, "torch.nn.Module"),
    "no layers": ({"model": nn.Sequential(nn.Flatten(), nn.ReLU())}, (ArgumentError, MeasurementError), "layer"),
    "one layer": (
        {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 4))}, MeasurementError, "no layer leads to those"
    ),
    "a lazy model": (
        {"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.LazyLinear(4))}, ArgumentError, "materialised"
    ),
    "NaN for one sample": ({"forward": not_finite(float("nan"))}, MeasurementError, "not finite for 1 of 12 samples"),
    "infinity for one sample": ({"forward": not_finite(float("inf"))}, MeasurementError, "not finite for 1 of 12"),
    "NaN for all": ({"model": broken("6", float("nan"))}, MeasurementError, "not finite for 12 of 12"),
    "NaN for all, masking": (
        {"model": broken("6", float("nan")), "method": "masking"}, MeasurementError, "not finite"
    ),
    "infinity for one, masking": (
        {"forward": not_finite(float("inf")), "method": "masking", "replacement": "mean"},
        MeasurementError, "not finite"
    ),
    "NaN in a hidden layer": ({"model": broken("0", float("nan"))}, MeasurementError, "not finite"),
    "NaN in a hidden layer, a threshold": (
        {"model": broken("0", float("nan")), "threshold": 0.3}, MeasurementError, "not finite"
    ),
    "progress that is no flag": ({"progress": 1}, ArgumentError, "progress=1"),
}  # fmt: skip


@for_each("name", WRONG)
def test_bad_input(name):
    options, error, said = WRONG[name]
    given = {"model": net_of(), "batches": batches_of(12), **options}
    with pytest.raises(error, match=f"(?s){said}"):
        class_study(given.pop("model"), given.pop("batches"), **given)


def test_empty_batches_among_others_do_not_matter():
    net = seeded(ConvNet)
    (x, y), options = batches_of(12)[0], {"seed": 1}
    with_empty = class_study(net, [(x[:0], y[:0]), (x[:5], y[:5]), (x[5:], y[5:]), (x[:0], y[:0])], **options)
    assert with_empty.accuracies == class_study(net, [(x[:5], y[:5]), (x[5:], y[5:])], **options).accuracies


def test_a_layer_that_does_not_run_disturbs_nothing():
    net, batches = seeded(ConvNet), batches_of(12)
    expected = [class_study(net, batches, method=method).accuracies for method in ("thresholding", "masking")]
    net.unused = nn.Linear(3, 3)
    assert [class_study(net, batches, method=m).accuracies for m in ("thresholding", "masking")] == expected


def test_a_class_that_keeps_nothing_of_one_layer_is_noted():
    report = class_study(net_of(), batches_of(12), threshold=0.785)
    empty = [(k, layer) for k in report.classes for layer, kept in report.subnetwork(k).items() if not kept]
    assert empty
    for klass, layer in empty:
        assert f"class {klass} keeps no neuron of {layer}" in report.notes
    assert all(torch.isfinite(torch.tensor(row[2:6])).all() for row in report.accuracies)
    spread = [row for row in report.accuracies if row.model.startswith(("random", "other"))]
    assert all(torch.isfinite(torch.tensor(row.deviation)) for row in spread)


def test_a_plan_that_keeps_nothing_named_is_an_error():
    for kept in ({}, {"0": []}):
        with pytest.raises(ArgumentError, match="kept"):
            plan_keeping(net_of(), X[:1], kept)


def trace_of(net):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in net.modules()]
    ids = [id(t) for t in (*net.parameters(), *net.buffers())]
    return hooks, ids, {n: t.clone() for n, t in net.state_dict().items()}, torch.get_rng_state(), random.getstate()


@for_each("method", ["thresholding", "masking"])
@for_each("fails", [None, 0, 4, 12])
def test_the_model_is_left_as_it_was(fails, method):
    net, calls = seeded(ConvNet).train(), []
    net.bn2.eval()
    before, array = trace_of(net), np.random.get_state()[1].copy()

    def forward(model, batch):
        calls.append(1)
        torch.rand(1)
        if fails is not None and len(calls) > fails:
            raise ZeroDivisionError("stop")
        return model(batch[0])

    if fails is None:
        class_study(net, batches_of(8, 4), method=method, replacement="mean", forward=forward)
    else:
        with pytest.raises(ZeroDivisionError, match="stop"):
            class_study(net, batches_of(8, 4), method=method, forward=forward)
    after = trace_of(net)
    assert (before[:2], before[4]) == (after[:2], after[4])
    assert all(torch.equal(before[2][n], t) for n, t in after[2].items())
    assert torch.equal(before[3], after[3])
    assert (array == np.random.get_state()[1]).all()
