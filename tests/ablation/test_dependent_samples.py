"""Losses that are not those of single samples, and models that are run in unusual ways, are measured as they are."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import parametrizations
from torchmetrics.classification import MulticlassAccuracy

from lightning_neurons import ArgumentError, MeasurementError, ablate, ablate_together, ablation_curves, perturb
from tests.tables import for_each


def wide_net(norm: bool = False) -> nn.Module:
    """Activations of 128 KiB a sample: batches of more than 16 would be run in parts."""
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(32, track_running_stats=False)] if norm else []
    layers = [
        nn.Conv2d(1, 32, 3, padding=1),
        *middle,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 8),
    ]
    return nn.Sequential(*layers).eval()


def pictures(count: int = 40):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 32, 32, generator=generator), torch.arange(count) % 8


def small_net(double: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
    return net.double() if double else net


def vectors(count: int = 32, double: bool = False):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(2))
    return (x.double() if double else x), torch.arange(count) % 5


def change_without(net: nn.Module, layer: nn.Module, neuron: int, batch, loss_fn) -> float:
    """By a hook behind the layer's activation function, in one whole forward."""

    def silence(module, inputs, output):
        output = output.clone()
        output[:, neuron] = 0
        return output

    before = float(loss_fn(net, batch).detach())
    hook = layer.register_forward_hook(silence)
    after = float(loss_fn(net, batch).detach())
    hook.remove()
    return after - before


def contrastive(model, batch):
    z = F.normalize(model(batch[0]))
    return torch.logsumexp(z @ z.t(), 1).mean()


def weighted(model, batch):
    weight = torch.ones(8)
    weight[3] = 10
    return F.cross_entropy(model(batch[0]), batch[1], weight=weight)


def plain(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@for_each("loss_fn", [contrastive, weighted])
def test_a_loss_that_is_more_than_its_samples_is_that_of_the_whole_batch(loss_fn):
    net, batch = wide_net(), pictures()
    report = ablate(net, [batch], loss_fn, neurons={"0": [0, 5]})
    with torch.no_grad():
        assert report.loss == pytest.approx(loss_fn(net, batch).item(), rel=1e-6)
        for neuron in (0, 5):
            expected = change_without(net, net[1], neuron, batch, loss_fn)
            assert report.delta_loss["0"][neuron].item() == pytest.approx(expected, abs=1e-6)
    assert ablate_together(net, [batch], loss_fn, [{"0": [0]}]).loss == pytest.approx(report.loss, rel=1e-6)
    curves = ablation_curves(net, [batch], loss_fn, {"0": torch.rand(32)}, points=2, random_orders=1)
    assert curves.least_first[0].item() == pytest.approx(report.loss, rel=1e-6)
    with pytest.raises(MeasurementError, match=r"^budget: a race"):
        ablate(net, [batch], loss_fn, neurons={"0": [0, 5]}, budget=0.9)


def test_norm_layers_without_statistics_see_the_whole_batch():
    net, batch = wide_net(norm=True), pictures()
    report = ablate(net, [batch], plain, neurons={"0": [0, 5]})
    with torch.no_grad():
        for neuron in (0, 5):
            expected = change_without(net, net[2], neuron, batch, plain)
            assert report.delta_loss["0"][neuron].item() == pytest.approx(expected, abs=1e-6)


def test_ignored_samples_are_not_taken_for_nan():
    net, (x, y) = small_net(), vectors()

    def ignoring(model, batch):
        return F.cross_entropy(model(batch[0]), torch.where(batch[1] == 3, -100, batch[1]))

    report = ablate(net, [(x, y)], ignoring, neurons={"0": [1, 2]})
    with torch.no_grad():
        assert report.loss == pytest.approx(ignoring(net, (x, y)).item(), rel=1e-6)
        expected = change_without(net, net[1], 1, (x, y), ignoring)
    assert report.delta_loss["0"][1].item() == pytest.approx(expected, abs=1e-6)


def test_a_large_constant_hides_nothing():
    net, batch = small_net(double=True), vectors(double=True)
    weight = torch.ones(5).double()
    weight[1] = 10

    def shifted(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], weight=weight) + 2000

    report = ablate(net, [batch], shifted, neurons={"0": [0, 1, 2]})
    with torch.no_grad():
        for neuron in range(3):
            expected = change_without(net, net[1], neuron, batch, shifted)
            assert report.delta_loss["0"][neuron].item() == pytest.approx(expected, abs=1e-11)
    assert any("over batches" in note for note in report.notes)


def test_a_loss_may_differentiate_within():
    net, batch = small_net(), vectors()

    def penalised(model, batch):
        x = batch[0].clone().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(x), batch[1])
            (slope,) = torch.autograd.grad(loss, x)
        return loss.detach() + slope.square().sum()

    report = ablate(net, [batch], penalised, neurons={"0": [0, 4]})
    for neuron in (0, 4):
        expected = change_without(net, net[1], neuron, batch, penalised)
        assert report.delta_loss["0"][neuron].item() == pytest.approx(expected, abs=1e-6)


def test_scripted_parts_are_run_as_they_are():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            with pytest.warns(DeprecationWarning, match="script"):
                self.mid = torch.jit.script(nn.Linear(7, 7))
            self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 5)

        def forward(self, x):
            return self.b(self.mid(torch.relu(self.a(x))))

    torch.manual_seed(0)
    net, batch = Mixed().eval(), vectors()
    report = ablate(net, [batch], plain, neurons=["a", "b"])
    with torch.no_grad():
        off = net.b(net.mid(torch.relu(net.a(batch[0])).index_fill(1, torch.tensor([2]), 0)))
        expected = F.cross_entropy(off, batch[1]) - plain(net, batch)
    assert report.delta_loss["a"][2].item() == pytest.approx(expected.item(), abs=1e-6)


def test_weights_that_are_computed_cannot_be_shifted_neuron_by_neuron():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)), nn.ReLU(), nn.Linear(4, 5)).eval()
    with pytest.raises(ArgumentError, match=r"level='neuron'.*computed from others"):
        perturb(net, [vectors()], plain, level="neuron")
    assert len(perturb(net, [vectors()], plain, level="neuron", parameters=["2"]).rows) == 5


def test_shifts_are_seen_under_autocast():
    net, batch = small_net(), vectors()
    with torch.autocast("cpu", torch.bfloat16):
        report = perturb(net, [batch], plain, delta=0.5)
    assert all(row.delta_loss != 0 for row in report.rows)


@for_each("metric", [MulticlassAccuracy(5, average=None), MulticlassAccuracy(3)])
def test_a_metric_that_does_not_fit_is_named(metric):
    with pytest.raises(MeasurementError, match=r"metrics\['mine'\] has to make one number"):
        ablate(small_net(), [vectors()], plain, metrics={"mine": metric})


def test_a_loss_that_is_not_finite_is_noted():
    net, (x, y) = small_net(), vectors()
    report = ablate(net, [(x * torch.nan, y)], plain, neurons={"0": [0]})
    assert any("the loss of the unchanged model is nan" in note for note in report.notes)


def test_interrupted_sets_and_curves_keep_what_there_is():
    net, calls = small_net(), 0

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return plain(model, batch)

    found = ablate_together(net, [vectors(), vectors()], interrupted, [{"0": [i]} for i in range(8)])
    assert found.delta_loss[0].isfinite()
    assert found.delta_loss[7].isnan()
