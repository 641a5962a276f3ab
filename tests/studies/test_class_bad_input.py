"""What a class study refuses, and how it says so."""

import pytest
import torch
from torch import nn

from lightning_neurons import ArgumentError, MeasurementError, UnknownNameError, class_study
from tests.models import ConvNet, pictures, seeded
from tests.studies.silenced import batches_of, net_of

X, Y = pictures(12)


class Labelled(nn.Module):
    """It returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net_of()

    def forward(self, x):
        return {"logits": self.net(x)}


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
    "all neurons": ({"share": 1}, ArgumentError, "share=1 .* below 1"),
    "all importance": ({"cumulative": 1.0}, ArgumentError, "cumulative=1.0 .* below 1"),
    "no neurons": ({"share": 0}, ArgumentError, "share=0"),
    "two rules": ({"share": 0.5, "threshold": 0.1}, ArgumentError, "at most one of them"),
    "unknown importance": ({"importance": "mean_"}, UnknownNameError, "importance: .*Did you mean 'mean'"),
    "deadness": ({"importance": "dormant"}, UnknownNameError, "importance: nothing matches 'dormant'"),
    "unknown method": ({"method": "thresholds"}, ArgumentError, "did you mean 'thresholding'"),
    "unknown replacement": ({"replacement": "resample"}, ArgumentError, "replacement='resample'"),
    "no controls": ({"controls": 0}, ArgumentError, "controls=0"),
    "unknown layers": ({"layers": ["9"]}, UnknownNameError, "'9'"),
    "the output layer alone": ({"layers": ["6"]}, ArgumentError, "before the logits: 0, 3"),
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
        {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 4))}, ArgumentError, "layers that run before the logits"
    ),
    "a lazy model": (
        {"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.LazyLinear(4))}, ArgumentError, "materialised"
    ),
    "progress that is no flag": ({"progress": 1}, ArgumentError, "progress=1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
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
    assert all(torch.isfinite(torch.tensor(row[2:])).all() for row in report.accuracies)
