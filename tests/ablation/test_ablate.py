"""``ablate`` against a loop over neurons with plain hooks, and against answers in closed form."""

import math
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_neurons import MeasurementError, ablate
from lightning_neurons.results.ablation_report import AblationReport
from tests.models import ConvNet, cross_entropy, pictures, seeded
from tests.tables import for_each

FINAL = {"0": "1", "3": "4", "6": "6"}
"""By layer of ``net_of``, the module whose output is its activation."""


def net_of() -> nn.Sequential:
    def make():
        layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.Tanh(), nn.Dropout()
        return nn.Sequential(*layers, nn.Linear(5, 4))

    return seeded(make)


def batches_of(*sizes: int):
    x, y = pictures(sum(sizes), classes=3)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def each(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def silenced_losses(net, layer, neuron, batches):
    """Losses of all samples, and outputs, with one channel or feature set to zero by a hook."""

    def hook(module, inputs, output):
        output = output.clone()
        output[:, neuron] = 0
        return output

    handle = None if layer is None else net.get_submodule(FINAL[layer]).register_forward_hook(hook)
    with torch.no_grad():
        outputs = torch.cat([net(x) for x, _ in batches])
    if handle is not None:
        handle.remove()
    targets = torch.cat([y for _, y in batches])
    return F.cross_entropy(outputs.double(), targets, reduction="none"), outputs, targets


WIDTHS = {"0": 4, "3": 5, "6": 4}
CHOSEN = [(layer, i) for layer, width in WIDTHS.items() for i in range(width)]


def test_changes_errors_classes_and_metrics_equal_a_loop():
    net, batches = net_of(), batches_of(5, 4, 4)
    accuracy = MulticlassAccuracy(4, average="micro")
    report = ablate(net, batches, each, metrics={"accuracy": accuracy}, per_class=True)
    base, outputs, targets = silenced_losses(net, None, 0, batches)
    right = (outputs.argmax(1) == targets).double()
    assert report.loss == pytest.approx(base.mean().item(), abs=1e-6)
    assert (report.samples, report.class_counts, report.runs) == (13, (5, 4, 4), 13.0)
    assert report.metrics["accuracy"] == pytest.approx(right.mean().item())
    for layer, i in CHOSEN:
        losses, outputs, _ = silenced_losses(net, layer, i, batches)
        delta, changed = losses - base, (outputs.argmax(1) == targets).double() - right
        assert report.delta_loss[layer][i].item() == pytest.approx(delta.mean().item(), abs=1e-6)
        error = delta.std().item() / math.sqrt(13)
        assert report.standard_error[layer][i].item() == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert report.delta_metrics["accuracy"][layer][i].item() == pytest.approx(changed.mean().item(), abs=1e-6)
        for klass in range(3):
            mine = targets == klass
            found = report.per_class[layer][klass, i].item(), report.per_class_error[layer][klass, i].item()
            error = delta[mine].std().item() / math.sqrt(mine.sum())
            assert found == pytest.approx((delta[mine].mean().item(), error), rel=1e-3, abs=1e-6)
            found = report.per_class_metrics["accuracy"][layer][klass, i].item()
            assert found == pytest.approx(changed[mine].mean().item(), abs=1e-6)


@for_each("exact", [True, False])
@for_each("sizes", [(13,), (1, 12), (6, 7), (3, 3, 3, 3, 1), (1,) * 13])
def test_the_way_samples_are_batched_does_not_matter(sizes, exact):
    expected = ablate(net_of(), batches_of(13), each)
    found = ablate(net_of(), batches_of(*sizes), each, exact=exact, memory_limit=2000)
    for layer in WIDTHS:
        torch.testing.assert_close(found.delta_loss[layer], expected.delta_loss[layer], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.standard_error[layer], expected.standard_error[layer], rtol=1e-3, atol=1e-6)


def test_a_mean_a_sum_and_losses_per_sample_give_the_same():
    batches = batches_of(5, 8)
    expected = ablate(net_of(), batches, each, per_class=True)
    mean = ablate(net_of(), batches, cross_entropy, per_class=True)
    total = ablate(net_of(), batches, lambda m, b: each(m, b).sum(), loss_reduction="sum", per_class=True)
    none = ablate(net_of(), batches, each, loss_reduction="none", per_class=True)
    for found in (mean, total, none):
        assert found.loss == pytest.approx(expected.loss, abs=1e-6)
        for layer in WIDTHS:
            for quantity in ("delta_loss", "standard_error", "per_class", "per_class_error"):
                pair = getattr(found, quantity)[layer], getattr(expected, quantity)[layer]
                torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-6)
        assert found.notes == ()


def by_the_part(model, batch):
    return F.cross_entropy(model[1:](model[0](batch[0])), batch[1])


def comparing(model, batch):
    scores = model(batch[0])
    return (scores[:, None] - scores[None]).square().mean()


@for_each("loss_fn", [by_the_part, comparing])
def test_losses_that_cannot_be_taken_apart_have_errors_over_batches(loss_fn):
    batches = batches_of(3, 5, 4)
    report = ablate(net_of(), batches, loss_fn)
    assert any("standard errors are over batches" in note for note in report.notes)
    n = torch.tensor([3.0, 5.0, 4.0], dtype=torch.float64)
    with torch.no_grad():
        base = torch.stack([loss_fn(net_of(), batch).double() for batch in batches])
    for layer, i in CHOSEN:
        net = net_of()
        net.get_submodule(FINAL[layer]).register_forward_hook(
            lambda m, x, out, i=i: out.index_fill(1, torch.tensor([i]), 0)
        )
        with torch.no_grad():
            delta = torch.stack([loss_fn(net, batch).double() for batch in batches]) - base
        mean = (n * delta).sum() / 12
        error = ((n * (delta - mean)).square().sum() / 144 * 3 / 2).sqrt()
        found = report.delta_loss[layer][i].item(), report.standard_error[layer][i].item()
        assert found == pytest.approx((mean.item(), error.item()), rel=1e-3, abs=1e-6)
    with pytest.raises(MeasurementError, match="one loss per sample"):
        ablate(net_of(), batches, loss_fn, per_class=True)


def test_under_a_linear_loss_the_change_is_the_gate_gradient_with_its_sign_turned():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(9, 3).double()
    report = ablate(net, [x[:4], x[4:]], lambda m, b: m(b).sum(1))
    hidden = torch.tanh(net[0](x))
    u = hidden * net[2].weight.sum(0)  # the derivative with respect to a gate on the neuron
    torch.testing.assert_close(report.delta_loss["0"], -u.mean(0).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(report.standard_error["0"], u.detach().std(0) / 3, rtol=1e-9, atol=1e-12)


def test_under_a_quadratic_loss_the_second_order_is_all_there_is():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 1)).double(), torch.randn(8, 3)
    batch = x.double(), torch.randn(8, 1).double()
    report = ablate(net, [batch], lambda m, b: (m(b[0]) - b[1]).square().mean() / 2)
    with torch.no_grad():
        hidden, w = torch.sigmoid(net[0](batch[0])), net[2].weight[0]
        u = (net(batch[0]) - batch[1]) * w * hidden
        expected = -u.mean(0) + w.square() * hidden.square().mean(0) / 2
    torch.testing.assert_close(report.delta_loss["0"], expected, rtol=1e-12, atol=1e-12)


@for_each("exact", [True, False])
def test_a_dead_neuron_changes_nothing_at_all_and_a_constant_one_nothing_if_its_mean_takes_its_place(exact):
    net = net_of()
    net[0].bias.data[2], net[0].weight.data[1], net[0].bias.data[1] = -1e6, 0, 0.5
    report = ablate(net, batches_of(5, 6), cross_entropy, exact=exact)
    assert (report.delta_loss["0"][2], report.standard_error["0"][2]) == (0, 0)
    assert report.delta_loss["0"][1] != 0
    report = ablate(net, batches_of(5, 6), cross_entropy, replacement="mean", exact=exact)
    assert (report.delta_loss["0"][1:3].tolist(), report.standard_error["0"][1:3].tolist()) == ([0, 0], [0, 0])


CHOICES = {
    "a name": ("3", [("3", i) for i in range(5)]),
    "a type by name": ("Conv2d", [("0", i) for i in range(4)]),
    "patterns": (["[03]"], CHOSEN[:9]),
    "types": ([nn.Linear], CHOSEN[4:]),
    "pairs": ([("6", 1), ("0", 3), ("6", 0)], [("0", 3), ("6", 0), ("6", 1)]),
    "a mapping": ({"3": [4, 0], "0": range(2)}, [("0", 0), ("0", 1), ("3", 0), ("3", 4)]),
    "tensors": ({"3": torch.tensor([1, 2])}, [("3", 1), ("3", 2)]),
    "a number": ({"3": 2}, [("3", 2)]),
    "all": ("all", CHOSEN),
}


@for_each("form", CHOICES)
def test_chosen_neurons_are_measured_as_among_all_and_the_rest_is_nan(form):
    neurons, expected = CHOICES[form]
    everything = ablate(net_of(), batches_of(5), each)
    report = ablate(net_of(), batches_of(5), each, neurons=neurons)
    assert list(report.delta_loss) == sorted({layer for layer, _ in expected})
    for layer, values in report.delta_loss.items():
        measured = [i for i, value in enumerate(values) if not value.isnan()]
        assert [(layer, i) for i in measured] == [pair for pair in expected if pair[0] == layer]
        assert torch.equal(values[measured], everything.delta_loss[layer][measured])
    assert report.runs == len(expected)
    assert len(report.ranking()) == len(expected)


def test_the_ranking_begins_with_what_hurts_most():
    report = ablate(net_of(), batches_of(5), each, neurons=["0", "6"])
    rows = report.ranking()
    assert [row.delta_loss for row in rows] == sorted((row.delta_loss for row in rows), reverse=True)
    assert {(row.layer, row.neuron) for row in rows} == {pair for pair in CHOSEN if pair[0] != "3"}
    assert report.ranking("6") == [row for row in rows if row.layer == "6"]
    assert all(row.standard_error == report.standard_error[row.layer][row.neuron] for row in rows)


def test_what_is_saved_is_read_again(tmp_path):
    def exploding(model, batch):
        return each(model, batch) + torch.where(model(batch[0])[:, 0] == 0, math.inf, 0.0)

    accuracy = {"accuracy": MulticlassAccuracy(4)}
    for loss_fn, options in (
        (each, {"metrics": accuracy, "per_class": True}),
        (exploding, {}),
        (each, {"budget": 0.9}),
    ):
        report = ablate(net_of(), batches_of(9, 4), loss_fn, neurons={"6": [0, 2]}, **options)
        report.save(tmp_path / "report.json")
        found = AblationReport.load(tmp_path / "report.json")
        assert repr(found) == repr(report)
        assert isinstance(found.loss, float)
    report = AblationReport(math.inf, 3, {"a": torch.tensor([-math.inf, math.nan])}, {"a": torch.ones(2)})
    report.save(tmp_path / "report.json")
    found = AblationReport.load(tmp_path / "report.json")
    assert (found.loss, found.delta_loss["a"][0].item()) == (math.inf, -math.inf)
    assert found.delta_loss["a"].isnan().tolist() == [False, True]


def test_interrupted_it_returns_what_there_is():
    calls = Mock()  # a number would be put back

    def interrupted(model, batch):
        calls()
        if calls.call_count == 60:
            raise KeyboardInterrupt
        return each(model, batch)

    report = ablate(net_of(), batches_of(3, 3, 3, 3, 3), interrupted)
    expected = ablate(net_of(), batches_of(3, 3, 3, 3, 3), each)
    assert any(note.startswith("interrupted") for note in report.notes)
    assert 0 < report.samples < 15
    assert len(report.ranking()) > 0
    assert not torch.equal(report.delta_loss["6"], expected.delta_loss["6"])


def test_a_bar_is_shown_if_asked_for(capsys):
    ablate(seeded(ConvNet), [pictures()], cross_entropy, neurons="fc2")
    assert capsys.readouterr().err == ""
    ablate(seeded(ConvNet), [pictures()], cross_entropy, neurons="fc2", progress=True)
    assert "4/4" in capsys.readouterr().err
