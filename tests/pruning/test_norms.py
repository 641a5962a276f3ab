"""Running statistics estimated anew: those of fresh norm layers on the cut model, and only where the loss falls."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_neurons import ArgumentError, prune
from lightning_neurons.pruning.compensation.batch_norm import reestimate
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.trial_model import TrialModel
from lightning_neurons.pruning.surgery.surgery import TensorCut
from tests.models import ConvNet, cross_entropy, pictures, seeded
from tests.pruning.nets import Decoder, ResNet
from tests.tables import for_each

X, Y = pictures(24)
BATCHES = [(X[:4], Y[:4]), (X[4:14], Y[4:14]), (X[14:], Y[14:])]
PLANS = {
    "conv": (ConvNet, {"conv1": [0, 3], "conv2": [1]}),
    "residual": (lambda: ResNet(projection=True), {"conv1": [1]}),
}


def norms_of(model: nn.Module) -> dict[str, _NormBase]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _NormBase)}


def fitted(make) -> nn.Module:
    """A net whose running statistics are those of the data."""
    net = seeded(make)
    freshly(net, [x for x, _ in BATCHES])
    return net


def freshly(model: nn.Module, batches) -> None:
    """Reset the statistics, and take the plain mean of those of all batches."""
    before = {name: norm.momentum for name, norm in norms_of(model).items()}
    for norm in norms_of(model).values():
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for x in batches:
            model(x)
    model.eval()
    for name, norm in norms_of(model).items():
        norm.momentum = before[name]


def loss(model: nn.Module, loss_fn=cross_entropy) -> float:
    with torch.no_grad():
        total = sum(float(loss_fn(model, batch)) * len(batch[0]) for batch in BATCHES)
    return total / len(X)


def told(notes) -> tuple[float, float, str]:
    (note,) = [n for n in notes if "running statistics estimated anew" in n]
    form = r"calibration loss (\S+) without, (\S+) with running statistics estimated anew: (.*)"
    before, after, end = re.fullmatch(form, note).groups()
    return float(before), float(after), end


def restored(net: nn.Module):
    """A loss that falls the nearer a net comes to a fresh estimate, whatever it computes."""
    wanted = {name: n.running_var.clone() for name, n in norms_of(net).items()}
    return lambda model, batch: sum((n.running_var - wanted[name]).abs().sum() for name, n in norms_of(model).items())


@for_each("how", ["least_squares", "mean", "none"])
@for_each("name", PLANS)
def test_statistics_are_those_of_fresh_norm_layers_in_the_cut_model(name, how):
    make, plan = PLANS[name]
    net, expected = seeded(make), seeded(make)
    prune(expected, X[:2], plan, BATCHES, compensation=how)
    freshly(expected, [x for x, _ in BATCHES])
    report = prune(
        net, X[:2], plan, BATCHES, compensation=how, reestimate_norms=True, loss_fn=restored(expected)
    )  # fmt: skip
    assert told(report.notes)[2] == "taken"
    assert told(report.notes)[1] < 1e-4 < told(report.notes)[0]
    for path, norm in norms_of(net).items():
        torch.testing.assert_close(norm.running_mean, norms_of(expected)[path].running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, norms_of(expected)[path].running_var, rtol=1e-4, atol=1e-5)
    weights = dict(expected.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in net.named_parameters()), "and nothing else changes"


@for_each("name", PLANS)
def test_they_are_taken_where_the_loss_falls(name):
    make, plan = PLANS[name]
    net, without, anew = (seeded(make) for _ in range(3))
    # Its statistics are out of date, and the loss is the distance from the net with those of the data.
    for one in (without, anew):
        prune(one, X[:2], plan, compensation="none")
    freshly(anew, [x for x, _ in BATCHES])
    distance = lambda model, batch: (model(batch[0]) - fitted_outputs(make, batch[0])).square().mean()
    report = prune(net, X[:2], plan, BATCHES, compensation="none", reestimate_norms=True, loss_fn=distance)
    before, after, end = told(report.notes)
    assert (end, after < before) == ("taken", True)
    assert before == pytest.approx(loss(without, distance), rel=1e-3)
    assert after == pytest.approx(loss(anew, distance), rel=1e-3) == pytest.approx(loss(net, distance), rel=1e-3)


def fitted_outputs(make, x):
    with torch.no_grad():
        return fitted(make)(x)


@for_each("name", PLANS)
def test_they_are_left_where_the_loss_rises(name):
    make, plan = PLANS[name]
    net, without, anew = seeded(make), seeded(make), seeded(make)
    # Statistics of other data than these: estimated anew, the net is another one. The loss is the distance from before.
    for one in (without, anew):
        prune(one, X[:2], plan, [X], compensation="least_squares")
    freshly(anew, [X])
    report = prune(net, X[:2], plan, [X], compensation="least_squares", reestimate_norms=True)
    before, after, end = told(report.notes)
    assert (end, before < after) == ("left as they were", True)
    with torch.no_grad():
        dense = seeded(make)(X)
        assert before == pytest.approx(float((without(X) - dense).square().mean()), rel=1e-3)
        assert after == pytest.approx(float((anew(X) - dense).square().mean()), rel=1e-3)
    assert all(torch.equal(t, without.state_dict()[n]) for n, t in net.state_dict().items())


def test_norm_layers_by_instance_have_running_statistics_too():
    net, expected = seeded(Decoder), seeded(Decoder)
    prune(expected, X[:2], {"conv": [1, 3]}, [X], compensation="none")
    freshly(expected, [X])
    prune(
        net, X[:2], {"conv": [1, 3]}, [X], compensation="none", reestimate_norms=True, loss_fn=restored(expected)
    )  # fmt: skip
    for path, norm in norms_of(net).items():
        torch.testing.assert_close(norm.running_mean, norms_of(expected)[path].running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, norms_of(expected)[path].running_var, rtol=1e-4, atol=1e-5)


def test_modes_counts_and_momenta_stay_as_they_are():
    net = seeded(ConvNet).train()
    net.bn1.momentum, before = 0.25, copy.deepcopy(net.bn2.num_batches_tracked)
    report = prune(net, X[:2], {"conv1": [2]}, BATCHES, reestimate_norms=True)
    assert told(report.notes)[2] in ("taken", "left as they were")
    assert net.bn1.momentum == 0.25
    assert net.bn1.training
    assert torch.equal(net.bn2.num_batches_tracked, before)


@for_each("batches", [None, [], iter(())])
def test_they_are_estimated_on_batches(batches):
    net, before = seeded(ConvNet), seeded(ConvNet).state_dict()
    with pytest.raises(ArgumentError, match=r"batches=.* expected some batches, with reestimate_norms=True"):
        prune(net, X[:2], {"conv1": [1]}, batches, reestimate_norms=True)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_without_statistics_there_is_nothing_to_estimate():
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 2))
    x = torch.randn(8, 5)
    report = prune(net, x, {"0": [1]}, [x], reestimate_norms=True)
    assert "there are no running statistics to estimate anew" in report.notes


def test_two_processes_find_the_mean_over_all_batches():
    net, cuts = (
        seeded(ConvNet),
        [TensorCut("conv1", "makes", (1,)), TensorCut("bn1", "passes", (1,)), TensorCut("conv2", "reads", (1,))],
    )
    batches = [x for x, _ in BATCHES]

    def found(some, added=()):
        own, other = [], iter(added)

        def reduce(tensor):
            own.append(tensor.clone())
            return tensor + next(other, 0)

        trial = TrialModel(net, cuts)
        shifts = reestimate(trial, Calibration(some, lambda m, b: m(b), cross_entropy, reduce))
        return shifts, own, trial.twin

    alone, _, twin = found(batches)
    _, theirs, _ = found(batches[2:])
    both, _, _ = found(batches[:2], theirs)
    assert set(alone) == {f"{n}.{leaf}" for n in ("bn1", "bn2") for leaf in ("running_mean", "running_var")}
    for name, shift in alone.items():
        torch.testing.assert_close(both[name], shift)
        assert len(shift) == len(net.state_dict()[name]), "at the width before the cut"
    assert float(alone["bn1.running_mean"][1]) == 0
    expected = TrialModel(net, cuts).twin
    freshly(expected, batches)
    torch.testing.assert_close(twin.bn2.running_var, expected.bn2.running_var)
