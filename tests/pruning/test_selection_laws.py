"""What holds for every choice: limits, ties, rounds, and what is said when less goes than was asked for."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_neurons import PruningBudget
from lightning_neurons.pruning.selection.group_scores import GroupScores, group_scores
from lightning_neurons.pruning.selection.select import Dense, select
from lightning_neurons.pruning.structure.structure import discover
from tests.criteria.streams import laws
from tests.pruning.test_selection import SIZES, choose, cut_net, example, lost, scores_of, shuffled, structure_of
from tests.tables import for_each

NAN = math.nan
ASCENDING = {root: [float(i) for i in range(size)] for root, size in SIZES.items()}
rules = st.sampled_from(["amount", "target_params", "target_macs"])
scopes = st.sampled_from(["global", "layer", "block"])
shares = st.sampled_from([0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])


@laws
@given(rules, shares, scopes, st.integers(1, 8), st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]), st.integers(0, 9))
def test_floors_and_ceilings_hold_whatever_is_asked(rule, share, scope, least, most, seed):
    options = {"min_neurons": least, "max_amount": most, "scope": scope, rule: share}
    selection = choose(shuffled(structure_of(), seed), **options)
    for root, size in SIZES.items():
        gone = lost(selection, root)
        assert gone == 0 or size - gone >= least
        assert gone <= most * size + 1e-9


@for_each("most, gone", [(0.3, [1, 1, 2]), (0.2, [1, 1, 1]), (0.4, [2, 2, 2]), (6 / 7, [5, 4, 6])])
def test_a_ceiling_that_is_met_exactly_costs_no_neuron(most, gone):
    selection = choose(shuffled(structure_of()), amount=1.0, max_amount=most)
    assert [lost(selection, root) for root in SIZES] == gone
    assert any(note.startswith("as narrow as min_neurons, max_amount") for note in selection.notes)


@laws
@given(rules, shares, scopes, st.integers(1, 5), st.integers(0, 9))
def test_every_width_that_is_cut_is_a_multiple(rule, share, scope, multiple, seed):
    scores = shuffled(structure_of(), seed)
    selection = choose(scores, scope=scope, round_to=multiple, **{rule: share})
    for root, units in selection.units.items():
        assert units
        assert (SIZES[root] - len(units)) % multiple == 0
        assert units == sorted(scores[root].value.argsort()[: len(units)].tolist())


@laws
@given(st.sampled_from([0.9, 0.7, 0.5]), st.integers(2, 4), st.integers(0, 9))
def test_a_target_is_met_with_rounded_widths_too(target, multiple, seed):
    structure = structure_of()
    selection = choose(shuffled(structure, seed), target_macs=target, round_to=multiple)
    _, macs = structure.costs_without(selection.units)
    assert macs <= target * structure.costs.macs() or any("not reached" in note for note in selection.notes)


@laws
@given(rules, scopes, shares, shares, st.integers(1, 3), st.integers(0, 9))
def test_who_asks_for_more_keeps_nothing_that_went_before(rule, scope, first, second, multiple, seed):
    less, more = sorted([first, second], reverse=rule != "amount")
    scores = shuffled(structure_of(), seed)
    small = choose(scores, scope=scope, round_to=multiple, **{rule: less}).units
    large = choose(scores, scope=scope, round_to=multiple, **{rule: more}).units
    assert all(set(units) <= set(large.get(root, ())) for root, units in small.items())


@laws
@given(st.data(), rules, scopes, shares, st.integers(0, 9))
def test_neurons_in_another_order_are_chosen_in_that_order(data, rule, scope, share, seed):
    scores = shuffled(structure_of(), seed)
    orders = {root: data.draw(st.permutations(range(size))) for root, size in SIZES.items()}
    moved = scores_of(**{root: [float(scores[root].value[i]) for i in order] for root, order in orders.items()})
    straight = choose(scores, scope=scope, **{rule: share}).units
    turned = choose(moved, scope=scope, **{rule: share}).units
    assert {root: sorted(orders[root][unit] for unit in units) for root, units in turned.items()} == straight


@for_each("scope", ["global", "layer", "block"])
@for_each("name", ["convolutional", "blocks"])
@for_each("rule, share", [("amount", 0.3), ("amount", 0.5), ("target_macs", 0.5), ("target_params", 0.7)])
def test_equal_scores_thin_all_layers_alike_and_always_the_same(scope, name, rule, share):
    structure = structure_of(name)
    sizes = {root: group.size for root, group in structure.offered.items()}
    selection = choose(
        scores_of(**{root: [0.25] * size for root, size in sizes.items()}), name, scope=scope, **{rule: share}
    )
    even = lost(selection) / sum(sizes.values())
    for root, size in sizes.items():
        gone = lost(selection, root)
        assert abs(gone - even * size) <= 1
        assert selection.units.get(root, []) == list(range(gone))
    again = choose(
        scores_of(**{root: [0.25] * size for root, size in sizes.items()}), name, scope=scope, **{rule: share}
    )
    assert again == selection


@for_each("options", [{"amount": 1.0}, {"target_params": 0.01}, {"threshold": 99.0}])
def test_what_was_not_measured_stays_and_is_named(options):
    selection = choose(scores_of(conv1=[NAN, 1, NAN, 2, 3, 4], conv2=[NAN] * 5, fc1=ASCENDING["fc1"]), **options)
    assert selection.units == {"conv1": [1, 3, 4, 5], "fc1": [0, 1, 2, 3, 4, 5]}
    assert "conv1: 2 of 6 neurons have no score (not measured) and stay" in selection.notes
    assert "conv2: 5 of 5 neurons have no score (not measured) and stay" in selection.notes


def test_a_group_without_scores_stays():
    assert set(choose(scores_of(conv1=ASCENDING["conv1"]), amount=1.0).units) == {"conv1"}
    assert choose({}, amount=0.5).units == {}


TOO_LITTLE = [
    {"amount": 0.01},
    {"target_macs": 1.0},
    {"threshold": -1.0},
    {"amount": 0.1, "round_to": 8},
    {"threshold": 1.0, "min_neurons": 9},
]


@for_each("options", TOO_LITTLE)
def test_where_nothing_goes_it_is_said(options):
    selection = choose(scores_of(**ASCENDING), **options)
    assert selection.units == {}
    assert sum("nothing is cut: " in note for note in selection.notes) == 1


@for_each("rule", ["target_params", "target_macs"])
def test_a_target_out_of_reach_takes_all_that_may_go_and_says_what_remains(rule):
    structure = structure_of()
    selection = choose(shuffled(structure), min_neurons=4, **{rule: 0.1})
    assert [lost(selection, root) for root in SIZES] == [2, 1, 3]
    after = dict(zip(["target_params", "target_macs"], structure.costs_without(selection.units), strict=True))
    before = {"target_params": structure.costs.parameters(), "target_macs": structure.costs.macs()}
    expected = f"{rule}=0.1 is not reached: {after[rule] / before[rule]:.3f} remain when all goes that may"
    assert expected in selection.notes


@for_each(
    "scope, missing",
    [("global", "10 neurons of the model"), ("layer", "3 neurons of conv1, 3 neurons of conv2, 3 neurons of fc1")],
)
def test_an_amount_out_of_reach_takes_all_that_may_go_and_says_what_is_missing(scope, missing):
    selection = choose(shuffled(structure_of()), scope=scope, amount=0.9, min_neurons=4)
    assert [lost(selection, root) for root in SIZES] == [2, 1, 3]
    assert f"amount=0.9 is not reached: {missing} should go as well, and may not" in selection.notes


@for_each("options", [{"amount": 0.5, "scope": "layer", "round_to": 4}, {"threshold": 99.0, "min_neurons": 4}])
def test_where_less_goes_than_was_asked_for_it_is_said(options):
    limited = choose(scores_of(**ASCENDING), **options)
    free = choose(scores_of(**ASCENDING), **{**options, "round_to": 1, "min_neurons": 1})
    assert 0 < lost(limited) < lost(free)
    assert any("round_to" in note or "min_neurons" in note for note in limited.notes)


def test_places_are_those_in_the_order_of_the_group():
    scores = shuffled(structure_of())
    for options in ({"amount": 0.5}, {"threshold": 9.0}):
        selection = choose(scores, **options)
        for root, units in selection.units.items():
            order = scores[root].value.argsort().tolist()
            assert [order[selection.places[root][unit]] for unit in units] == units


def test_places_count_the_neurons_that_stay_for_want_of_agreement():
    layers = {"conv1": [0.9, 0.1, 0.2, 1.0, 1.1], "conv3": [1.0, 2.0, 3.0, 4.0, 5.0]}
    budget = PruningBudget("weight_l2", amount=0.4, agreement="all", scope="global")
    structure = structure_of("residual")
    tensors = {layer: torch.tensor(value, dtype=torch.float64) for layer, value in layers.items()}
    selection = select(structure, group_scores(structure.offered, tensors, budget), budget)
    assert selection.units == {"conv1": [1]}
    assert selection.places["conv1"][1] == 1


def next_round(selection, scores, budget, dense: Dense):
    """The model that a first round leaves, and what a second one takes from it: by root, how many are gone in all."""
    structure = discover(cut_net("convolutional", selection.units), example("convolutional"))
    rest = {}
    for root in structure.offered:
        stays = [unit for unit in range(SIZES[root]) if unit not in selection.units.get(root, ())]
        rest[root] = GroupScores(scores[root].value[stays], scores[root].value[None, stays])
    later = select(structure, rest, budget, dense)
    return {root: lost(selection, root) + len(later.units.get(root, ())) for root in SIZES}


@for_each("scope", ["global", "layer"])
def test_two_rounds_end_where_the_second_budget_says_of_the_original(scope):
    scores, dense = shuffled(structure_of()), Dense.of(structure_of())
    first = choose(scores, amount=0.25, scope=scope)
    gone = next_round(first, scores, PruningBudget("weight_l2", amount=0.5, scope=scope), dense)
    once = choose(scores, amount=0.5, scope=scope)
    assert gone == {root: lost(once, root) for root in SIZES}
    assert sum(gone.values()) == (9 if scope == "global" else 3 + 2 + 4)


def test_two_rounds_end_there_also_where_the_first_leaves_a_single_neuron():
    scores, dense = scores_of(conv1=range(50, 56), conv2=range(60, 65), fc1=range(7)), Dense.of(structure_of())
    first = choose(scores, amount=6 / 18)
    assert first.units == {"fc1": [0, 1, 2, 3, 4, 5]}
    gone = next_round(first, scores, PruningBudget("weight_l2", amount=0.5, scope="global"), dense)
    assert gone == {"conv1": 3, "conv2": 0, "fc1": 6}


@for_each("rule", ["target_params", "target_macs"])
def test_the_target_of_a_second_round_is_that_of_the_original(rule):
    scores, dense = shuffled(structure_of()), Dense.of(structure_of())
    first, once = choose(scores, **{rule: 0.8}), choose(scores, **{rule: 0.5})
    assert 0 < lost(first) < lost(once)
    second = PruningBudget("weight_l2", scope="global", **{rule: 0.5})
    assert next_round(first, scores, second, dense) == {root: lost(once, root) for root in SIZES}


def test_the_ceiling_of_a_second_round_is_that_of_the_original():
    scores, dense = shuffled(structure_of()), Dense.of(structure_of())
    ceiling = PruningBudget("weight_l2", amount=1.0, max_amount=0.5, scope="global")
    halves = choose(scores, amount=0.25, scope="layer")
    assert lost(halves) == 2 + 1 + 2
    assert next_round(halves, scores, ceiling, dense) == {"conv1": 3, "conv2": 2, "fc1": 3}


def test_a_second_round_that_is_met_already_removes_nothing():
    scores, dense = shuffled(structure_of()), Dense.of(structure_of())
    first = choose(scores, amount=0.5)
    for rule in ({"amount": 0.3}, {"target_params": 0.99}):
        budget = PruningBudget("weight_l2", scope="global", **rule)
        assert next_round(first, scores, budget, dense) == {root: lost(first, root) for root in SIZES}
