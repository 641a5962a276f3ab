"""What can be asked of ``measure`` besides the plain loss."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lightning_neurons import ArgumentError, logit, measure, predicted_logit
from tests.data.test_batches import Fixed
from tests.models import ConvNet, cross_entropy, pictures, seeded
from tests.tables import for_each

CRITERIA = ["gradient", "taylor", "fisher", "second_order"]


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for name in other:
        assert one[name].keys() == other[name].keys()
        for layer in other[name]:
            torch.testing.assert_close(one[name][layer], other[name][layer], rtol=1e-9, atol=1e-12, equal_nan=True)


def test_predicted_logit_asks_about_each_samples_largest_output():
    net, batch = seeded(ConvNet, double=True), pictures(double=True)
    found = measure(net, [batch], loss_fn=predicted_logit, criteria=CRITERIA)
    by_hand = measure(
        net, [batch], loss_fn=lambda m, b: m(b[0]).max(1).values.sum(), loss_reduction="sum", criteria=CRITERIA
    )
    assert_same(found.scores, by_hand.scores)


@for_each("index", [0, 2, -1])
def test_logit_asks_about_one_output(index):
    net, batch = seeded(ConvNet, double=True), pictures(double=True)
    found = measure(net, [batch], loss_fn=logit(index), criteria=CRITERIA)
    by_hand = measure(net, [batch], loss_fn=lambda m, b: m(b[0])[:, index], criteria=CRITERIA)
    assert_same(found.scores, by_hand.scores)
    assert found.scores["taylor"]["fc2"].nonzero().flatten().tolist() == [index % 4]


def test_a_logit_that_the_model_does_not_have_is_refused():
    with pytest.raises(ArgumentError, match=r"index=4 .* one of the model's 4 outputs"):
        measure(seeded(ConvNet), [pictures()], loss_fn=logit(4))


def test_fgsm_measures_on_inputs_shifted_along_the_sign_of_the_gradient():
    net = seeded(ConvNet, double=True)
    x, y = pictures(7, double=True)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), [leaf])
    shifted = x + 0.05 * slope.sign()
    seen = []

    def loss_fn(model, batch):
        seen.append(batch[0].detach().clone())
        return cross_entropy(model, batch)

    found = measure(net, [(x[:4], y[:4]), (x[4:], y[4:])], loss_fn=loss_fn, inputs="fgsm", eps=0.05, criteria=CRITERIA)
    assert torch.equal(seen[-1], shifted[4:])
    assert any(torch.equal(batch, shifted[:4]) for batch in seen)
    assert_same(found.scores, measure(net, [(shifted, y)], loss_fn=cross_entropy, criteria=CRITERIA).scores)
    raised = F.cross_entropy(net(shifted), y, reduction="none") > F.cross_entropy(net(x), y, reduction="none")
    assert raised.all()
    assert (found.settings["inputs"], found.settings["eps"]) == ("fgsm", 0.05)


def test_per_class_equals_measuring_each_class_alone():
    net = seeded(ConvNet, double=True)
    x, y = pictures(11, double=True)
    y[y == 2] = 3  # a class without samples in the middle
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    report = measure(net, batches, loss_fn=cross_entropy, per_class=True)
    assert report.class_counts == (3, 3, 0, 5)
    for klass in (0, 1, 3):
        alone = measure(net, [(x[y == klass], y[y == klass])], loss_fn=cross_entropy)
        for name, by_layer in {**alone.scores, **alone.deadness_by}.items():
            for layer, expected in by_layer.items():
                found = report.per_class[name][layer][klass]
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert report.per_class["taylor"]["conv1"][2].isnan().all()
    assert_same(report.scores, measure(net, batches, loss_fn=cross_entropy).scores)


def test_classes_may_come_from_a_function_of_the_batch():
    net, (x, y) = seeded(ConvNet), pictures()
    found = measure(net, [(x, F.one_hot(y))], per_class=lambda batch: batch[1].argmax(1))
    expected = measure(net, [{"x": x, "label": y}], per_class=True)
    assert found.class_counts == expected.class_counts == (2, 2, 1, 1)
    assert_same(found.per_class, expected.per_class)


def test_without_a_loss_activations_and_weights_alone_are_measured():
    net, batch = seeded(ConvNet), pictures()
    report = measure(net, [batch], criteria=["rms", "apoz", "weight_l2", "norm_scale"])
    assert set(report.scores) == {"rms", "weight_l2", "norm_scale"}
    assert set(report.deadness_by) == {"apoz"}
    assert list(report.scores["norm_scale"]) == ["conv1", "conv2"]
    assert "no normalisation layer" in report.refused["norm_scale"]["fc1"]
    expected = net.conv1.weight.detach().double().flatten(1).norm(dim=1)
    torch.testing.assert_close(report.scores["weight_l2"]["conv1"], expected)


def test_outgoing_weights_are_known_for_a_chosen_layer_as_well():
    net, batch = seeded(ConvNet), pictures()
    expected = net.conv2.weight.detach().double().transpose(0, 1).flatten(1).abs().sum(1)
    report = measure(net, [batch], criteria=["outgoing_l1"], layers=["conv1"])
    assert report.refused.get("outgoing_l1", {}) == {}
    torch.testing.assert_close(report.scores["outgoing_l1"]["conv1"], expected)


@for_each("form", ["generator", "list", "tuple"])
def test_batches_may_be_any_iterable_and_are_read_once(form):
    net, (x, y) = seeded(ConvNet), pictures(6)
    reads = []

    def stream():
        for part in zip(x.split(2), y.split(2), strict=True):
            reads.append(1)
            yield part

    batches = stream() if form == "generator" else {"list": list, "tuple": tuple}[form](stream())
    report = measure(net, batches, loss_fn=cross_entropy)
    assert len(reads) == 3
    assert report.counts["conv1"].samples.tolist() == [6] * 6
    assert report.notes == ("measured on 6 samples",)


def test_batches_of_a_frozen_dataclass_are_measured():
    net, (x, y) = seeded(ConvNet), pictures(6)
    batch = Fixed(x, y, [str(i) for i in range(6)])
    found = measure(net, [batch], loss_fn=lambda m, b: F.cross_entropy(m(b.image), b.label), criteria=CRITERIA)
    assert_same(found.scores, measure(net, [(x, y)], loss_fn=cross_entropy, criteria=CRITERIA).scores)
