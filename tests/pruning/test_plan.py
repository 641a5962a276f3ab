"""Plans as values: written by hand, put one behind another, held against a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_neurons import ArgumentError, PruningPlan, UnknownNameError
from lightning_neurons.pruning.plan import PlanCost
from tests.criteria.streams import laws
from tests.tables import for_each

LAYERS = ("net.conv1", "net.conv2", "head")


def without(things, places) -> list:
    return [thing for place, thing in enumerate(things) if place not in set(places)]


def some(width: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Not all: a layer keeps a neuron."""
    return st.sets(st.integers(0, width - 1), max_size=width - 1).map(sorted).map(tuple)


@st.composite
def rounds(draw, count: int = 2) -> tuple[dict[str, int], list[PruningPlan]]:
    """Widths of a model, and plans of which each is for the model that those before it leave."""
    original = {layer: draw(st.integers(1, 9)) for layer in LAYERS}
    widths, plans = dict(original), []
    for number in range(count):
        layers = draw(st.lists(st.sampled_from(LAYERS), unique=True))
        neurons = {layer: draw(some(widths[layer])) for layer in layers}
        reasons = {layer: {i: f"round {number}: {i}" for i in gone} for layer, gone in neurons.items() if gone}
        cost = PlanCost(100 - number, 1000 - number, 99 - number, 999 - number)
        plans.append(PruningPlan(neurons, dict(widths), reasons, cost, (f"note {number}",)))
        widths = {layer: width - len(neurons.get(layer, ())) for layer, width in widths.items()}
    return original, plans


def test_a_plan_written_by_hand_is_sorted_and_counts_its_neurons():
    plan = PruningPlan.from_indices({"net.conv1": [3, 0], "fc": iter((2,)), "head": []})
    assert plan.neurons == {"net.conv1": (0, 3), "fc": (2,), "head": ()}
    assert len(plan) == 3
    assert plan
    assert not PruningPlan.from_indices({"head": []})
    assert not PruningPlan({})


@for_each(
    "indices, shown",
    [
        ([0, -1], "-1"),
        ([2, 1, 2], "2"),
        ([0, True], "True"),
        ([1.0], "1.0"),
        ([float("nan")], "nan"),
        (["1"], "'1'"),
        ([None], "None"),
        ([[1]], "[1]"),
        ("12", "'12'"),
        (3, "3"),
        (None, "None"),
        ({0: 1}, "{0: 1}"),
    ],
)
def test_what_is_no_list_of_distinct_neurons_is_refused_with_the_layer(indices, shown):
    with pytest.raises(ArgumentError) as error:
        PruningPlan.from_indices({"fc": [0], "net.conv1": indices})
    assert f"neurons['net.conv1']={shown} is not allowed" in str(error.value)
    assert "whole numbers of at least 0, each of them once" in str(error.value)


@for_each("neurons", [None, 3, "fc", [("fc", [0])], {"fc"}])
def test_what_is_no_mapping_is_refused(neurons):
    with pytest.raises(ArgumentError, match="a mapping of layers to neurons"):
        PruningPlan.from_indices(neurons)


@laws
@given(rounds(1))
def test_what_remains_is_what_is_not_removed(case):
    widths, (plan,) = case
    for layer, width in widths.items():
        assert plan.remaining(layer) == without(range(width), plan.neurons.get(layer, ()))


def test_what_remains_of_an_unknown_layer_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'net\.conv1'"):
        PruningPlan({}, widths={"net.conv1": 3, "head": 2}).remaining("net.cnv1")
    with pytest.raises(UnknownNameError):
        PruningPlan.from_indices({"fc": [0]}).remaining("fc")


@laws
@given(rounds())
def test_two_plans_as_one_leave_what_one_behind_the_other_leaves(case):
    widths, (first, later) = case
    both = first.then(later)
    assert both.widths == widths
    assert both.notes == ("note 0", "note 1")
    assert both.cost == PlanCost(100, 1000, 98, 998)
    for layer, width in widths.items():
        origins = without(range(width), first.neurons.get(layer, ()))
        assert both.remaining(layer) == without(origins, later.neurons.get(layer, ()))
        gone = both.neurons.get(layer, ())
        assert list(gone) == sorted(set(gone))
        expected = {i: f"round 0: {i}" for i in first.neurons.get(layer, ())}
        expected |= {origins[i]: f"round 1: {i}" for i in later.neurons.get(layer, ())}
        assert both.reasons.get(layer, {}) == expected


@laws
@given(rounds(3))
def test_it_does_not_matter_which_of_three_plans_are_put_together_first(case):
    _, (a, b, c) = case
    left, right = a.then(b).then(c), a.then(b.then(c))
    for layer in LAYERS:
        assert left.remaining(layer) == right.remaining(layer)
        assert left.reasons.get(layer, {}) == right.reasons.get(layer, {})
    assert left.cost == right.cost
    assert left.notes == right.notes


@laws
@given(rounds())
def test_lowered_takes_back_what_lifted_did(case):
    widths, (first, later) = case
    lifted = later.lifted(first)
    assert lifted.widths == widths
    assert lifted.lowered(first) == later
    for layer, gone in lifted.neurons.items():
        assert not set(gone) & set(first.neurons.get(layer, ()))


@laws
@given(rounds())
def test_lowered_leaves_out_what_has_gone_already(case):
    _, (first, later) = case
    assert not first.lowered(first)
    assert first.then(later).lowered(first).neurons == {
        layer: later.neurons.get(layer, ()) for layer in first.then(later).neurons
    }


@laws
@given(rounds(1))
def test_the_empty_plan_before_or_behind_another_changes_nothing(case):
    widths, (plan,) = case
    nothing = PruningPlan({})
    left = {layer: width - len(plan.neurons.get(layer, ())) for layer, width in widths.items()}
    before, behind = nothing.then(plan), plan.then(PruningPlan({}, widths=left, cost=plan.cost))
    assert (before.neurons, before.widths, before.cost) == (plan.neurons, plan.widths, plan.cost)
    assert (behind.neurons, behind.widths, behind.cost) == (plan.neurons, plan.widths, plan.cost)
    assert plan.lifted(nothing) == plan.lowered(nothing) == plan


@laws
@given(rounds())
def test_plans_written_by_hand_can_be_put_one_behind_another(case):
    widths, (first, later) = case
    both = PruningPlan.from_indices(first.neurons).then(PruningPlan.from_indices(later.neurons))
    for layer, width in widths.items():
        one_by_one = without(without(range(width), first.neurons.get(layer, ())), later.neurons.get(layer, ()))
        assert without(range(width), both.neurons.get(layer, ())) == one_by_one


def test_what_does_not_know_its_cost_makes_the_cost_of_both_unknown():
    known = PlanCost(10, 20, 5, 6)
    hand, priced = PruningPlan({"fc": (0,)}, widths={"fc": 4}), PruningPlan({"fc": (0,)}, {"fc": 3}, cost=known)
    assert PruningPlan({"fc": (0,)}, {"fc": 4}, cost=known).then(PruningPlan({"fc": (0,)}, {"fc": 3})).cost is None
    assert hand.then(priced).cost is None


def test_a_plan_for_a_wider_model_cannot_be_put_behind_another():
    first, later = PruningPlan({"fc": (0, 1)}, widths={"fc": 4}), PruningPlan({"fc": (3,)}, widths={"fc": 4})
    with pytest.raises(ArgumentError, match="fc"):
        first.then(later)


def test_a_plan_for_the_model_as_it_is_passes_the_check():
    PruningPlan({"fc": (0, 3)}, widths={"fc": 4, "gone": 7}).check({"fc": 4, "head": 2})
    PruningPlan.from_indices({"fc": [3]}).check({"fc": 4})
    PruningPlan.from_indices({"fc": []}).check({"fc": 4})


def test_the_check_names_the_nearest_of_an_unknown_layer():
    with pytest.raises(UnknownNameError, match=r"plan: nothing matches 'net\.cnv1'\. Did you mean 'net\.conv1'"):
        PruningPlan.from_indices({"net.cnv1": [0]}).check({"net.conv1": 4, "head": 2})


@for_each("neurons", [(4,), (0, 99)])
def test_the_check_refuses_neurons_that_the_layer_does_not_have(neurons):
    with pytest.raises(ArgumentError) as error:
        PruningPlan.from_indices({"fc": neurons}).check({"fc": 4})
    assert f"plan={{'fc': {neurons[-1]}}} is not allowed" in str(error.value)
    assert "neurons of 0 to 3 in 'fc'" in str(error.value)


def test_the_check_refuses_a_plan_for_another_width():
    with pytest.raises(ArgumentError, match=r"made for 5 neurons in 'fc', and the model has 4.*applied already"):
        PruningPlan({"fc": (0,)}, widths={"fc": 5}).check({"fc": 4})
