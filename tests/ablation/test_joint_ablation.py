"""Several neurons at once against plain hooks, and cumulative curves against a loop."""

import math

import pytest
import torch

from lightning_neurons import (
    ArgumentError,
    MeasurementError,
    UnknownNameError,
    ablate,
    ablate_together,
    ablation_curves,
)
from lightning_neurons.results.ablation_report import AblationCurves
from tests.ablation.silenced import WIDTHS, batches_of, each, means_of, net_of, without
from tests.models import ConvNet, ResidualNet, cross_entropy, seeded
from tests.tables import for_each

SETS = [
    {"0": [1]},
    {"0": [0, 2], "3": [1, 4]},
    {"6": [3], "0": [3]},
    {"0": [0, 1, 2, 3], "3": [0, 1, 2, 3, 4]},
    {"3": [2], "6": [0, 1, 2, 3]},
]


def losses_without(net, batches, neurons, means=None):
    with without(net, neurons, means):
        return torch.cat([each(net, batch).double() for batch in batches])


def test_a_loss_that_is_one_number_is_that_of_a_forward_with_hooks_to_the_bit():
    net, (batch,) = net_of(), batches_of(6)
    loss_fn = lambda model, given: model(given[0]).square().mean().sqrt()
    found = ablate_together(net, [batch], loss_fn, SETS)
    with torch.no_grad():
        assert found.loss == loss_fn(net, batch).item()
    for neurons, delta in zip(SETS, found.delta_loss.tolist(), strict=True):
        with without(net, neurons):
            assert delta == loss_fn(net, batch).item() - found.loss


@for_each("replacement", ["zero", "mean"])
@for_each("loss_fn", [each, cross_entropy])
def test_changes_and_errors_equal_hooks(loss_fn, replacement):
    net, batches = net_of(), batches_of(5, 4, 4)
    means = means_of(net, batches) if replacement == "mean" else None
    found = ablate_together(net, iter(batches), loss_fn, SETS, replacement=replacement)
    whole = losses_without(net, batches, {})
    assert found.samples == 13
    assert found.loss == pytest.approx(whole.mean().item(), rel=1e-12)
    tolerance = {"rtol": 0, "atol": 1e-12 if replacement == "zero" else 1e-7}
    for row, neurons in enumerate(SETS):
        change = losses_without(net, batches, neurons, means) - whole
        torch.testing.assert_close(found.delta_loss[row], change.mean(), **tolerance)
        torch.testing.assert_close(found.standard_error[row], change.std() / math.sqrt(13), rtol=0, atol=1e-7)


def test_resampling_takes_the_same_other_sample_for_all_neurons_of_a_set():
    """A whole layer resampled: the losses are those of the logits of other samples."""
    net, batches = net_of(), batches_of(7)
    everything = {"3": list(range(5))}
    found = ablate_together(net, batches, each, [everything, {"6": [0, 1, 2, 3]}], replacement="resample", seed=4)
    assert found.delta_loss[0].item() == pytest.approx(found.delta_loss[1].item(), abs=1e-6)
    again = ablate_together(net, batches, each, [everything], replacement="resample", seed=4)
    assert torch.equal(again.delta_loss, found.delta_loss[:1])
    other = ablate_together(net, batches, each, [everything], replacement="resample", seed=5)
    assert not torch.equal(again.delta_loss, other.delta_loss)


def test_two_samples_can_only_change_places():
    net, (batch,) = net_of(), batches_of(2)
    found = ablate_together(net, [batch], each, [{"0": [0, 1, 2, 3]}], replacement="resample")
    with torch.no_grad():
        swapped = each(net, (batch[0].flip(0), batch[1])).double()
        assert found.delta_loss.item() == pytest.approx((swapped - each(net, batch).double()).mean().item(), abs=1e-6)


@for_each("replacement", ["zero", "mean", "resample"])
@for_each("make", [net_of, lambda: seeded(ResidualNet, inplace=True), lambda: seeded(ConvNet)])
def test_a_set_of_one_neuron_is_what_ablate_measures(make, replacement):
    net, batches = make(), batches_of(6, 3)
    report = ablate(net, batches, each, replacement=replacement, seed=2)
    pairs = [(layer, i) for layer, scores in report.delta_loss.items() for i in range(len(scores))]
    found = ablate_together(net, batches, each, [[pair] for pair in pairs], replacement=replacement, seed=2)
    expected = torch.cat(list(report.delta_loss.values()))
    torch.testing.assert_close(found.delta_loss, expected, rtol=0, atol=1e-12)
    assert found.neurons == tuple({layer: [i]} for layer, i in pairs)


def test_sets_may_be_patterns_and_need_little_memory():
    net, batches = net_of(), batches_of(6)
    found = ablate_together(net, batches, each, ["all", ["3", "0"], [("0", 2), ("0", 0)]])
    assert [{k: list(v) for k, v in one.items()} for one in found.neurons] == [
        {layer: list(range(width)) for layer, width in WIDTHS.items()},
        {"0": [0, 1, 2, 3], "3": [0, 1, 2, 3, 4]},
        {"0": [0, 2]},
    ]
    frugal = ablate_together(net, batches, each, found.neurons, memory_limit=1)
    assert torch.equal(frugal.delta_loss, found.delta_loss)


SCORES = {"0": torch.tensor([3.0, 1.0, torch.nan, 2.5]), "3": torch.tensor([0.5, 2.0, 2.0, torch.nan, -1.0])}
RANKED = [("0", 0), ("0", 3), ("3", 1), ("3", 2), ("0", 1), ("3", 0), ("3", 4)]


def mean_loss(net, batches, pairs):
    neurons = {layer: [i for name, i in pairs if name == layer] for layer in WIDTHS}
    return losses_without(net, batches, neurons).mean().item()


def test_curves_equal_a_loop():
    net, batches = net_of(), batches_of(5, 4)
    curves = ablation_curves(net, batches, each, SCORES, points=4, random_orders=3, seed=6)
    counts = [0, 2, 5, 7]
    assert curves.shares.tolist() == pytest.approx([count / 7 for count in counts])
    for found, order in ((curves.most_first, RANKED), (curves.least_first, RANKED[::-1])):
        assert found.tolist() == pytest.approx([mean_loss(net, batches, order[:n]) for n in counts], abs=1e-12)
    assert curves.random.shape == (3, 4)
    pairs_of_random = {round(loss, 12) for loss in curves.random[:, 1].tolist()}
    possible = {
        round(mean_loss(net, batches, [a, b]), 12) for i, a in enumerate(RANKED) for b in RANKED[:i]
    }  # fmt: skip
    assert pairs_of_random <= possible
    assert len(pairs_of_random) > 1


def test_curves_begin_at_the_loss_and_end_with_nothing_left():
    net, batches = net_of(), batches_of(8)
    curves = ablation_curves(net, batches, each, SCORES, points=2, random_orders=4)
    first, last = mean_loss(net, batches, []), mean_loss(net, batches, RANKED)
    for curve in (curves.least_first, curves.most_first, *curves.random):
        assert curve.tolist() == pytest.approx([first, last], abs=1e-12)
    assert curves.areas == pytest.approx(dict.fromkeys(curves.areas, (first + last) / 2))


def test_more_points_than_neurons_repeat_them():
    net, batches = net_of(), batches_of(4)
    curves = ablation_curves(net, batches, each, {"3": SCORES["3"].nan_to_num()}, points=21, random_orders=1)
    assert curves.shares.tolist() == sorted(curves.shares.tolist())
    assert len({*curves.shares.tolist()}) == 6
    for count in range(6):
        same = curves.most_first[curves.shares == count / 5]
        assert same.max() == same.min()
    assert curves.most_first[1].item() == pytest.approx(mean_loss(net, batches, []), abs=1e-12)


def test_orders_follow_the_seed_and_areas_are_right():
    net, batches = net_of(), batches_of(4)
    curves = [ablation_curves(net, batches, each, SCORES, points=5, seed=seed).random for seed in (1, 1, 2)]
    assert torch.equal(curves[0], curves[1])
    assert not torch.equal(curves[0], curves[2])
    by_hand = AblationCurves(
        torch.tensor([0.0, 0.25, 1.0]), torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1.0, 5.0, 5.0]),
        torch.tensor([[1.0, 1.0, 5.0], [1.0, 3.0, 5.0]]),
    )  # fmt: skip
    assert by_hand.areas == pytest.approx({"least_first": 3.5, "most_first": 4.5, "random": 3.0})


def test_a_layer_that_did_not_run_is_refused_as_by_ablate():
    net, batches = seeded(ConvNet), batches_of(4)
    net.unused = torch.nn.Linear(3, 3)
    with pytest.raises(MeasurementError, match=r"unused did not run"):
        ablate(net, batches, each, neurons={"unused": [0]})
    with pytest.raises(MeasurementError, match=r"unused did not run"):
        ablate_together(net, batches, each, [{"unused": [0]}])


def test_a_layer_that_does_not_run_disturbs_nothing():
    net, batches = seeded(ConvNet), batches_of(4)
    sets, scores = [{"conv1": [0, 2], "fc1": [3]}], {"fc1": torch.arange(7.0)}
    expected = ablate_together(net, batches, each, sets), ablation_curves(net, batches, each, scores, points=3)
    net.unused = torch.nn.Linear(3, 3)
    assert torch.equal(ablate_together(net, batches, each, sets).delta_loss, expected[0].delta_loss)
    assert torch.equal(ablation_curves(net, batches, each, scores, points=3).random, expected[1].random)


WRONG_SETS = {
    "nothing": ([], ArgumentError, "sets=\\[\\]"),
    "one set": ({"0": [1]}, ArgumentError, "a list of sets"),
    "a word": ("all", ArgumentError, "a list of sets"),
    "an empty set": ([{"0": [1]}, {}], ArgumentError, r"sets\[1\]"),
    "a set of empty layers": ([{"0": []}], ArgumentError, r"sets\[0\].* at least one neuron"),
    "an unknown layer": ([{"conv": [0]}], UnknownNameError, r"sets\[0\]"),
    "a neuron too many": ([{"0": [1]}, {"0": [4]}], ArgumentError, r"sets\[1\].*0 to 3"),
    "a neuron twice": ([{"0": [1, 1]}], ArgumentError, "each neuron once"),
    "a number": ([3], ArgumentError, r"sets\[0\]"),
}


@for_each("name", WRONG_SETS)
def test_bad_sets(name):
    sets, error, said = WRONG_SETS[name]
    with pytest.raises(error, match=said):
        ablate_together(net_of(), batches_of(4), each, sets)


WRONG_CURVES = {
    "one point": ({"points": 1}, ArgumentError, "points=1 .* at least 2"),
    "no random orders": ({"random_orders": 0}, ArgumentError, "random_orders=0"),
    "unknown replacement": ({"replacement": "zeros"}, ArgumentError, "did you mean 'zero'"),
    "unknown layer": ({"scores": {"7": torch.ones(4)}}, UnknownNameError, "nothing matches '7'"),
    "a pattern of layers": ({"scores": {"*": torch.ones(4)}}, ArgumentError, "scores"),
    "too few scores": ({"scores": {"0": torch.ones(3)}}, ArgumentError, r"scores\['0'\]=\(3,\) .* each of 4"),
    "a table": ({"scores": {"0": torch.ones(4, 2)}}, ArgumentError, r"scores\['0'\]=\(4, 2\)"),
    "no scores": ({"scores": {}}, ArgumentError, "scores="),
    "a tensor": ({"scores": torch.ones(4)}, ArgumentError, "scores by layer"),
    "lists": ({"scores": {"0": [1.0, 2.0, 3.0, 4.0]}}, ArgumentError, "scores by layer"),
    "NaN only": ({"scores": {"0": torch.full((4,), torch.nan)}}, ArgumentError, "at least one score"),
    "no batches": ({"batches": []}, MeasurementError, "no batch"),
}


@for_each("name", WRONG_CURVES)
def test_bad_curves(name):
    options, error, said = WRONG_CURVES[name]
    given = {"batches": batches_of(4), "scores": SCORES, **options}
    with pytest.raises(error, match=said):
        ablation_curves(net_of(), given.pop("batches"), each, given.pop("scores"), **given)
