"""Orders, normalisation and choices."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_neurons.criteria import CRITERIA, effective_number, normalize, order, select, share_of_top
from lightning_neurons.errors import ArgumentError
from tests import reference
from tests.criteria.streams import laws
from tests.tables import for_each

NAN, INF = math.nan, math.inf
few = st.sampled_from([0.0, 0.1, 1.0, 1.0, 2.5, 7.0, 1e-9])
any_scores = st.lists(st.one_of(few, st.sampled_from([-1.0, -INF, INF, NAN])), min_size=1, max_size=12)
not_negative = st.lists(st.one_of(few, st.just(NAN)), min_size=1, max_size=12)
shares = st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.77, 0.999, 1.0])


def tensor(scores) -> torch.Tensor:
    return torch.tensor(scores, dtype=torch.float64)


def chosen(scores, **rule) -> set[int]:
    return set(select(tensor(scores), **rule).nonzero().flatten().tolist())


@laws
@given(any_scores)
def test_an_order_runs_down_with_ties_in_place_and_nan_last(scores):
    assert order(tensor(scores)).tolist() == reference.order(scores)


def test_nan_comes_behind_minus_infinity():
    assert order(tensor([NAN, -INF, 0, NAN, INF])).tolist() == [4, 2, 1, 0, 3]


def test_many_ties_are_stable():
    assert order(torch.ones(1000)).tolist() == list(range(1000))


@laws
@given(any_scores, shares)
def test_a_share_takes_the_nearest_whole_number_from_the_top(scores, share):
    assert chosen(scores, share=share) == reference.top_share(scores, share)


@laws
@given(any_scores, st.integers(0, 15))
def test_a_count_takes_that_many_or_all_that_were_measured(scores, count):
    measured = [i for i in reference.order(scores) if not math.isnan(scores[i])]
    assert chosen(scores, count=count) == set(measured[:count])


@laws
@given(any_scores, st.sampled_from([-INF, -1.0, 0.0, 1.0, 3, INF]))
def test_a_threshold_is_inclusive_and_never_takes_nan(scores, threshold):
    assert chosen(scores, threshold=threshold) == {i for i, s in enumerate(scores) if s >= threshold}


@laws
@given(not_negative, shares)
def test_cumulative_takes_the_smallest_top_set_that_holds_the_share(scores, share):
    assert chosen(scores, cumulative=share) == reference.cumulative(scores, share)


def test_rounding_costs_cumulative_no_neuron_more():
    assert chosen([0.1] * 10, cumulative=0.3) == {0, 1, 2}
    assert chosen([0.1] * 10, cumulative=1.0) == set(range(10))


@for_each("rule", [{"share": 0.5}, {"count": 2}, {"threshold": 0.0}, {"cumulative": 0.5}])
def test_nothing_can_be_chosen_where_nothing_was_measured(rule):
    assert chosen([NAN, NAN], **rule) == set()
    assert chosen([], **rule) == set()


def test_cumulative_of_zeros_is_empty():
    assert chosen([0.0, 0.0], cumulative=0.5) == set()


@for_each("rules", [{}, {"share": 0.1, "count": 3}, {"threshold": 0.0, "cumulative": 0.5}])
def test_select_takes_exactly_one_rule(rules):
    with pytest.raises(ArgumentError, match="exactly one of share, count, threshold, cumulative") as error:
        select(torch.ones(3), **rules)
    assert all(name in str(error.value) for name in rules)


@for_each(
    "rule, got, allowed",
    [
        ({"share": 1.5}, "share=1.5", "a share in [0, 1]"),
        ({"share": -0.1}, "share=-0.1", "a share in [0, 1]"),
        ({"share": NAN}, "share=nan", "such as 0.1 for 10 %"),
        ({"share": True}, "share=True", "a share in [0, 1]"),
        ({"count": -1}, "count=-1", "a whole number of at least 0"),
        ({"count": 1.5}, "count=1.5", "a whole number of at least 0"),
        ({"share": "half"}, "share='half'", "a share in [0, 1]"),
        ({"count": True}, "count=True", "a whole number of at least 0"),
        ({"threshold": NAN}, "threshold=nan", "a number"),
        ({"threshold": True}, "threshold=True", "a number"),
        ({"cumulative": 2.0}, "cumulative=2.0", "a share in [0, 1]"),
        ({"cumulative": -0.5}, "cumulative=-0.5", "a share in [0, 1]"),
        ({"cumulative": NAN}, "cumulative=nan", "a share in [0, 1]"),
    ],
)
def test_a_rule_out_of_range_says_what_came_and_what_is_allowed(rule, got, allowed):
    with pytest.raises(ArgumentError) as error:
        select(torch.ones(3), **rule)
    assert f"{got} is not allowed" in str(error.value)
    assert allowed in str(error.value)


def test_cumulative_of_signed_scores_is_refused_with_the_alternative():
    with pytest.raises(ArgumentError, match=r"cumulative=0\.5 .* scores of at least 0; use share= or count="):
        select(tensor([1, -1]), cumulative=0.5)


@laws
@given(any_scores.map(lambda scores: [s for s in scores if math.isfinite(s)]), st.sampled_from([("sum", 1), ("l2", 2)]))
def test_normalisation_gives_each_layer_the_size_1(scores, how):
    name, power = how
    result = normalize({"a": tensor(scores), "b": tensor([3.0, -4.0])}, name)
    size = sum(abs(s) ** power for s in scores) ** (1 / power)
    assert result["a"].tolist() == pytest.approx([s / size if size else 0.0 for s in scores])
    assert result["b"].tolist() == pytest.approx([3 / 7, -4 / 7] if power == 1 else [0.6, -0.8])


def test_normalisation_leaves_nan_and_silent_layers_alone():
    result = normalize({"a": tensor([NAN, 1, 3]), "zeros": torch.zeros(2), "unknown": tensor([NAN])}, "sum")
    assert result["a"][0].isnan()
    assert result["a"][1:].tolist() == [0.25, 0.75]
    assert result["zeros"].tolist() == [0, 0]
    assert result["unknown"].isnan().all()


def test_no_normalisation_is_the_default_and_changes_nothing():
    scores = {"a": tensor([1.0, 5.0])}
    assert normalize(scores)["a"] is scores["a"]


@for_each("how", ["sum", "l2"])
def test_scores_in_loss_units_are_normalised_with_a_warning(how):
    scores = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.warns(UserWarning, match=rf"normalize='{how}'.*units of the loss.*Use normalize='none'"):
        normalize(scores, how, in_loss_units=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normalize(scores, how)
        normalize(scores, "none", in_loss_units=True)
        normalize({"a": torch.ones(2)}, how, in_loss_units=True)  # one layer: its ranking does not change


def test_the_second_order_family_is_in_loss_units_and_taylor_2017_is_not():
    expected = {"taylor_fo", "fisher", "second_order", "second_order_ggn"}
    assert {name for name, c in CRITERIA.items() if c.in_loss_units} == expected


def test_an_unknown_normalisation_names_the_nearest():
    with pytest.raises(ArgumentError) as error:
        normalize({"a": torch.ones(2)}, "sums")
    for part in ("normalize='sums'", "'none', 'sum', 'l2'", "did you mean 'sum'?"):
        assert part in str(error.value)


@for_each("alike", [1, 3, 8])
def test_the_effective_number_of_neurons_that_score_alike_is_their_number(alike):
    assert effective_number(tensor([0.5] * alike + [0.0] * 4)) == pytest.approx(alike)
    assert effective_number(tensor([-0.5] * alike + [NAN])) == pytest.approx(alike)


def test_the_effective_number_of_nothing_is_zero():
    assert effective_number(torch.zeros(3)) == effective_number(tensor([NAN])) == effective_number(tensor([])) == 0


@laws
@given(not_negative, shares)
def test_the_share_of_the_top_is_what_its_neurons_hold(scores, share):
    sizes = [0.0 if math.isnan(s) else s for s in scores]
    held = sum(sizes[i] for i in reference.top_share(sizes, share))
    assert share_of_top(tensor(scores), share) == pytest.approx(held / sum(sizes) if sum(sizes) else 0.0)
