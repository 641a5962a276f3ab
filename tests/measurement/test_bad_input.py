"""What ``measure`` says when it cannot measure: the argument, what came, and what would work."""

import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lightning_neurons import ArgumentError, MeasurementError, UnknownNameError, measure
from tests.isolation.test_no_trace import state_of
from tests.models import ConvNet, cross_entropy, pictures, seeded
from tests.tables import for_each

IMPOSSIBLE = {
    "no batches": (MeasurementError, r"it gave no batch", {"batches": []}),
    "a generator that is used up": (MeasurementError, r"used up", {"batches": iter(())}),
    "a loss without gradients": (
        MeasurementError, r"does not depend on any watched layer.*loss_fn",
        {"loss_fn": lambda m, b: cross_entropy(m, b).detach()},
    ),
    "a loss under no_grad": (
        MeasurementError, r"no_grad.*loss_fn=", {"loss_fn": lambda m, b: torch.no_grad()(cross_entropy)(m, b)}
    ),
    "a loss that is a number": (
        MeasurementError, r"loss_fn returned float: expected a tensor", {"loss_fn": lambda m, b: 1.0}
    ),
    "a loss per class": (
        MeasurementError, r"shape \(6, 4\) for 6 samples.*one loss per sample", {"loss_fn": lambda m, b: m(b[0])}
    ),
    "a loss of another length": (
        MeasurementError, r"shape \(3,\) for 6 samples", {"loss_fn": lambda m, b: m(b[0])[:3, 0]}
    ),
    "a scalar where a loss per sample was announced": (
        MeasurementError, r"loss_reduction='none': expected one loss per sample", {"loss_reduction": "none"}
    ),
    "no targets for the classes": (
        MeasurementError, r"per_class=True: found no targets in a batch of type Tensor.*per_class=lambda",
        {"batches": [pictures()[0]], "loss_fn": lambda m, b: m(b).mean(), "per_class": True},
    ),
    "targets that are floats": (
        MeasurementError, r"per_class.*float32 \(6,\)", {"per_class": lambda b: b[1].float()}
    ),
    "targets that are negative": (
        MeasurementError, r"at least 0 per sample",
        {"batches": [(pictures()[0], torch.tensor([0, 1, -1, 2, 0, 1]))], "loss_fn": lambda m, b: m(b[0]).mean(),
         "per_class": True},
    ),
    "a negative threshold": (ArgumentError, r"threshold=-0.1 .* at least 0", {"threshold": -0.1}),
    "a threshold that is no number": (ArgumentError, r"threshold=nan", {"threshold": float("nan")}),
    "an infinite threshold": (ArgumentError, r"threshold=inf", {"threshold": float("inf")}),
    "a negative eps": (ArgumentError, r"eps=-1.0", {"inputs": "fgsm", "eps": -1.0}),
    "no eps for fgsm": (ArgumentError, r'eps=0.0 .*inputs="fgsm"', {"inputs": "fgsm"}),
    "an eps without fgsm": (ArgumentError, r'eps=0.1 .*inputs="fgsm"', {"eps": 0.1}),
    "an unknown criterion": (UnknownNameError, r"criteria: nothing matches 'gradeint'. Did you mean 'gradient'",
                             {"criteria": ["gradeint"]}),
    "criteria as one string": (
        ArgumentError, r"criteria='gradient' .* such as \['gradient'\]", {"criteria": "gradient"}
    ),
    "no criteria": (ArgumentError, r"criteria=\[\] .* at least one", {"criteria": []}),
    "gradients without a loss": (
        ArgumentError, r"loss_fn=None .* which fisher, taylor need",
        {"loss_fn": None, "criteria": ["taylor", "fisher", "rms"]},
    ),
    "layers as one string": (ArgumentError, r"layers='conv1'", {"layers": "conv1"}),
    "an unknown layer": (
        UnknownNameError, r"layers: nothing matches 'convv1'. Did you mean 'conv1'", {"layers": ["convv1"]}
    ),
    "batches without tensors": (MeasurementError, r"found no tensor", {"batches": [["a", "b"]]}),
}  # fmt: skip


@for_each("case", IMPOSSIBLE)
def test_the_message_names_what_came_and_what_would_work_and_the_model_stays_as_it_was(case):
    error, message, changed = IMPOSSIBLE[case]
    arguments = {"batches": [pictures()], "loss_fn": cross_entropy, **changed}
    net = seeded(ConvNet).train()
    before = state_of(net)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        measure(net, arguments.pop("batches"), **arguments)
    assert state_of(net) == before


@for_each("loss_fn", [None, lambda m, b: m(b[0]).square().mean()])
def test_a_model_without_layers_is_refused_and_told_how_to_register_one(loss_fn):
    net = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    with pytest.raises((ArgumentError, MeasurementError), match=r"(?i)no layer|register_layer"):
        measure(net, [(torch.randn(4, 3), torch.arange(4))], loss_fn=loss_fn)


def test_integer_inputs_cannot_be_shifted():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4))
    batch = torch.randint(0, 5, (6, 2)), torch.arange(6) % 4
    with pytest.raises(MeasurementError, match='no floating-point tensor to shift; use inputs="clean"'):
        measure(net, [batch], loss_fn=cross_entropy, inputs="fgsm", eps=0.1)


def test_a_loss_that_does_not_depend_on_the_inputs_cannot_shift_them():
    net = seeded(ConvNet)
    with pytest.raises(MeasurementError, match="does not depend on the inputs"):
        measure(net, [pictures()], loss_fn=lambda m, b: m(b[0].detach()).mean(), inputs="fgsm", eps=0.1)


def test_sampled_labels_need_logits():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return {"one": self.fc(x), "two": self.fc(-x)}

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0])["one"], batch[1])

    batch = torch.randn(6, 3), torch.arange(6) % 4
    with pytest.raises(MeasurementError, match=r"second_order_ggn draws labels .* got dict.*'second_order'"):
        measure(Two(), [batch], loss_fn=loss_fn, criteria=["second_order_ggn"])


def test_a_lazy_model_is_refused_before_anything_runs():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(ArgumentError, match="materialised layers; run one batch"):
        measure(net, [pictures()], loss_fn=cross_entropy)
    assert all(nn.parameter.is_lazy(p) for p in net.parameters())


def test_an_error_of_the_loss_function_itself_comes_through_unchanged():
    def broken(model, batch):
        raise KeyError("my own mistake")

    with pytest.raises(KeyError, match="my own mistake"):
        measure(seeded(ConvNet), [pictures()], loss_fn=broken)


def test_a_share_out_of_range_is_refused_when_neurons_are_selected():
    report = measure(seeded(ConvNet), [pictures()], loss_fn=cross_entropy)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ArgumentError, match="share="):
            report.select(share=share)
