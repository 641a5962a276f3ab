"""Scores of groups against a loop over units, layers and neurons."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_neurons import Criterion, NeuronReport, PruningBudget, Statistic, measure, prune
from lightning_neurons.dependency.torch_pruning_adapter import Group
from lightning_neurons.pruning.selection.group_scores import group_scores, neuron_scores, random_scores
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from tests.criteria.streams import laws
from tests.models import ConvNet, ResidualNet, cross_entropy, pictures, seeded
from tests.tables import for_each

NAN, INF = math.nan, math.inf
X, Y = pictures(12)
BATCHES = [(X[:6], Y[:6]), (X[6:], Y[6:])]
RULES = {"mean": lambda says: sum(says) / len(says), "sum": sum, "max": max}
values = st.sampled_from([0.0, -0.0, 0.1, 1.0, -2.5, 7.0, 1e-9])
values_or_nan = st.one_of(values, values, st.just(NAN))
Layers = dict[str, tuple[tuple[int, ...], ...]]


def known(numbers) -> list[float]:
    return [number for number in numbers if not math.isnan(number)]


def says_of(layers: Layers, scores: dict[str, list[float]], unit: int, how: str) -> list[float]:
    """What each measured layer says of one unit; NaN where it knows nothing."""
    says = []
    for layer, units in layers.items():
        if layer in scores:
            heard = known(scores[layer][neuron] for neuron in units[unit])
            says.append(RULES[how](heard) if heard else NAN)
    return says


def worth(says: list[float], how: str) -> float:
    return RULES[how](known(says)) if known(says) else NAN


def tensors(scores: dict[str, list[float]]) -> dict[str, Tensor]:
    return {layer: torch.tensor(found, dtype=torch.float64) for layer, found in scores.items()}


def scored(layers: Layers, scores: dict[str, list[float]], **options):
    group = Group("root", len(next(iter(layers.values()))), (), layers)
    return group_scores({"root": group}, tensors(scores), PruningBudget("weight_l2", amount=0.5, **options))["root"]


@st.composite
def groups(draw, score=values_or_nan, most: int = 3) -> tuple[Layers, dict[str, list[float]]]:
    """Layers with one or several neurons in each unit, in any order, some of them not measured."""
    size, layers, scores = draw(st.integers(1, 5)), {}, {}
    for layer in "abc"[: draw(st.integers(1, 3))]:
        spread = draw(st.integers(1, most))
        places = draw(st.permutations(range(size * spread)))
        layers[layer] = tuple(tuple(places[u * spread : (u + 1) * spread]) for u in range(size))
        if draw(st.booleans()) or layer == "a":
            scores[layer] = draw(st.lists(score, min_size=size * spread, max_size=size * spread))
    return layers, scores


@laws
@given(groups(), st.sampled_from(list(RULES)))
def test_a_unit_is_worth_what_its_layers_say_together(case, how):
    layers, scores = case
    found = scored(layers, scores, aggregate=how)
    for unit in range(len(layers["a"])):
        says = says_of(layers, scores, unit, how)
        assert found.by_layer[:, unit].tolist() == pytest.approx(says, nan_ok=True)
        assert found.value[unit].item() == pytest.approx(worth(says, how), nan_ok=True)


@laws
@given(groups(values), st.sampled_from(list(RULES)))
def test_where_all_must_agree_the_layer_that_needs_a_unit_most_decides(case, how):
    layers, scores = case
    found = scored(layers, scores, aggregate=how, agreement="all")
    for unit in range(len(layers["a"])):
        assert found.value[unit].item() == pytest.approx(max(says_of(layers, scores, unit, "max")))


@laws
@given(groups(most=1))
def test_where_all_must_agree_nothing_is_known_if_one_layer_knows_nothing(case):
    layers, scores = case
    found = scored(layers, scores, agreement="all")
    for unit in range(len(layers["a"])):
        says = says_of(layers, scores, unit, "max")
        assert found.value[unit].item() == pytest.approx(
            max(says) if len(known(says)) == len(says) else NAN, nan_ok=True
        )


def test_where_all_must_agree_nothing_is_known_if_one_neuron_of_a_unit_is_not():
    layers = {"a": ((0,), (1,)), "b": ((0, 1), (2, 3))}
    found = scored(layers, {"a": [1.0, 2.0], "b": [3.0, NAN, 5.0, 6.0]}, agreement="all")
    assert found.value.tolist() == pytest.approx([NAN, 6.0], nan_ok=True)


@for_each("agreement", ["mean", "all"])
def test_a_layer_without_neurons_in_a_unit_has_no_say_in_it(agreement):
    layers = {"both": ((0,), (1,), (2,)), "a": ((0,), (1,), ()), "b": ((), (), (0,))}
    found = scored(layers, {"both": [1.0, 5.0, 3.0], "a": [3.0, 1.0], "b": [1.0]}, agreement=agreement)
    assert found.value.tolist() == ([3.0, 5.0, 3.0] if agreement == "all" else [2.0, 3.0, 2.0])


@for_each("options", [{"aggregate": "mean"}, {"aggregate": "max"}, {"agreement": "all"}])
def test_without_a_measured_layer_nothing_is_known(options):
    found = scored({"a": ((0,), (1,))}, {"other": [1.0]}, **options)
    assert found.by_layer.shape == (0, 2)
    assert found.value.isnan().all()


def test_an_infinite_score_is_a_score():
    found = scored({"a": ((0,), (1,)), "b": ((0,), (1,))}, {"a": [INF, -INF], "b": [1.0, 1.0]}, aggregate="max")
    assert found.value.tolist() == [INF, 1.0]


@functools.cache
def groups_of(make: type[nn.Module]) -> dict[str, Group]:
    net = seeded(make, **({"inplace": False} if make is ResidualNet else {}))
    return discover(net, Example(pictures(2)[0])).offered


def test_a_residual_sum_averages_the_layers_that_it_adds():
    scores = tensors({"conv1": [1.0, 2, 3, 4, 5], "conv2": [5.0, 4, 3, 2, 1], "conv3": [3.0, NAN, 1, 8, 5]})
    found = group_scores(groups_of(ResidualNet), scores, PruningBudget("weight_l2", amount=0.5))
    assert found["conv1"].value.tolist() == [2, 2, 2, 6, 5]
    assert found["conv2"].value.tolist() == [5, 4, 3, 2, 1]
    assert found["conv1"].by_layer.shape == (2, 5)
    assert set(found) == {"conv1", "conv2"}


@functools.cache
def report() -> NeuronReport:
    criteria = ["weight_l2", "fisher", "rms", "near_zero", "apoz"]
    return measure(seeded(ConvNet), [pictures(12)], loss_fn=cross_entropy, criteria=criteria)


@for_each("criterion", ["deadness", "near_zero", "apoz"])
@for_each("options", [{}, {"normalize": "l2"}, {"scope": "layer"}])
def test_the_worth_of_a_silent_neuron_is_minus_its_deadness(criterion, options):
    name = "near_zero" if criterion == "deadness" else criterion
    found = neuron_scores(report(), PruningBudget(criterion, amount=0.5, **options))
    assert found.keys() == report().deadness_by[name].keys()
    for layer, deadness in report().deadness_by[name].items():
        assert found[layer].tolist() == [-share for share in deadness.tolist()]


@for_each(
    "criterion, options, divided",
    [
        ("weight_l2", {"amount": 0.5, "scope": "global"}, True),
        ("rms", {"target_macs": 0.5, "scope": "block"}, True),
        ("rms", {"amount": 0.5, "scope": "layer"}, False),
        ("rms", {"threshold": 0.5}, False),
        ("fisher", {"amount": 0.5, "scope": "global"}, False),
        ("weight_l2", {"amount": 0.5, "scope": "global", "normalize": "none"}, False),
    ],
)
def test_importance_is_divided_by_its_length_where_layers_compete(criterion, options, divided):
    found = neuron_scores(report(), PruningBudget(criterion, **options))
    for layer, scores in report().scores[criterion].items():
        length = math.sqrt(sum(s * s for s in scores.tolist())) if divided else 1.0
        assert found[layer].dtype == torch.float64
        assert found[layer].tolist() == pytest.approx([s / length for s in scores.tolist()])


def test_scores_in_loss_units_that_are_divided_all_the_same_draw_a_warning():
    with pytest.warns(UserWarning, match="units of the loss"):
        neuron_scores(report(), PruningBudget("fisher", amount=0.5, normalize="sum"))


def test_random_scores_depend_on_the_seed_alone():
    def drawn(seed: int) -> list[list[float]]:
        torch.rand(seed + 3)
        return [scores.value.tolist() for scores in random_scores(groups_of(ConvNet), seed).values()]

    assert drawn(0) == drawn(0)
    assert drawn(5) == drawn(5) != drawn(6)
    assert [len(value) for value in drawn(0)] == [6, 5, 7]
    everything = [value for values in drawn(1) for value in values]
    assert len(set(everything)) == len(everything)
    assert all(0 <= value < 1 for value in everything)


def test_random_scores_leave_the_random_numbers_of_others_alone():
    before = torch.get_rng_state()
    found = random_scores(groups_of(ConvNet), 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(scores.by_layer.tolist() == [scores.value.tolist()] for scores in found.values())


def gone(budget, batches=None, **options) -> dict[str, tuple[int, ...]]:
    return prune(seeded(ConvNet), X[:2], budget, batches, **options).plan.neurons


def lowest(scores: dict[str, torch.Tensor], amount: float) -> dict[str, tuple[int, ...]]:
    """Of each layer but the head, its lowest share."""
    cut = {layer: s for layer, s in scores.items() if layer != "fc2"}
    return {layer: tuple(sorted(s.argsort()[: round(amount * len(s))].tolist())) for layer, s in cut.items()}


@for_each("criterion", ["weight_l1", "weight_l2", "outgoing_l1", "outgoing_l2", "norm_scale"])
def test_what_looks_at_weights_alone_needs_no_batches(criterion):
    scores = measure(seeded(ConvNet), BATCHES, criteria=[criterion]).scores[criterion]
    assert gone({"criterion": criterion, "amount": 0.4, "scope": "layer"}) == lowest(scores, 0.4) != {}


@for_each("criterion", ["rms", "taylor", "fisher", "second_order_ggn"])
def test_the_lowest_share_of_a_measurement_goes(criterion):
    scores = measure(seeded(ConvNet), BATCHES, loss_fn=cross_entropy, criteria=[criterion]).scores[criterion]
    assert gone({"criterion": criterion, "amount": 0.4, "scope": "layer"}, iter(BATCHES)) == lowest(scores, 0.4)


def test_silence_is_measured_at_the_threshold_of_the_budget():
    budget = PruningBudget("deadness", threshold=0.5, activation_threshold=0.1, relative_threshold=False)
    options = {"criteria": ["near_zero"], "threshold": 0.1, "relative_threshold": False}
    deadness = measure(seeded(ConvNet), BATCHES, **options).deadness
    expected = {n: tuple((d >= 0.5).nonzero().flatten().tolist()) for n, d in deadness.items() if n != "fc2"}
    assert gone(budget, BATCHES) == {layer: dead for layer, dead in expected.items() if dead} != {}


def test_by_default_gradients_are_those_of_the_cross_entropy():
    budget = {"criterion": "taylor", "amount": 0.5, "scope": "layer"}
    assert gone(budget, BATCHES) == gone(budget, BATCHES, loss_fn=cross_entropy)
    negative = gone({**budget, "criterion": "second_order"}, BATCHES, loss_fn=lambda m, b: -cross_entropy(m, b))
    assert negative != gone({**budget, "criterion": "second_order"}, BATCHES)


def test_a_criterion_of_ones_own_is_taken_as_it_is():
    cubes = Statistic("cubes", lambda view: (view.activation**3).sum(-1))
    own = Criterion("cubes", (cubes,), lambda summary: summary.per_value(cubes))
    activations, _ = seeded(ConvNet).by_hand(X)
    cubed = {n: (a[0].detach() ** 3).transpose(0, 1).flatten(1).mean(1) for n, a in activations.items()}
    assert gone(PruningBudget(own, amount=0.4, scope="layer"), BATCHES) == lowest(cubed, 0.4)
