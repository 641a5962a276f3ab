"""What can be asked of a cut, and what is refused."""

import math

import pytest
import torch

from lightning_neurons import CRITERIA, ArgumentError, Criterion, PruningBudget, UnknownNameError
from lightning_neurons.criteria.deadness import dormant, near_zero
from tests.tables import for_each

NAN, INF = math.nan, math.inf
RULES = ["amount", "target_params", "target_macs", "threshold"]
OWN = Criterion("my_own", (), lambda summary: torch.ones(3))
LAYERS = ["stem.conv", "stem.bn.conv", "body.0.conv", "body.1.conv", "head"]


def named(value) -> str:
    return f"own {value.name}" if isinstance(value, Criterion) else str(value)


@for_each("rule", RULES)
def test_one_rule_is_enough_and_is_named(rule):
    budget = PruningBudget(**{rule: 0.5})
    assert budget.rule == (rule, 0.5)
    assert budget.criterion == "fisher"


@for_each("rules", [{}, *({a: 0.5, b: 0.5} for a in RULES for b in RULES if a < b), dict.fromkeys(RULES, 0.5)])
def test_no_rule_or_several_are_refused(rules):
    with pytest.raises(ArgumentError) as error:
        PruningBudget("weight_l2", **rules)
    assert "exactly one of amount, target_params, target_macs, threshold" in str(error.value)
    assert all(f"{name!r}: 0.5" in str(error.value) for name in rules)


@for_each("name", ["amount", "target_params", "target_macs", "max_amount"])
@for_each("value", [0, 0.0, -0.1, 1.1, NAN, INF, True, "half", [0.5]])
def test_a_share_out_of_range_is_refused(name, value):
    with pytest.raises(ArgumentError) as error:
        PruningBudget(**{"amount": 0.5} if name == "max_amount" else {}, **{name: value})
    assert f"{name}={value!r} is not allowed: expected a share in (0, 1]" in str(error.value)


@for_each("name", ["amount", "target_params", "target_macs"])
@for_each("value", [1, 1.0, 1e-9])
def test_a_share_may_be_all_and_as_small_as_one_likes(name, value):
    assert PruningBudget(**{name: value}).rule == (name, float(value))


@for_each(
    "options, named",
    [
        ({"min_neurons": 0}, "min_neurons=0 is not allowed: expected a whole number of at least 1"),
        ({"min_neurons": 2.0}, "min_neurons=2.0"),
        ({"min_neurons": True}, "min_neurons=True"),
        ({"round_to": 0}, "round_to=0"),
        ({"round_to": -8}, "round_to=-8"),
        ({"round_to": "8"}, "round_to='8'"),
        ({"scope": "globl"}, "did you mean 'global'?"),
        ({"scope": 1}, "scope=1"),
        ({"aggregate": "average"}, "aggregate='average' is not allowed: expected one of 'mean', 'sum', 'max'"),
        ({"agreement": "al"}, "did you mean 'all'?"),
        ({"normalize": "l1"}, "normalize='l1'"),
        ({"activation_threshold": -0.1}, "activation_threshold=-0.1"),
        ({"activation_threshold": NAN}, "activation_threshold=nan"),
        ({"activation_threshold": INF}, "activation_threshold=inf"),
        ({"activation_threshold": True}, "activation_threshold=True"),
        ({"relative_threshold": 1}, "relative_threshold=1 is not allowed: expected True or False"),
        ({"ignore": "net.stem*"}, "ignore='net.stem*' is not allowed: expected a list of patterns"),
        ({"ignore": ["stem", 3]}, "ignore=['stem', 3]"),
        ({"ignore": None}, "ignore=None"),
        ({"ignore": 3}, "ignore=3"),
    ],
)
def test_an_option_out_of_range_says_what_came_and_what_is_allowed(options, named):
    with pytest.raises(ArgumentError) as error:
        PruningBudget("weight_l2", amount=0.5, **options)
    assert named in str(error.value)


@for_each(
    "criterion, near",
    [("fischer", "'fisher'"), ("weight_l3", "'weight_l2'"), ("dead", "'deadness'"), ("rnd", "'random'")],
)
def test_an_unknown_criterion_names_the_nearest(criterion, near):
    with pytest.raises(UnknownNameError) as error:
        PruningBudget(criterion, amount=0.5)
    assert f"criterion: nothing matches {criterion!r}. Did you mean " in str(error.value)
    assert near in str(error.value)


@for_each("criterion", [None, 3, ["fisher"], Criterion])
def test_what_is_no_criterion_is_refused(criterion):
    with pytest.raises(ArgumentError, match="criterion"):
        PruningBudget(criterion, amount=0.5)


@for_each("value", [NAN, True, "low", [1]])
def test_a_threshold_is_a_number(value):
    with pytest.raises(ArgumentError, match=r"threshold=.* is not allowed: expected a number"):
        PruningBudget("weight_l2", threshold=value)


@for_each("value", [-5.0, 0, 7, INF, -INF])
def test_a_threshold_of_importance_is_any_number(value):
    assert PruningBudget("weight_l2", threshold=value).rule == ("threshold", value)


@for_each("criterion", ["deadness", "near_zero", "apoz", "dormant", dormant(0.1)])
@for_each("value", [0, -0.5, 1.001, INF])
def test_a_threshold_of_deadness_lies_above_0_and_at_most_at_1(criterion, value):
    PruningBudget(criterion, threshold=1)
    PruningBudget(criterion, threshold=1e-6)
    with pytest.raises(ArgumentError, match=r"threshold=.* is not allowed: expected a deadness in \(0, 1\]"):
        PruningBudget(criterion, threshold=value)


def test_random_scores_have_no_threshold():
    with pytest.raises(ArgumentError, match="amount, target_params or target_macs with random scores"):
        PruningBudget("random", threshold=0.5)


@for_each("criterion", [*CRITERIA, "deadness", OWN, dormant(0.5)])
def test_only_measures_of_deadness_remove_the_most_silent(criterion):
    budget = PruningBudget(criterion, amount=0.5)
    known = CRITERIA["near_zero"] if criterion == "deadness" else CRITERIA.get(str(criterion), criterion)
    assert budget.measured.name == known.name
    assert budget.by_deadness == (known.kind == "deadness")


def test_random_scores_are_not_measured():
    budget = PruningBudget("random", amount=0.5)
    assert budget.measured is None
    assert not budget.by_deadness


@for_each("criterion", ["deadness", "near_zero"])
def test_deadness_is_counted_at_the_threshold_of_the_budget(criterion):
    found = PruningBudget(criterion, amount=0.5, activation_threshold=0.3, relative_threshold=False).measured
    same, default = near_zero(0.3, relative=False), PruningBudget(criterion, amount=0.5).measured
    assert (found.name, found.score.keywords) == (same.name, same.score.keywords)
    assert default.score.keywords == near_zero().score.keywords


@for_each(
    "criterion, rule, scope, expected",
    [
        ("weight_l2", "amount", "global", "l2"),
        ("weight_l2", "target_macs", "block", "l2"),
        ("weight_l2", "target_params", "layer", "none"),
        ("weight_l2", "threshold", "global", "none"),
        ("taylor", "amount", "global", "l2"),
        (OWN, "amount", "global", "l2"),
        ("fisher", "amount", "global", "none"),
        ("second_order", "target_macs", "block", "none"),
        ("deadness", "amount", "global", "none"),
        ("apoz", "target_params", "global", "none"),
        ("random", "amount", "global", "none"),
    ],
)
def test_layers_are_made_comparable_where_they_are_compared_and_are_not_yet(criterion, rule, scope, expected):
    budget = PruningBudget(criterion, scope=scope, **{rule: 0.5})
    assert budget.normalization == expected
    for asked in ("none", "sum", "l2"):
        assert PruningBudget(criterion, scope=scope, normalize=asked, **{rule: 0.5}).normalization == asked


@for_each("progress", [0.01, 0.25, 0.5, 0.875, 1.0, 1.5])
def test_a_part_of_the_way_is_that_part_of_what_goes(progress):
    part = min(progress, 1.0)
    assert PruningBudget(amount=0.6).at(progress).amount == pytest.approx(0.6 * part)
    assert PruningBudget(target_params=0.2).at(progress).target_params == pytest.approx(1 - 0.8 * part)
    assert PruningBudget(target_macs=0.2).at(progress).target_macs == pytest.approx(1 - 0.8 * part)
    threshold = PruningBudget("deadness", threshold=0.9)
    assert threshold.at(progress) is threshold


@for_each("rule", ["amount", "target_params", "target_macs"])
def test_on_the_way_only_the_rule_changes(rule):
    options = {"scope": "layer", "min_neurons": 3, "ignore": ["head"], "criterion": OWN, "max_amount": 0.7}
    budget = PruningBudget(**options, **{rule: 0.4})
    assert budget.at(1.0) is budget
    half = budget.at(0.5)
    assert half.rule == (rule, pytest.approx(0.2 if rule == "amount" else 0.7))
    assert {name: getattr(half, name) for name in options} == options


@for_each(
    "patterns, expected",
    [
        ([], set()),
        (["head"], {"head"}),
        (["stem"], {"stem.conv", "stem.bn.conv"}),
        (["body.1"], {"body.1.conv"}),
        (["*.conv"], {"stem.conv", "stem.bn.conv", "body.0.conv", "body.1.conv"}),
        (["body.[01]*", "head"], {"body.0.conv", "body.1.conv", "head"}),
        (("*",), set(LAYERS)),
    ],
)
def test_a_pattern_ignores_the_layers_that_it_matches_and_those_inside(patterns, expected):
    assert PruningBudget(amount=0.5, ignore=patterns).ignores(LAYERS) == expected


@for_each("pattern", ["hed", "bod", "Head", "stem.conv.weight", ""])
def test_a_pattern_that_matches_nothing_is_refused(pattern):
    with pytest.raises(UnknownNameError, match="ignore: nothing matches"):
        PruningBudget(amount=0.5, ignore=["stem", pattern]).ignores(LAYERS)
    with pytest.raises(UnknownNameError, match="Did you mean 'head'"):
        PruningBudget(amount=0.5, ignore=["hed*"]).ignores(LAYERS)
