"""Rankings and selections of a report."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons.criteria import Criterion, Statistic
from lightning_neurons.errors import ArgumentError, UnknownNameError
from tests import reference
from tests.results.reports import LAYERS, flat, report_of
from tests.tables import for_each


def test_a_ranking_of_all_layers_runs_from_the_most_to_the_least_important():
    report = report_of()
    neurons = flat(report.scores["taylor"])
    expected = [neurons[i] for i in reference.order([score for _, _, score in neurons])]
    assert [tuple(n) for n in report.ranking("taylor", include_outputs=True)] == expected
    assert [tuple(n) for n in report.ranking("taylor")] == [n for n in expected if n[0] != "5"], "5 makes the output"


def test_a_ranking_of_one_layer_holds_its_neurons_only():
    report = report_of(["rms"])
    ranking = report.ranking("rms", layer="3")
    assert [n.neuron for n in ranking] == reference.order(report.scores["rms"]["3"].tolist())
    assert ranking[0].score == report.scores["rms"]["3"].max()


def test_a_ranking_can_be_normalised():
    report = report_of(["rms"])
    for how, power in (("sum", 1), ("l2", 2)):
        ranking = report.ranking("rms", normalize=how, include_outputs=True)
        for layer in LAYERS:
            size = sum(abs(n.score) ** power for n in ranking if n.layer == layer)
            assert size == pytest.approx(1)
    assert report_of(["rms"], normalize="l2").ranking() == report.ranking("rms", normalize="l2")


def test_ranking_by_fisher_normalised_by_layer_warns():
    report = report_of(["fisher"])
    with pytest.warns(UserWarning, match="comparable across layers as they are"):
        report.ranking("fisher", normalize="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.ranking("fisher")


def test_a_deadness_measure_ranks_the_dead_last():
    report = report_of(["near_zero", "apoz"])
    ranking = report.ranking("apoz")
    assert {n.layer for n in ranking} == {"0"}
    assert (ranking[-1].neuron, ranking[-1].score) == (1, 0)


@for_each("rule", [{"share": 0.5}, {"count": 2}, {"threshold": 0.2}, {"cumulative": 0.7}])
def test_a_selection_within_layers_follows_the_rule_in_each(rule):
    report = report_of(["gradient"])
    twins = {
        "share": reference.top_share,
        "count": lambda scores, count: set(reference.order(scores)[:count]),
        "threshold": lambda scores, limit: {i for i, s in enumerate(scores) if s >= limit},
        "cumulative": reference.cumulative,
    }
    (name, value), chosen = next(iter(rule.items())), report.select(**rule)
    for layer, scores in report.scores["gradient"].items():
        assert chosen[layer] == sorted(twins[name](scores.tolist(), value))


def test_a_selection_over_all_layers_takes_the_best_of_all():
    report = report_of(["taylor"])
    chosen = report.select("taylor", scope="global", count=4)
    assert chosen.keys() == set(LAYERS)
    assert not chosen["5"]
    assert {(n, i) for n, neurons in chosen.items() for i in neurons} == {n[:2] for n in report.ranking("taylor")[:4]}


MINE = Criterion(
    "mine", (Statistic("mine", lambda view: view.gradient.sum(-1), "gradient"),), lambda s: s.totals["mine"].abs()
)


@for_each(
    "criteria, main",
    [
        (None, "taylor"),
        (["gradient", "second_order", "fisher"], "fisher"),
        (["gradient", "rms"], "gradient"),
        (["rms", MINE], "mine"),
        (["mean", "rms"], "mean"),
        (["mean", "dormant_score"], "dormant_score"),
        (["near_zero", "rms"], "rms"),
    ],
)
def test_the_main_criterion_is_the_preferred_one_that_was_measured(criteria, main):
    report = report_of(criteria)
    assert report.main_criterion == main
    assert report.ranking() == report.ranking(main)


def residual(inputs: int = 4, width: int = 5) -> nn.Module:
    """A stream of three layers, 0 + 1 + 2, in which neuron 3 never fires, and a head."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = nn.Linear(inputs, width), nn.Linear(width, 7)
            self.first, self.second, self.head = nn.Linear(7, width), nn.Linear(width, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x.flatten(1)))
            x = x + torch.relu(self.first(torch.relu(self.inner(x))))
            x = torch.relu(self.second(x)) + x
            return self.head(x)

    torch.manual_seed(1)
    net = Residual()
    with torch.no_grad():
        for layer in (net.stem, net.first, net.second):
            layer.bias[3] = -1e6
    return net


def test_neurons_of_a_residual_stream_are_one_entry_with_the_mean_of_their_scores():
    report = report_of(net=residual(9))
    ranking, scores = report.ranking(), report.scores["taylor"]
    mean = sum(scores[name] for name in ("stem", "first", "second")) / 3
    alone = [("inner", i, (s,)) for i, s in enumerate(scores["inner"].tolist())]
    expected = [("stem", i, (s,)) for i, s in enumerate(mean.tolist())] + alone
    assert len(ranking) == 5 + 7, "each counts once, the head not at all"
    assert {n[:2]: n.score for n in ranking} == pytest.approx({e[:2]: e[2][0] for e in expected})
    assert {n.twins for n in ranking if n.layer == "stem"} == {("first", "second")}
    assert {n.twins for n in report.ranking(layer="stem")} == {()}
    assert report.ranking(layer="first")[0].score == scores["first"].max()
    everything = report.select(scope="global", share=1.0)
    assert {name: len(neurons) for name, neurons in everything.items()} == {
        "stem": 5, "inner": 7, "first": 5, "second": 5, "head": 0
    }  # fmt: skip
    best = report.ranking()[0]
    chosen = {name for name, neurons in report.select(scope="global", count=1).items() if best.neuron in neurons}
    assert chosen == {*best.layers}


@for_each("criteria", [None, ["fisher"], ["dormant_score", "near_zero"], ["taylor_fo", "near_zero"]])
def test_no_dead_neuron_stands_above_one_that_fires(criteria):
    report = report_of(criteria)
    assert report.ranking()[-1][:2] == ("0", 1)
    assert report.ranking(layer="0")[-1].neuron == 1


def test_of_equal_scores_those_that_fire_come_first():
    report = report_of(["near_zero", "taylor"])
    equal = dataclasses.replace(report, scores={"taylor": {"0": torch.zeros(4), "3": torch.zeros(5)}})
    assert [n[:2] for n in equal.ranking()] == [*(("0", i) for i in (0, 2, 3)), *(("3", i) for i in range(5)), ("0", 1)]
    assert equal.select(count=3)["0"] == [0, 2, 3]


def test_a_model_that_is_all_output_hides_nothing():
    report = report_of(net=nn.Sequential(nn.Flatten(), nn.Linear(9, 3)))
    assert len(report.ranking()) == 3
    only = report_of(layers=["5"])
    assert {n.layer for n in only.ranking()} == {"5"}


def test_a_ranked_neuron_is_a_triple_that_can_be_copied_and_pickled():
    first = report_of(net=residual(9), layers=["stem", "first"]).ranking()[0]
    layer, neuron, score = first
    assert (layer, neuron, score) == ("stem", first.neuron, first.score)
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert (other, other.twins) == (first, ("first",))


def test_a_report_of_deadness_alone_has_no_main_criterion():
    with pytest.raises(ArgumentError, match="expected a report with at least one importance criterion"):
        report_of(["near_zero"]).ranking()


def test_a_criterion_that_every_layer_refuses_ranks_nothing():
    report = report_of(["rms", "norm_scale"])
    assert report.refused["norm_scale"].keys() == set(LAYERS)
    assert report.ranking("norm_scale") == []
    assert report.select("norm_scale", count=1) == {}


@for_each("ask", ["ranking", "select", "importance"])
def test_an_unknown_criterion_suggests_the_nearest(ask):
    options = {"count": 1} if ask == "select" else {}
    with pytest.raises(UnknownNameError, match=r"criterion: nothing matches 'tailor'\. Did you mean 'taylor'"):
        getattr(report_of(["taylor", "rms"]), ask)("tailor", **options)


def test_an_unknown_layer_cannot_be_ranked():
    with pytest.raises(UnknownNameError, match="layer: nothing matches 'conv'"):
        report_of(["rms"]).ranking("rms", layer="conv")


@for_each(
    "options, message",
    [
        ({"scope": "globe", "count": 1}, "scope='globe' is not allowed.*'layer', 'global'.*did you mean 'global'"),
        ({"share": 2.0}, r"share=2.0 is not allowed: expected a share in \[0, 1\]"),
        ({}, "exactly one of share, count, threshold, cumulative"),
        ({"normalize": "l3", "count": 1}, "normalize='l3' is not allowed.*'none', 'sum', 'l2'"),
    ],
)
def test_a_bad_selection_says_what_is_allowed(options, message):
    report = report_of(["rms"])
    with pytest.raises(ArgumentError, match=message):
        report.select("rms", **options)
