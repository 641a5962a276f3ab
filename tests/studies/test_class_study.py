"""``class_study`` against loops over classes, with plain hooks on a network written by hand."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lightning_neurons import ArgumentError, ablate, class_study
from tests.models import ConvNet, pictures, seeded
from tests.studies.silenced import WIDTHS, activations_of, batches_of, each, means_of, net_of, without

STUDIED = ["0", "3"]
KINDS = ["whole", "subnetwork", "ablation", "random subnetwork", "random ablation", "other subnetworks"]


def class_means(net, batches, classes, *, magnitude=False):
    """By layer, ``(class, neuron)``: the mean over the samples of a class and over positions."""
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    values = activations_of(net, x)
    values = {layer: v.abs() if magnitude else v for layer, v in values.items()}
    return {layer: torch.stack([values[layer][y == k].double().mean((0, 2)) for k in classes]) for layer in STUDIED}


def accuracies_without(net, batches, off, klass, means=None):
    """On all samples, on those of a class, on all others, and the mean of the last two."""
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    with without(net, off, means):
        right = (net(x).argmax(1) == y).double()
    own, others = right[y == klass].mean().item(), right[y != klass].mean().item()
    return right.mean().item(), own, others, (own + others) / 2


@pytest.mark.parametrize("replacement", ["zero", "mean"])
@pytest.mark.parametrize("rule", [{}, {"share": 0.4}, {"cumulative": 0.6}, {"threshold": 0.3}], ids=str)
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
    for row in report.accuracies:
        if row.model in KINDS[:3]:
            inside, outside = report.subnetwork(row.klass), report.outside(row.klass)
            off = {"whole": {}, "subnetwork": outside, "ablation": inside}[row.model]
            assert row[2:] == pytest.approx(accuracies_without(net, batches, off, row.klass, means))
        elif row.model == "other subnetworks":
            others = [report.outside(k) for k in (0, 1, 2) if k != row.klass]
            both = torch.tensor([accuracies_without(net, batches, off, row.klass, means) for off in others])
            assert row[2:] == pytest.approx(both.mean(0).tolist())
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


@pytest.mark.parametrize("method", ["thresholding", "masking"])
@pytest.mark.parametrize("name", RULES)
def test_rules_choose_what_they_say(name, method):
    value, by_hand = RULES[name]
    value = 0.002 if name == "threshold" and method == "masking" else value
    report = class_study(net_of(), batches_of(12), method=method, **{name: value})
    for row, klass in enumerate(report.classes):
        for layer in STUDIED:
            scores = report.importance[layer][row].tolist()
            assert report.subnetwork(klass)[layer] == by_hand(scores, value)
            assert report.outside(klass)[layer] == sorted({*range(WIDTHS[layer])} - {*by_hand(scores, value)})


def test_masking_is_the_change_of_each_class_without_each_neuron():
    net, batches = net_of(), batches_of(6, 5)
    report = class_study(net, batches, method="masking", classes=[2, 0])
    measured = ablate(net, batches, each, per_class=True).per_class
    for layer in STUDIED:
        torch.testing.assert_close(report.importance[layer], measured[layer][[2, 0]], rtol=0, atol=1e-12)
        expected = class_means(net, batches, [2, 0], magnitude=True)[layer]
        high, low = expected.amax(0), expected.amin(0)
        torch.testing.assert_close(report.selectivity[layer], (high - low) / (high + low), rtol=1e-5, atol=1e-6)


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
            Counting.sizes.append(int(on[0].sum()))
            return self.head(on)

    Counting.sizes = []
    data = [(torch.randn(6, 4), torch.arange(6) % 3)]
    report = class_study(Counting(), data, share=0.3, controls=5)
    assert {3, 7, 10} == {*Counting.sizes}
    assert Counting.sizes.count(3) == Counting.sizes.count(7) == 1 + 5  # the classes tie, so their sets are the same
    assert [row.model for row in report.accuracies] == KINDS * 3


def test_classes_may_be_chosen_and_are_seen_among_all_samples():
    net, batches = net_of(), batches_of(16, classes=4)
    report, whole = class_study(net, batches, classes=[3, 1]), class_study(net, batches)
    assert (report.classes, report.class_counts) == ((3, 1), (4, 4))
    for layer in STUDIED:
        assert torch.equal(report.members[layer], whole.members[layer][[3, 1]])
    for kind in KINDS[:3]:
        for klass in (3, 1):
            assert report.accuracy(kind, klass) == whole.accuracy(kind, klass)
    single = class_study(net, batches, classes=[2])
    assert [row.model for row in single.accuracies] == KINDS[:-1]
    assert single.jaccard.tolist() == [[1.0]]


def test_sub_networks_of_several_classes_are_their_union():
    report = class_study(net_of(), batches_of(12), share=0.4)
    for layer in STUDIED:
        own = [{*report.subnetwork(k)[layer]} for k in (0, 1, 2)]
        assert report.subnetwork([2, 0])[layer] == sorted(own[0] | own[2])
        assert report.outside([2, 0])[layer] == sorted({*range(WIDTHS[layer])} - own[0] - own[2])
        assert report.entropy[layer].shape == (WIDTHS[layer],)
    assert report.shared_by.sum() == sum(WIDTHS[layer] for layer in STUDIED)
    for look_up in (lambda: report.subnetwork([0, 7]), lambda: report.outside(7), lambda: report.accuracy("whole", 7)):
        with pytest.raises(ArgumentError, match=r"7"):
            look_up()
    with pytest.raises(ArgumentError, match="'subnetwork', 'ablation'"):
        report.accuracy("sub", 0)


def test_the_report_is_saved_as_json(tmp_path):
    report = class_study(net_of(), batches_of(12), threshold=0.3)
    report.save(tmp_path / "it.json")
    found = json.loads((tmp_path / "it.json").read_text(), parse_constant=pytest.fail)
    assert found["subnetworks"] == {str(k): report.subnetwork(k) for k in report.classes}
    assert found["accuracies"] == [row._asdict() for row in report.accuracies]
    assert (found["settings"]["threshold"], found["settings"]["layers"]) == (0.3, STUDIED)
    assert found["importance"]["0"] == report.importance["0"].tolist()


@pytest.mark.parametrize("method", ["thresholding", "masking"])
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


def trace_of(net):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in net.modules()]
    ids = [id(t) for t in (*net.parameters(), *net.buffers())]
    return hooks, ids, {n: t.clone() for n, t in net.state_dict().items()}, torch.get_rng_state(), random.getstate()


@pytest.mark.parametrize("method", ["thresholding", "masking"])
@pytest.mark.parametrize("fails", [None, 0, 4, 12])
def test_the_model_is_left_as_it_was(fails, method):
    net, calls = seeded(ConvNet).train(), []
    net.bn2.eval()
    before, array = trace_of(net), np.random.get_state()[1].copy()

    def forward(model, batch):
        calls.append(1)
        torch.rand(1)
        if fails is not None and len(calls) > fails:
            raise ZeroDivisionError("stop")
        return model(batch[0])

    if fails is None:
        class_study(net, batches_of(8, 4), method=method, replacement="mean", forward=forward)
    else:
        with pytest.raises(ZeroDivisionError, match="stop"):
            class_study(net, batches_of(8, 4), method=method, forward=forward)
    after = trace_of(net)
    assert (before[:2], before[4]) == (after[:2], after[4])
    assert all(torch.equal(before[2][n], t) for n, t in after[2].items())
    assert torch.equal(before[3], after[3])
    assert (array == np.random.get_state()[1]).all()


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
