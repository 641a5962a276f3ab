"""``perturb`` against the loop that people write by hand, number for number."""

import copy
import json
import math
import random
from itertools import chain, repeat
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lightning_neurons import ArgumentError, MeasurementError, UnknownNameError, perturb
from tests.ablation.perturbed import NETS, classic, data_for, neuron_loop
from tests.models import ConvNet, cross_entropy, pictures, seeded
from tests.tables import for_each


def pairs(report) -> list[tuple[str, float]]:
    return [(row.name, row.loss) for row in report.ranking()]


@for_each("name", NETS)
def test_the_ranking_is_that_of_the_classic_loop(name):
    net, batch, loss_fn = data_for(name)
    report = perturb(net, [batch], loss_fn)
    assert pairs(report) == classic(net, batch, loss_fn)
    assert report.loss == loss_fn(net, batch).item()
    assert report.samples == 6
    assert all(row.delta_loss == row.loss - report.loss and row.neuron is None for row in report.rows)
    assert [row.name for row in report.rows] == [n for n, _ in net.named_parameters() if "weight" in n]


LOSSES = {
    "that reads the weights": lambda m, b: cross_entropy(m, b) + sum(p.square().sum() for p in m.parameters()),
    "that calls the model twice": lambda m, b: cross_entropy(m, b) + m(b[0].flip(3)).square().mean(),
    "of a part of the model": lambda m, b: m.bn1(m.conv1(b[0])).square().mean(),
    "of nothing that is learnt": lambda m, b: b[0].mean() + 0 * m(b[0]).sum(),
}


@for_each("name", LOSSES)
def test_a_loss_may_be_anything(name):
    net, batch = seeded(ConvNet), pictures()
    assert pairs(perturb(net, [batch], LOSSES[name])) == classic(net, batch, LOSSES[name])


def test_a_layer_that_does_not_run_may_be_there():
    net, batch = seeded(ConvNet), pictures()
    net.unused = nn.Linear(3, 3)
    assert pairs(perturb(net, [batch], cross_entropy)) == classic(net, batch)


def test_in_double_precision_too():
    net, batch = seeded(ConvNet, double=True), pictures(double=True)
    found, expected = pairs(perturb(net, [batch], cross_entropy)), classic(net, batch)
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-15)


@for_each("change", [{}, {"delta": -0.7}, {"mode": "scale", "delta": 0.5}, {"mode": "scale", "delta": -1}])
@for_each("name", ["ResNet", "mobile", "upwards", "recurrent", "GELU transformer"])
def test_by_neuron_it_is_a_loop_over_rows(name, change):
    net, batch, loss_fn = data_for(name)
    delta = change.get("delta", 0.1)
    naive = (lambda w: w * (1 + delta)) if change.get("mode") else (lambda w: w + delta)
    expected = neuron_loop(net, batch, loss_fn, naive)
    report = perturb(net, [batch], loss_fn, level="neuron", **change)
    assert {row.name: row.loss for row in report.rows} == expected
    assert list(expected) == [row.name for row in report.rows]
    assert [row.neuron for row in report.rows] == [int(n.split("[")[1][:-1]) for n in expected]


@for_each("delta", [0.5, -0.25])
def test_scaling_multiplies(delta):
    net, batch = seeded(ConvNet), pictures()
    report = perturb(net, [batch], cross_entropy, mode="scale", delta=delta)
    for row in report.rows:
        changed = copy.deepcopy(net)
        with torch.no_grad():
            changed.get_parameter(row.name).mul_(1 + delta)
            assert row.loss == cross_entropy(changed, batch).item()


def test_noise_has_the_standard_deviation_that_was_asked_for_and_follows_the_seed():
    net, ones = nn.Linear(1, 400, bias=False), torch.ones(2, 1)

    def noise(**options):
        report = perturb(net, [ones], lambda m, b: m(b).double().sum(1), mode="noise", level="neuron", **options)
        return torch.tensor([row.delta_loss for row in report.rows])

    drawn = noise(delta=0.3)
    assert drawn.std() == pytest.approx(0.3, rel=0.1)
    assert abs(drawn.mean()) < 0.06
    assert torch.equal(drawn, noise(delta=0.3))
    assert (drawn - noise(delta=0.3, seed=10_000)).abs().max() > 0.1
    torch.testing.assert_close(noise(delta=0.6), 2 * drawn, rtol=1e-4, atol=1e-5)


def test_noise_does_not_depend_on_how_data_are_cut_into_batches():
    net, (x, y) = seeded(ConvNet), pictures(6)
    whole = perturb(net, [(x, y)], cross_entropy, mode="noise", delta=0.2, seed=3)
    cut = perturb(net, [(x[:2], y[:2]), (x[2:], y[2:])], cross_entropy, mode="noise", delta=0.2, seed=3)
    assert [r.loss for r in cut.rows] == pytest.approx([r.loss for r in whole.rows], rel=1e-5)


@for_each("reduction", ["mean", "sum"])
def test_several_batches_give_the_mean_over_samples(reduction):
    net, (x, y) = seeded(ConvNet), pictures(9)
    batches = list(zip(x.split([5, 1, 3]), y.split([5, 1, 3]), strict=True))
    loss_fn = lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction=reduction)
    report = perturb(net, (b for b in batches), loss_fn, loss_reduction=reduction)
    assert report.samples == 9
    for row in report.rows:
        changed = copy.deepcopy(net)
        with torch.no_grad():
            changed.get_parameter(row.name).add_(0.1)
            losses = [loss_fn(changed, b).item() * (len(b[1]) if reduction == "mean" else 1) for b in batches]
        assert row.loss == pytest.approx(sum(losses) / 9, rel=1e-12)


class Failing(ConvNet):
    """It stops at a call of its own."""

    told = Mock()  # whatever else counts would be put back after each run

    def forward(self, x):
        x = super().forward(x)
        self.told()
        return x


def trace_of(net):
    """All that a study could leave behind."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in net.modules()]
    tensors = [*net.parameters(), *net.buffers()]
    values = [(id(t), t.detach().clone(), t.requires_grad, t.grad) for t in tensors]
    return hooks, values, torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def assert_same_trace(before, after):
    assert (before[0], before[4]) == (after[0], after[4])
    assert torch.equal(before[2], after[2])
    assert (before[3] == after[3]).all()
    for (i, value, wants, grad), (j, other, wanted, gradient) in zip(before[1], after[1], strict=True):
        assert (i, wants, grad is None) == (j, wanted, gradient is None)
        assert torch.equal(value, other)


@pytest.mark.parametrize("level", ["parameter", "neuron"])
@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_nothing_is_left_behind_whatever_happens(error, level, monkeypatch):
    net, batch = seeded(Failing).train(), pictures()
    net.bn1.eval()
    net.fc2.weight.requires_grad_(False)
    before = trace_of(net)
    for left in (0,) if error is None else (0, 3, 6, 8):
        calls = None if error is None else chain(repeat(None, left), repeat(error("stop")))
        monkeypatch.setattr(Failing, "told", Mock(side_effect=calls))
        if error is None:
            perturb(net, [batch], cross_entropy, level=level, mode="noise")
        else:
            with pytest.raises(error, match="stop"):
                perturb(net, [batch], cross_entropy, level=level)
        assert_same_trace(before, trace_of(net))


def test_it_is_measured_in_evaluation_mode():
    net, batch = seeded(ConvNet), pictures()
    assert perturb(net.train(), [batch], cross_entropy).rows == perturb(net.eval(), [batch], cross_entropy).rows


class Fragile(nn.Module):
    """y = log(a + 10 b) + 1 / c of weights a, b and c."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("b", 1.0), ("c", 2.0), ("a", 1.0)):
            self.add_module(name, nn.Linear(1, 1, bias=False))
            self.get_parameter(f"{name}.weight").data.fill_(value)

    def forward(self, x):
        return (self.a(x) + 10 * self.b(x)).log() + 1 / self.c(x)


def test_losses_that_are_not_finite_come_last_and_are_said(tmp_path):
    report = perturb(Fragile(), [torch.ones(2, 1)], lambda m, b: m(b).mean(), delta=-2)
    assert [row.name for row in report.ranking()] == ["a.weight", "b.weight", "c.weight"]
    assert report.ranking()[0].loss == pytest.approx(math.log(9) + 0.5)
    assert math.isnan(report.rows[0].loss)
    assert report.rows[1].loss == math.inf
    assert [note for note in report.notes if "b.weight, c.weight" in note and "not finite" in note]
    report.save(tmp_path / "it.json")
    found = json.loads((tmp_path / "it.json").read_text(), parse_constant=pytest.fail)
    assert [row["loss"] for row in found["ranking"]] == [report.ranking()[0].loss, None, "inf"]
    assert (found["samples"], found["settings"]["delta"], found["loss"]) == (2, -2, report.loss)


def test_patterns_choose_parameters_and_layers():
    net, batch = seeded(ConvNet), pictures()
    names = [row.name for row in perturb(net, [batch], cross_entropy, parameters=["fc*.bias", "conv1.weight"]).rows]
    assert names == ["conv1.weight", "fc1.bias", "fc2.bias"]
    by_neuron = perturb(net, [batch], cross_entropy, level="neuron", parameters=["fc2"])
    assert [row.name for row in by_neuron.rows] == [f"fc2.weight[{i}]" for i in range(4)]


WRONG = {
    "no shift": ({"delta": 0}, ArgumentError, "delta=0 .* a number other than 0"),
    "NaN": ({"delta": math.nan}, ArgumentError, "delta=nan"),
    "infinity": ({"delta": math.inf}, ArgumentError, "delta=inf"),
    "no number": ({"delta": "0.1"}, ArgumentError, "delta='0.1'"),
    "negative noise": ({"delta": -1.0, "mode": "noise"}, ArgumentError, "delta=-1.0 .* a number above 0"),
    "unknown mode": ({"mode": "ad"}, ArgumentError, "mode='ad' .* did you mean 'add'"),
    "unknown level": ({"level": "neurons"}, ArgumentError, "level='neurons' .* did you mean 'neuron'"),
    "unknown reduction": ({"loss_reduction": "average"}, ArgumentError, "loss_reduction='average'"),
    "unknown parameter": ({"parameters": ["cnv1.weight"]}, UnknownNameError, "parameters: .* mean 'conv1.weight'"),
    "unknown layer": ({"parameters": ["cnv1"], "level": "neuron"}, UnknownNameError, "mean 'conv1'"),
    "one string": ({"parameters": "conv1.weight"}, ArgumentError, "list of patterns"),
    "no patterns": ({"parameters": []}, ArgumentError, r"parameters=\[\]"),
    "a layer without neurons": ({"parameters": ["bn1"], "level": "neuron"}, ArgumentError, "bn1"),
    "a class": ({"model": ConvNet}, ArgumentError, "an instance, not its class"),
    "no weights": ({"model": nn.ReLU()}, ArgumentError, 'parameters named "weight"'),
    "no neurons": ({"model": nn.BatchNorm2d(3), "level": "neuron"}, ArgumentError, "convolutional or linear"),
    "a module as loss": ({"loss_fn": nn.CrossEntropyLoss()}, ArgumentError, "loss_fn"),
    "no batches": ({"batches": []}, MeasurementError, "no batch"),
    "a loss that is a number": ({"loss_fn": lambda m, b: 1.0}, MeasurementError, "returned float"),
}


@for_each("name", WRONG)
def test_bad_input(name):
    options, error, said = WRONG[name]
    given = {"model": seeded(ConvNet), "batches": [pictures()], "loss_fn": cross_entropy, **options}
    with pytest.raises(error, match=said):
        perturb(given.pop("model"), given.pop("batches"), given.pop("loss_fn"), **given)
