"""Rankings and selections of a report."""

import warnings

import pytest

from lightning_neurons.criteria import Criterion, Statistic
from lightning_neurons.errors import ArgumentError, UnknownNameError
from tests import reference
from tests.results.reports import LAYERS, flat, report_of


def test_a_ranking_of_all_layers_runs_from_the_most_to_the_least_important():
    report = report_of()
    neurons = flat(report.scores["taylor"])
    expected = [neurons[i] for i in reference.order([score for _, _, score in neurons])]
    assert [tuple(n) for n in report.ranking("taylor")] == expected
    assert {n.layer for n in report.ranking("taylor")} == set(LAYERS)


def test_a_ranking_of_one_layer_holds_its_neurons_only():
    report = report_of(["rms"])
    ranking = report.ranking("rms", layer="3")
    assert [n.neuron for n in ranking] == reference.order(report.scores["rms"]["3"].tolist())
    assert ranking[0].score == report.scores["rms"]["3"].max()


def test_a_ranking_can_be_normalised():
    report = report_of(["rms"])
    for how, power in (("sum", 1), ("l2", 2)):
        ranking = report.ranking("rms", normalize=how)
        for layer in LAYERS:
            size = sum(abs(n.score) ** power for n in ranking if n.layer == layer)
            assert size == pytest.approx(1)
    assert [tuple(n) for n in report_of(["rms"], normalize="l2").ranking()] == [
        tuple(n) for n in report.ranking("rms", normalize="l2")
    ]


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


@pytest.mark.parametrize(
    "rule", [{"share": 0.5}, {"count": 2}, {"threshold": 0.2}, {"cumulative": 0.7}], ids=lambda rule: next(iter(rule))
)
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
    assert {(n, i) for n, neurons in chosen.items() for i in neurons} == {n[:2] for n in report.ranking("taylor")[:4]}


MINE = Criterion(
    "mine", (Statistic("mine", lambda view: view.gradient.sum(-1), "gradient"),), lambda s: s.totals["mine"].abs()
)


@pytest.mark.parametrize(
    "criteria, main",
    [
        (None, "gradient"),
        (["mean", "rms"], "mean"),
        (["near_zero", "rms"], "rms"),
        (["mean", "fisher", "taylor"], "fisher"),
        (["rms", MINE], "mine"),
    ],
    ids=["default", "activity", "deadness first", "gradients later", "one's own"],
)
def test_the_main_criterion_is_the_first_by_gradient_or_the_first(criteria, main):
    report = report_of(criteria)
    assert report.main_criterion == main
    assert [tuple(n) for n in report.ranking()] == [tuple(n) for n in report.ranking(main)]


def test_a_report_of_deadness_alone_has_no_main_criterion():
    with pytest.raises(ArgumentError, match="expected a report with at least one importance criterion"):
        report_of(["near_zero"]).ranking()


def test_a_criterion_that_every_layer_refuses_ranks_nothing():
    report = report_of(["rms", "norm_scale"])
    assert report.refused["norm_scale"].keys() == set(LAYERS)
    assert report.ranking("norm_scale") == []
    assert report.select("norm_scale", count=1) == {}


@pytest.mark.parametrize("ask", ["ranking", "select", "importance"])
def test_an_unknown_criterion_suggests_the_nearest(ask):
    options = {"count": 1} if ask == "select" else {}
    with pytest.raises(UnknownNameError, match=r"criterion: nothing matches 'tailor'\. Did you mean 'taylor'"):
        getattr(report_of(["taylor", "rms"]), ask)("tailor", **options)


def test_an_unknown_layer_cannot_be_ranked():
    with pytest.raises(UnknownNameError, match="layer: nothing matches 'conv'"):
        report_of(["rms"]).ranking("rms", layer="conv")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scope": "globe", "count": 1}, "scope='globe' is not allowed.*'layer', 'global'.*did you mean 'global'"),
        ({"share": 2.0}, r"share=2.0 is not allowed: expected a share in \[0, 1\]"),
        ({}, "exactly one of share, count, threshold, cumulative"),
        ({"normalize": "l3", "count": 1}, "normalize='l3' is not allowed.*'none', 'sum', 'l2'"),
    ],
    ids=["scope", "share", "no rule", "normalize"],
)
def test_a_bad_selection_says_what_is_allowed(options, message):
    report = report_of(["rms"])
    with pytest.raises(ArgumentError, match=message):
        report.select("rms", **options)
