"""Races: estimates from some samples, what they decide, and that the right neurons are found for less."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from lightning_neurons import MeasurementError, ablate
from lightning_neurons.ablation.estimates import Estimates, decided
from tests.tables import for_each

CONFIDENCE = 0.9


def drawn(seed: int, n: int, controls: int = 2):
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(n, controls, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return 1.5 + c @ torch.arange(1.0, controls + 1).double() + 0.3 * noise, c


def estimates_of(y, c, seen: int, sizes=None, seed: int = 0) -> Estimates:
    """One neuron, measured on the first samples of the order."""
    estimates = Estimates(c[:, None], torch.ones(len(y)) if sizes is None else sizes, seed)
    for rows in estimates.order[:seen].split([7, 1, seen - 8]):
        estimates.add(0, y[rows])
    return estimates


def test_with_equal_sizes_it_is_a_regression_on_the_controls():
    y, c = drawn(0, 400)
    estimates = estimates_of(y, c, 60)
    middle, half = (float(value) for value in estimates.interval(CONFIDENCE))
    some, chance = estimates.order[:60], float(estimates._keys[60])
    design = np.column_stack([np.ones(60), c[some].numpy()])
    solution, residual, _, _ = np.linalg.lstsq(design, y[some].float().numpy().astype(float), rcond=None)
    assert middle == pytest.approx(solution @ np.append(1, c.mean(0).numpy()), rel=1e-4)
    error = np.sqrt(residual[0] * (1 - chance) / chance**2 * 60 / 57) / 400
    assert half == pytest.approx(error * stats.t.ppf(0.95, 57), rel=1e-3)


def test_all_samples_leave_no_doubt():
    y, c = drawn(0, 50)
    middle, half = estimates_of(y, c, 50, sizes=torch.rand(50) + 0.1).interval(CONFIDENCE)
    torch.testing.assert_close(middle, y.mean()[None], rtol=1e-6, atol=0)
    assert half.item() == 0


def test_a_control_that_explains_everything_leaves_next_to_nothing():
    _, c = drawn(0, 500)
    y = 2 - c[:, 0] + 3 * c[:, 1]
    middle, half = estimates_of(y, c, 40).interval(CONFIDENCE)
    assert middle.item() == pytest.approx(y.mean().item(), abs=1e-4)
    assert half.item() < 0.01 * y[:40].std() / np.sqrt(40)


def test_large_samples_come_early_and_each_as_often_as_its_size_says():
    sizes = torch.cat([torch.full((5,), 1e6), torch.arange(1.0, 46.0)])
    often = torch.zeros(50)
    for seed in range(400):
        order = Estimates(torch.zeros(50, 1, 0), sizes, seed).order
        assert {0, 1, 2, 3, 4} <= {*order[:12].tolist()}
        often[order[:12]] += 1 / 400
    expected = 7 * sizes[5:] / sizes[5:].sum()
    assert (often[5:] - expected).abs().max() < 0.1
    assert torch.corrcoef(torch.stack([often[5:], expected]))[0, 1] > 0.95


@for_each("scale", [1e-12, 1.0, 1e12])
@for_each("controls", [0, 1, 2])
@for_each("equal", [True, False])
def test_intervals_cover_the_mean_as_often_as_they_say(controls, scale, equal):
    """300 populations: the share that is covered is near the confidence."""
    covered = 0
    for seed in range(300):
        y, c = drawn(seed, 200, controls) if controls else (drawn(seed, 200)[0], torch.zeros(200, 0))
        sizes = torch.ones(200) if equal else 0.5 + torch.rand(200, generator=torch.Generator().manual_seed(seed))
        middle, half = estimates_of(scale * y, c, 60, sizes, 10_000 + seed).interval(CONFIDENCE)
        covered += int(abs(scale * y.mean() - middle.item()) <= half.item())
    assert abs(covered / 300 - CONFIDENCE) < 0.06


def intervals():
    one = st.tuples(st.integers(0, 6), st.integers(0, 3)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    return st.lists(one, min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(intervals(), st.data())
def test_decided_is_what_holds_wherever_in_their_intervals_the_values_lie(pairs, data):
    """By brute force over the ends: surely inside are those that are so in every order that is possible."""
    bottom = data.draw(st.integers(1, len(pairs)))
    low, high = torch.tensor(pairs, dtype=torch.float64).t().contiguous()
    inside, outside = decided(low, high, bottom)
    may_be_in, may_be_out = set(), set()
    for order in itertools.permutations(range(len(pairs))):
        reached, possible = -1, True  # the values can be chosen so that they rise in this order
        for i in order:
            reached = max(reached, pairs[i][0])
            possible &= reached <= pairs[i][1]
        if possible:
            may_be_in |= set(order[:bottom])
            may_be_out |= set(order[bottom:])
    surely_in = {i for i in range(len(pairs)) if i not in may_be_out}
    surely_out = {i for i in range(len(pairs)) if i not in may_be_in}
    found_in, found_out = set(inside.nonzero().flatten().tolist()), set(outside.nonzero().flatten().tolist())
    ends = [end for pair in pairs for end in set(pair)]
    if len(ends) == len(set(ends)):  # where intervals touch, either answer is right
        assert (found_in, found_out) == (surely_in, surely_out)
    assert surely_in <= found_in
    assert surely_out <= found_out


def net_and_data(samples: int = 400):
    """Twelve hidden units, the first four of which hardly matter."""
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    net[0].bias.data.fill_(0.5)
    signs = torch.tensor([[1.0, -1, 0], [0, 1, -1], [-1, 0, 1]]).repeat(1, 4)
    net[2].weight.data = signs * torch.tensor([0.01] * 4 + [1.5] * 8)
    x = torch.randn(samples, 6)
    y = torch.distributions.Categorical(logits=net(x)).sample()
    return net, x, y


def each(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_the_least_important_third_is_found_for_less():
    net, x, y = net_and_data()
    batches = list(zip(x.split(100), y.split(100), strict=True))
    whole = ablate(net, batches, each, neurons="0")
    report = ablate(net, batches, each, neurons="0", budget=0.8, bottom=1 / 3)
    exact, found = whole.delta_loss["0"], report.delta_loss["0"]
    assert exact.argsort()[:4].sort().values.tolist() == found.argsort()[:4].sort().values.tolist() == [0, 1, 2, 3]
    assert report.undecided == {}
    assert report.runs < 0.8 * whole.runs == 0.8 * 12
    assert ((exact - found).abs() <= 6 * report.standard_error["0"] + 1e-9).all()
    assert any("0 of 12 neurons undecided" in note for note in report.notes)


def test_samples_that_come_by_class_do_not_matter():
    net, x, y = net_and_data()
    order = y.argsort()
    by_class = list(zip(x[order].split(50), y[order].split(50), strict=True))
    exact = ablate(net, by_class, each, neurons="0").delta_loss["0"]
    report = ablate(net, by_class, each, neurons="0", budget=0.6, bottom=1 / 3)
    assert sorted(report.delta_loss["0"].argsort()[:4].tolist()) == [0, 1, 2, 3]
    assert ((exact - report.delta_loss["0"]).abs() <= 6 * report.standard_error["0"] + 1e-9).all()


def test_the_same_seed_gives_the_same_race_and_another_one_another():
    net, x, y = net_and_data()
    first, again, other = (ablate(net, [(x, y)], each, budget=0.5, seed=seed).delta_loss["0"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@for_each("budget", [1e-6, 0.3])
def test_with_a_tiny_budget_neurons_stay_undecided_and_the_budget_holds(budget):
    net, x, y = net_and_data(40)
    report = ablate(net, [(x, y)], each, neurons="0", budget=budget)
    assert report.undecided == {"0": tuple(range(12))}
    assert report.delta_loss["0"].isnan().all()
    assert report.runs <= max(budget * 12, 1.0)  # at least the loss itself
    assert any("12 of 12 neurons undecided" in note for note in report.notes)


def test_a_loss_that_cannot_be_differentiated_races_without_control_variates():
    net, x, y = net_and_data()

    def wrong(model, batch):
        return (model(batch[0]).argmax(1) != batch[1]).float()

    exact = ablate(net, [(x, y)], wrong, neurons="0")
    report = ablate(net, [(x, y)], wrong, neurons="0", budget=0.9)
    assert any("no control variates" in note for note in report.notes)
    gap = (exact.delta_loss["0"] - report.delta_loss["0"]).abs()
    assert (gap <= 6 * report.standard_error["0"] + 1e-9).all()


def test_losses_of_samples_are_needed_and_a_mean_is_taken_apart():
    net, x, y = net_and_data(100)
    mean = ablate(net, [(x, y)], lambda m, b: each(m, b).mean(), neurons="0", budget=0.9)
    single = ablate(net, [(x, y)], each, neurons="0", budget=0.9)
    torch.testing.assert_close(mean.delta_loss["0"], single.delta_loss["0"], rtol=1e-3, atol=1e-5)
    with pytest.raises(MeasurementError, match=r"budget: .* the loss of one depends on the others"):
        ablate(net, [(x, y)], lambda m, b: (m(b[0])[:, None] - m(b[0])).square().mean(), budget=0.9)


def test_few_samples_that_depend_on_their_batch_are_not_joined_either():
    def centred(model, batch):
        return F.cross_entropy(model(batch[0] - batch[0].mean(0)), batch[1], reduction="none")

    net, x, y = net_and_data(24)
    with pytest.raises(MeasurementError, match=r"budget: .* the loss of one depends on the others"):
        ablate(net, list(zip(x.split(8), y.split(8), strict=True)), centred, budget=0.9)


def test_batches_of_several_forms_cannot_be_shuffled():
    net, x, y = net_and_data(40)
    with pytest.raises(MeasurementError, match=r"budget.*one form"):
        ablate(net, [(x[:20], y[:20]), (x[20:], y[20:].float())], lambda m, b: m(b[0]).sum(1), budget=0.9)


def test_interrupted_a_race_returns_what_there_is():
    net, x, y = net_and_data()
    calls = 0

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return each(model, batch)

    report = ablate(net, [(x, y)], interrupted, neurons="0", budget=1.0, bottom=0.3)
    assert "interrupted" in report.notes
