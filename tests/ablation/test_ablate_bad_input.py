"""What ``ablate`` says when it cannot measure: the argument, what came, and what would work."""

import re

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_neurons import ArgumentError, MeasurementError, UnknownNameError, ablate
from tests.isolation.test_no_trace import state_of
from tests.models import ConvNet, cross_entropy, pictures, seeded
from tests.tables import for_each

NOTHING = (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))
IMPOSSIBLE = {
    "an unknown layer": (
        UnknownNameError, r"nothing matches 'convv1'. Did you mean 'conv1'", {"neurons": [("convv1", 0)]}
    ),
    "an unknown layer in a mapping": (UnknownNameError, r"'fc3'. Did you mean.*'fc", {"neurons": {"fc3": [0]}}),
    "an unknown pattern": (UnknownNameError, r"nothing matches 'con1'. Did you mean 'conv1'", {"neurons": "con1"}),
    "a pattern that matches nothing": (UnknownNameError, r"'head\.\*'", {"neurons": ["conv1", "head.*"]}),
    "a type without layers": (UnknownNameError, r"Conv1d.*Conv2d", {"neurons": [nn.Conv1d]}),
    "a module without neurons": (UnknownNameError, r"nothing matches 'bn1'", {"neurons": {"bn1": [0]}}),
    "a neuron out of range": (ArgumentError, r"\('fc1', 7\).*0 to 6 in 'fc1'", {"neurons": [("fc1", 7)]}),
    "a negative neuron": (ArgumentError, r"\('fc1', -1\).*0 to 6", {"neurons": {"fc1": [0, -1]}}),
    "a neuron twice": (ArgumentError, r"\('fc1', 2\).*once", {"neurons": [("fc1", 2), ("conv1", 2), ("fc1", 2)]}),
    "a neuron twice in a mapping": (ArgumentError, r"once", {"neurons": {"fc1": [3, 3]}}),
    "no neurons": (ArgumentError, r"neurons=\[\].*at least one", {"neurons": []}),
    "no layers": (ArgumentError, r"neurons=\{\}.*at least one", {"neurons": {}}),
    "a layer without neurons": (ArgumentError, r"at least one", {"neurons": {"fc1": []}}),
    "neurons=None": (ArgumentError, r"neurons=None", {"neurons": None}),
    "neurons=3": (ArgumentError, r"neurons=3 ", {"neurons": 3}),
    "a fraction of a neuron": (ArgumentError, r"1\.5", {"neurons": [("fc1", 1.5)]}),
    "True as a neuron": (ArgumentError, r"True", {"neurons": [("fc1", True)]}),
    "a word as neurons": (ArgumentError, r"neurons\['fc1'\]='abc'", {"neurons": {"fc1": "abc"}}),
    "names and pairs mixed": (ArgumentError, r"neurons='conv1'", {"neurons": ["conv1", ("fc1", 0)]}),
    "triples": (ArgumentError, r"\('fc1', 0, 1\)", {"neurons": [("fc1", 0, 1)]}),
    "no batches": (MeasurementError, r"batches=list: it gave no batch", {"batches": []}),
    "batches without samples": (MeasurementError, r"it gave no batch", {"batches": [NOTHING, NOTHING]}),
    "a generator that is used up": (MeasurementError, r"used up", {"batches": iter(())}),
    "one tensor": (ArgumentError, r"batches='Tensor'.*\[batch\]", {"batches": pictures()[0]}),
    "no iterable": (ArgumentError, r"batches='int'", {"batches": 3}),
    "batches=None": (ArgumentError, r"batches='NoneType'", {"batches": None}),
    "a module as loss": (
        ArgumentError, r"loss_fn='CrossEntropyLoss'.*\(model, batch\)", {"loss_fn": nn.CrossEntropyLoss()}
    ),
    "a class as loss": (ArgumentError, r"loss_fn='type'", {"loss_fn": nn.CrossEntropyLoss}),
    "no loss": (ArgumentError, r"loss_fn='NoneType'", {"loss_fn": None}),
    "a loss that is a number": (
        MeasurementError, r"loss_fn returned float: expected a tensor", {"loss_fn": lambda m, b: m(b[0]).mean().item()}
    ),
    "a loss that is None": (
        MeasurementError, r"returned NoneType", {"loss_fn": lambda m, b: [m(b[0])].clear()}
    ),
    "a loss per class": (
        MeasurementError, r"shape \(6, 4\) for 6 samples.*one loss per sample", {"loss_fn": lambda m, b: m(b[0])}
    ),
    "a loss of another length": (MeasurementError, r"\(3,\) for 6 samples", {"loss_fn": lambda m, b: m(b[0])[:3, 0]}),
    "a scalar where a loss per sample was announced": (
        MeasurementError, r"loss_reduction='none'.*one loss per sample", {"loss_reduction": "none",
        "loss_fn": lambda m, b: (m(b[0])[:, None] - m(b[0])[None]).square().mean()},
    ),
    "an unknown replacement": (ArgumentError, r"replacement='zeros'.*did you mean 'zero'", {"replacement": "zeros"}),
    "replacement=0": (ArgumentError, r"replacement=0 ", {"replacement": 0}),
    "replacement=None": (ArgumentError, r"replacement=None", {"replacement": None}),
    "a list as replacement": (ArgumentError, r"replacement=\['zero'\]", {"replacement": ["zero"]}),
    "an unknown reduction": (ArgumentError, r"loss_reduction='avg'", {"loss_reduction": "avg"}),
    "one metric": (ArgumentError, r"metrics=.*by name", {"metrics": MulticlassAccuracy(4)}),
    "a function as metric": (ArgumentError, r"metrics=.*by name", {"metrics": {"accuracy": len}}),
    "a class as metric": (ArgumentError, r"metrics=.*by name", {"metrics": {"accuracy": MulticlassAccuracy}}),
    "classes by number": (ArgumentError, r"per_class=3", {"per_class": 3}),
    "float targets": (MeasurementError, r"per_class.*float32 \(6,\)", {"per_class": lambda b: b[1].float()}),
    "too few targets": (MeasurementError, r"per_class", {"per_class": lambda b: b[1][:3]}),
    "no targets": (
        MeasurementError, r"per_class=True: found no targets", {"batches": [pictures()[0]], "per_class": True,
        "loss_fn": lambda m, b: m(b).square().mean(1)},
    ),
    "metrics without targets": (
        MeasurementError, r"metrics:.*targets", {"batches": [pictures()[0]], "metrics": {"a": MulticlassAccuracy(4)},
        "loss_fn": lambda m, b: m(b).square().mean(1)},
    ),
    "metrics without outputs": (
        MeasurementError, r"metrics:.*output", {"metrics": {"a": MulticlassAccuracy(4)},
        "loss_fn": lambda m, b: m(b[0]).sum(1) + m(b[0]).sum(1)},
    ),
    "budget=0": (ArgumentError, r"budget=0 ", {"budget": 0}),
    "a budget above 1": (ArgumentError, r"budget=1\.5", {"budget": 1.5}),
    "budget=nan": (ArgumentError, r"budget=nan", {"budget": float("nan")}),
    "budget=True": (ArgumentError, r"budget=True", {"budget": True}),
    "a budget in words": (ArgumentError, r"budget='half'", {"budget": "half"}),
    "bottom=0": (ArgumentError, r"bottom=0 ", {"budget": 0.5, "bottom": 0}),
    "bottom=1": (ArgumentError, r"bottom=1 ", {"budget": 0.5, "bottom": 1}),
    "bottom in words": (ArgumentError, r"bottom='few'", {"budget": 0.5, "bottom": "few"}),
    "confidence=1": (ArgumentError, r"confidence=1 ", {"budget": 0.5, "confidence": 1}),
    "a low confidence": (ArgumentError, r"confidence=0.3", {"budget": 0.5, "confidence": 0.3}),
    "a budget with metrics": (
        ArgumentError, r"budget=0.5.*metrics=", {"budget": 0.5, "metrics": {"a": MulticlassAccuracy(4)}}
    ),
    "a budget with classes": (ArgumentError, r"budget=0.5.*per_class=", {"budget": 0.5, "per_class": True}),
    "exact=1": (ArgumentError, r"exact=1 .*True or False", {"exact": 1}),
    "progress=None": (ArgumentError, r"progress=None", {"progress": None}),
    "no memory": (ArgumentError, r"memory_limit=0 ", {"memory_limit": 0}),
    "memory in words": (ArgumentError, r"memory_limit='1GB'", {"memory_limit": "1GB"}),
    "a seed in words": (ArgumentError, r"seed='x'", {"seed": "x"}),
    "half a seed": (ArgumentError, r"seed=0.5", {"seed": 0.5}),
    "a single sample to resample from": (
        MeasurementError, r'"resample".*larger batches', {"replacement": "resample", "batches": [pictures(1)]}
    ),
}  # fmt: skip


@for_each("case", IMPOSSIBLE)
def test_the_message_names_what_came_and_what_would_work_and_the_model_stays_as_it_was(case):
    error, message, changed = IMPOSSIBLE[case]
    arguments = {"batches": [pictures()], "loss_fn": cross_entropy, **changed}
    net = seeded(ConvNet).train()
    before = state_of(net)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        ablate(net, arguments.pop("batches"), arguments.pop("loss_fn"), **arguments)
    assert state_of(net) == before


@for_each("model, got", [(ConvNet, "ConvNet"), (None, "NoneType"), (len, "builtin")])
def test_what_is_no_model_is_refused(model, got):
    with pytest.raises(ArgumentError, match=f"model='{got}.*an instance, not its class"):
        ablate(model, [pictures()], cross_entropy)


def test_a_model_without_layers_is_refused_and_told_how_to_register_one():
    with pytest.raises(ArgumentError, match="register_layer"):
        ablate(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), [torch.randn(4, 3)], lambda m, b: m(b).mean())


def test_a_lazy_model_is_refused_before_anything_runs():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(ArgumentError, match="materialised layers; run one batch"):
        ablate(net, [pictures()], cross_entropy)
    assert all(nn.parameter.is_lazy(p) for p in net.parameters())


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.idle, self.fc = nn.Linear(3, 3), nn.Linear(192, 4)

    def forward(self, x):
        return self.fc(x.flatten(1))


@for_each("neurons", ["idle", [("idle", 0)], {"fc": [0], "idle": [1]}])
def test_a_layer_that_did_not_run_is_refused_if_it_was_named(neurons):
    with pytest.raises(MeasurementError, match="idle did not run as a module"):
        ablate(seeded(Idle), [pictures()], cross_entropy, neurons=neurons)


def test_a_layer_that_did_not_run_is_left_out_with_a_note_if_all_were_meant():
    report = ablate(seeded(Idle), [pictures()], cross_entropy)
    assert list(report.delta_loss) == ["fc"]
    assert any("did not run" in note and "idle" in note for note in report.notes)


def test_an_error_of_the_loss_function_itself_comes_through_unchanged():
    def broken(model, batch):
        raise KeyError("my own mistake")

    with pytest.raises(KeyError, match="my own mistake"):
        ablate(seeded(ConvNet), [pictures()], broken)


@for_each("worst", [float("nan"), float("inf")])
@for_each("reduced", [False, True])
def test_losses_that_are_not_finite_are_shown_as_they_are(worst, reduced):
    def loss_fn(model, batch):
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        losses = torch.where(batch[1] == 2, worst, losses)
        return losses.mean() if reduced else losses

    report = ablate(seeded(ConvNet), [pictures()], loss_fn, neurons="fc1")
    assert str(report.loss) == str(worst)
    assert report.delta_loss["fc1"].isnan().all()  # inf - inf, and nan
    assert report.ranking() == []


def test_a_loss_that_is_infinite_without_a_neuron_ranks_first():
    def loss_fn(model, batch):
        out = model(batch[0])
        return out.square().sum(1) + torch.where((out[:, 1] == 0).all(), torch.inf, 0.0)

    report = ablate(seeded(ConvNet), [pictures()], loss_fn, neurons="fc2")
    assert report.ranking()[0][:3] == ("fc2", 1, float("inf"))
    assert report.delta_loss["fc2"].isfinite().tolist() == [True, False, True, True]
