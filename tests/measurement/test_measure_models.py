"""Models in unusual states: half precision, train mode, dead neurons, samples that are not finite, layers left out."""

import pytest
import torch
from torch import nn

from lightning_neurons import measure
from tests.measurement.test_measure_options import assert_same
from tests.models import ConvNet, cross_entropy, pictures, seeded
from tests.tables import for_each


@for_each("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_measured_and_come_close_to_single_precision(dtype):
    net, (x, y) = seeded(ConvNet), pictures(8)
    expected = measure(net, [(x, y)], loss_fn=cross_entropy)
    half = measure(net.to(dtype), [(x.to(dtype), y)], loss_fn=cross_entropy)
    assert {p.dtype for p in net.parameters()} == {dtype}
    for name in ("gradient", "rms"):
        for layer, score in expected.scores[name].items():
            torch.testing.assert_close(half.scores[name][layer], score, rtol=0.2, atol=0.02)
    assert half.scores["gradient"]["conv1"].sum().item() == pytest.approx(1)


def test_a_model_in_train_mode_is_measured_in_evaluation_mode_and_stays_in_train_mode():
    net, batch = seeded(ConvNet), pictures()
    expected = measure(net, [batch], loss_fn=cross_entropy)
    found = measure(net.train(), [batch], loss_fn=cross_entropy)
    assert all(module.training for module in net.modules())
    assert_same(found.scores, expected.scores)


@for_each("poison", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_counted_once_and_left_out(poison):
    net = seeded(ConvNet, double=True)
    x, y = pictures(6, double=True)
    bad = x.clone()
    bad[2, 0, 3, 3] = poison
    found = measure(net, [(bad[:4], y[:4]), (bad[4:], y[4:])], loss_fn=cross_entropy)
    rest = [0, 1, 3, 4, 5]
    expected = measure(net, [(x[rest], y[rest])], loss_fn=cross_entropy)
    assert_same(found.scores, expected.scores)
    unless_dead = {  # what was left out may have fired
        measure: {layer: silent.masked_fill(silent == 1, float("nan")) for layer, silent in by_layer.items()}
        for measure, by_layer in expected.deadness_by.items()
    }
    assert_same(found.deadness_by, unless_dead)
    for layer, counts in found.counts.items():
        assert counts.samples.tolist() == counts.gradient_samples.tolist() == [5] * len(counts.samples), layer
        assert counts.nonfinite.tolist() == [1] * len(counts.samples), layer


def test_a_dead_neuron_is_dead_by_its_activation_and_gate_but_not_by_its_gradient():
    net = seeded(ConvNet, double=True)
    with torch.no_grad():
        net.bn2.weight[3], net.bn2.bias[3] = 0, -1
    report = measure(net, [pictures(double=True)], loss_fn=cross_entropy)
    assert report.deadness["conv2"][3] == report.deadness_by["apoz"]["conv2"][3] == 1
    assert report.dead("conv2").nonzero().flatten().tolist() == [3]
    assert report.scores["taylor"]["conv2"][3] == report.scores["fisher"]["conv2"][3] == 0
    assert report.scores["gradient"]["conv2"][3] > 0


class Routed(nn.Module):
    """Each batch takes one of two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(torch.relu(self.left(x) if x.mean() < 0 else self.right(x)))


def test_a_layer_that_first_runs_in_a_later_batch_is_measured_from_the_next_one_on():
    net, x, y = seeded(Routed), torch.rand(6, 3), torch.arange(6) % 4
    report = measure(net, [(-x, y), (x, y), (x, y), (x, y)], loss_fn=cross_entropy)
    alone = measure(net, [(x, y)], loss_fn=cross_entropy)
    assert {layer.name: layer.calls for layer in report.layers} == {"left": 1, "right": 1, "head": 1}
    assert report.counts["left"].samples.tolist() == [6] * 5
    assert report.counts["right"].samples.tolist() == [12] * 5
    for name in ("taylor", "rms"):
        torch.testing.assert_close(report.scores[name]["right"], alone.scores[name]["right"])


def test_a_layer_whose_output_the_loss_does_not_see_is_marked_as_not_measured_or_scores_zero():
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aside, self.head = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 4)

        def forward(self, x):
            x = torch.relu(self.body(x))
            self.aside(x)
            return self.head(x)

    report = measure(seeded(Aside), [(torch.randn(6, 3), torch.arange(6) % 4)], loss_fn=cross_entropy)
    assert set(report.scores["taylor"]) == {"body", "aside", "head"}
    aside = report.scores["taylor"]["aside"]
    assert aside.isnan().all() or (aside == 0).all()
    assert report.scores["taylor"]["body"].isfinite().all()
