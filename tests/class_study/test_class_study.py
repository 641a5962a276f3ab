"""``class_study`` against loops over classes, with plain hooks on a network written by hand."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lightning_neurons import ArgumentError, ablate, class_study
from lightning_neurons.class_study.choice import random_members
from tests.ablation.silenced import (
    STUDIED,
    WIDTHS,
    accuracies_without,
    batches_of,
    class_means,
    each,
    entropy_of,
    losses_without,
    means_of,
    net_of,
    selectivity_of,
)
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each

KINDS = ["whole", "subnetwork", "ablation", "random subnetwork", "random ablation", "other subnetworks"]


def assert_row(row, found):
    """A row is the mean over networks, with the standard deviation of the accuracy on the class."""
    assert row[2:6] == pytest.approx(np.mean(found, 0).tolist())
    spread = np.std([one[1] for one in found], ddof=1) if len(found) > 1 else np.nan
    assert row.deviation == pytest.approx(spread, nan_ok=True, abs=1e-12)


@for_each("replacement", ["zero", "mean"])
@for_each("rule", [{}, {"share": 0.4}, {"cumulative": 0.6}, {"threshold": 0.3}])
def test_every_figure_equals_a_loop(rule, replacement):
    net, batches = net_of(), batches_of(7, 6, 8)
    means = means_of(net, batches) if replacement == "mean" else None
    report = class_study(net, iter(batches), replacement=replacement, controls=2, **rule)
    assert report.classes == (0, 1, 2)
    assert report.class_counts == (7, 7, 7)
    assert len({row.on_all for row in report.accuracies}) > 4
    expected = class_means(net, batches, [0, 1, 2])
    for layer in STUDIED:
        torch.testing.assert_close(report.importance[layer].double(), expected[layer], rtol=1e-5, atol=1e-6)
    assert list(report.members) == STUDIED
    generator = torch.Generator().manual_seed(0)
    draws = [random_members(report.members, generator) for _ in range(report.settings["controls"])]
    for row in report.accuracies:
        at, rest = report.classes.index(row.klass), [k for k in report.classes if k != row.klass]
        off = {
            "whole": [{}],
            "subnetwork": [report.outside(row.klass)],
            "ablation": [report.subnetwork(row.klass)],
            "random subnetwork": [{n: (~m[at]).nonzero().flatten().tolist() for n, m in d.items()} for d in draws],
            "random ablation": [{n: m[at].nonzero().flatten().tolist() for n, m in d.items()} for d in draws],
            "other subnetworks": [report.outside(k) for k in rest],
        }[row.model]
        assert_row(row, [accuracies_without(net, batches, one, row.klass, means) for one in off])
    assert [(row.klass, row.model) for row in report.accuracies] == [(k, kind) for k in (0, 1, 2) for kind in KINDS]


def top(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def fewest(scores, share):
    """The fewest of the largest positive scores that hold a share of their sum."""
    positive = [max(s, 0.0) for s in scores]
    for count in range(len(scores) + 1):
        if sum(sorted(positive)[::-1][:count]) >= share * sum(positive) - 1e-12:
            return top(positive, count)
    raise AssertionError


RULES = {
    "share": (0.6, lambda scores, value: top(scores, round(value * len(scores)))),
    "threshold": (0.2, lambda scores, value: [i for i, s in enumerate(scores) if s >= value]),
    "cumulative": (0.7, fewest),
}


@for_each("method", ["thresholding", "masking"])
@for_each("name", RULES)
def test_rules_choose_what_they_say(name, method):
    value, by_hand = RULES[name]
    value = 0.002 if name == "threshold" and method == "masking" else value
    report = class_study(net_of(), batches_of(12), method=method, **{name: value})
    for row, klass in enumerate(report.classes):
        for layer in STUDIED:
            scores = report.importance[layer][row].tolist()
            assert report.subnetwork(klass)[layer] == by_hand(scores, value)
            assert report.outside(klass)[layer] == sorted({*range(WIDTHS[layer])} - {*by_hand(scores, value)})


@for_each("replacement", ["zero", "mean"])
def test_masking_is_the_change_of_each_class_without_each_neuron(replacement):
    net, batches = net_of(), batches_of(6, 5)
    means = means_of(net, batches) if replacement == "mean" else None
    report = class_study(net, batches, method="masking", classes=[2, 0], replacement=replacement)
    measured = ablate(net, batches, each, per_class=True, replacement=replacement).per_class
    base = np.array(losses_without(net, batches, {}, means))
    for layer in STUDIED:
        torch.testing.assert_close(report.importance[layer], measured[layer][[2, 0]], rtol=0, atol=1e-12)
        by_hand = [losses_without(net, batches, {layer: [i]}, means) - base for i in range(WIDTHS[layer])]
        expected = torch.tensor(np.array(by_hand).T[[2, 0]])
        torch.testing.assert_close(report.importance[layer], expected, rtol=1e-4, atol=1e-6)
        assert report.entropy[layer].tolist() == pytest.approx([*map(entropy_of, by_hand)], abs=1e-3, nan_ok=True)
    assert report.settings["importance"] == "ablation"
    assert report.settings["controls"] == 3


@for_each("classes", [None, [2, 0], [1]])
def test_selectivity_and_entropy_are_over_all_classes_that_have_samples(classes):
    net, batches = net_of(), batches_of(16, 5)
    net[0].weight.data[2], net[0].bias.data[2] = 0, -1  # dead
    report = class_study(net, batches, classes=classes)
    for layer in STUDIED:
        magnitudes, scores = (
            class_means(net, batches, [0, 1, 2], magnitude=m)[layer].T.tolist() for m in (True, False)
        )
        wanted = [*map(selectivity_of, magnitudes)]
        assert report.selectivity[layer].tolist() == pytest.approx(wanted, abs=1e-5, nan_ok=True)
        assert report.entropy[layer].tolist() == pytest.approx([*map(entropy_of, scores)], abs=1e-4, nan_ok=True)
    assert (
        report.selectivity["0"].isnan().tolist() == report.entropy["0"].isnan().tolist() == [False, False, True, False]
    )


def test_random_controls_have_the_sizes_of_the_class():
    """A network that names the neurons that are on by what it answers."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head, self.seen = nn.Linear(4, 10), nn.Linear(10, 3), []
            nn.init.ones_(self.fc.bias)
            nn.init.zeros_(self.fc.weight)

        def forward(self, x):
            on = F.relu(self.fc(x))
            Counting.record.sizes.append(int(on[0].sum()))
            return self.head(on)

    Counting.record = Mock(sizes=[])  # a list in the body of the class would be put back
    data = [(torch.randn(6, 4), torch.arange(6) % 3)]
    report = class_study(Counting(), data, share=0.3, controls=5)
    assert {3, 7, 10} == {*Counting.record.sizes}
    assert (
        Counting.record.sizes.count(3) == Counting.record.sizes.count(7) == 1 + 5
    )  # the classes tie, so their sets are the same
    assert [row.model for row in report.accuracies] == KINDS * 3


def test_classes_may_be_chosen_and_are_seen_among_all_samples():
    net, batches = net_of(), batches_of(16, classes=4)
    report, whole = class_study(net, batches, classes=[3, 1]), class_study(net, batches)
    assert (report.classes, report.class_counts) == ((3, 1), (4, 4))
    for layer in STUDIED:
        assert torch.equal(report.members[layer], whole.members[layer][[3, 1]])
    for kind in (*KINDS[:3], KINDS[-1]):
        for klass in (3, 1):
            assert report.accuracy(kind, klass)[2:] == pytest.approx(whole.accuracy(kind, klass)[2:], nan_ok=True)
    single = class_study(net, batches, classes=[2])
    assert [row.model for row in single.accuracies] == KINDS
    others = [accuracies_without(net, batches, whole.outside(k), 2, None) for k in (0, 1, 3)]
    assert_row(single.accuracy("other subnetworks", 2), others)
    assert single.jaccard.tolist() == [[1.0]]


def test_sub_networks_of_several_classes_are_their_union():
    report = class_study(net_of(), batches_of(12), share=0.4)
    for layer in STUDIED:
        own = [{*report.subnetwork(k)[layer]} for k in (0, 1, 2)]
        assert report.subnetwork([2, 0])[layer] == sorted(own[0] | own[2])
        assert report.outside([2, 0])[layer] == sorted({*range(WIDTHS[layer])} - own[0] - own[2])
    assert report.shared_by.sum() == sum(WIDTHS[layer] for layer in STUDIED)
    for look_up in (lambda: report.subnetwork([0, 7]), lambda: report.outside(7), lambda: report.accuracy("whole", 7)):
        with pytest.raises(ArgumentError, match=r"7"):
            look_up()
    for look_up in (report.subnetwork, report.outside):
        with pytest.raises(ArgumentError, match=r"classes=\[\].*at least one class"):
            look_up([])
    with pytest.raises(ArgumentError, match="'subnetwork', 'ablation'"):
        report.accuracy("sub", 0)


def test_the_report_is_saved_as_json(tmp_path):
    report = class_study(net_of(), batches_of(12), threshold=0.3)
    report.save(tmp_path / "it.json")
    found = json.loads((tmp_path / "it.json").read_text(), parse_constant=pytest.fail)
    assert found["subnetworks"] == {str(k): report.subnetwork(k) for k in report.classes}
    assert found["accuracies"] == [
        {k: None if v != v else v for k, v in row._asdict().items()} for row in report.accuracies
    ]
    assert {row["model"] for row in found["accuracies"] if row["deviation"] is None} == {*KINDS[:3]}
    assert found["entropy"]["3"] == pytest.approx(report.entropy["3"].tolist(), nan_ok=True)
    assert (found["settings"]["threshold"], found["settings"]["layers"]) == (0.3, STUDIED)
    assert found["importance"]["0"] == report.importance["0"].tolist()


@for_each("method", ["thresholding", "masking"])
def test_any_cut_into_batches_gives_the_same(method):
    net = seeded(ConvNet)
    whole, cut = (class_study(net, batches_of(*s), method=method, seed=3) for s in ([20], [3, 1, 9, 7]))
    assert whole.accuracies == cut.accuracies
    for layer in whole.members:
        assert torch.equal(whole.members[layer], cut.members[layer])
        torch.testing.assert_close(cut.importance[layer], whole.importance[layer], rtol=1e-5, atol=1e-6)


def test_random_draws_follow_the_seed():
    studies = [class_study(net_of(), batches_of(20), controls=1, seed=s) for s in (1, 1, 2, 3)]
    assert studies[0].accuracies == studies[1].accuracies
    assert any(other.accuracies != studies[0].accuracies for other in studies[2:])
    assert studies[0].members["0"].equal(studies[2].members["0"])


def test_a_sub_network_knows_its_class_better_than_as_many_random_neurons():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for step in range(100):
        rows = slice(step * 12, step * 12 + 128)
        loss = F.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = class_study(net, [(x[1300:], y[1300:])], share=0.3)

    def mean(kind):
        return sum(report.accuracy(kind, k).on_class for k in range(10)) / 10

    assert mean("whole") > 0.8
    assert mean("subnetwork") > mean("random subnetwork") + 0.2
    assert mean("ablation") < mean("random ablation") - 0.1


def test_pictures_and_dictionaries_and_other_forwards_give_the_same():
    net, (x, y) = net_of(), pictures(12)
    expected = class_study(net, [(x, y)]).accuracies
    keyed = class_study(net, [{"image": x, "label": y}], forward=lambda m, b: m(b["image"]))
    assert keyed.accuracies == expected
