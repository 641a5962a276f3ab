"""The order in which units go, compared with inverting everything again at every step, and with all choices."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightning_neurons.pruning.selection import reconstruction
from lightning_neurons.pruning.selection.reconstruction import Reading, eliminate
from tests.tables import for_each


def reading(places: tuple[tuple[int, ...], ...], seed: int = 0, *, outputs: int = 3, more: int = 2) -> Reading:
    """Random weights and correlated inputs, some of which belong to no unit."""
    generator = torch.Generator().manual_seed(seed)
    inputs = max(place for unit in places for place in unit) + 1 + more
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    covariance = mix @ mix.T / inputs + 0.05 * torch.eye(inputs, dtype=torch.float64)
    weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    return Reading(weight, covariance, places, 0.5 + seed)


def schur(one: Reading, units: tuple[int, ...]) -> float:
    """What is left of the error when some units have gone and all other weights are solved again."""
    gone = [place for unit in units for place in one.places[unit]]
    stay = [i for i in range(len(one.covariance)) if i not in gone]
    s = one.covariance
    rest = s[gone][:, gone] - s[gone][:, stay] @ torch.linalg.inv(s[stay][:, stay]) @ s[stay][:, gone]
    return float(torch.trace(one.weight[gone].T @ rest @ one.weight[gone])) / one.scale


def error(readings: list[Reading], units: tuple[int, ...]) -> float:
    return sum(schur(one, units) for one in readings)


def solved_again(one: Reading, units: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The covariance of the inputs that stay, and the weights that come closest with them; their own places."""
    gone = [place for unit in units for place in one.places[unit]]
    stay = [i for i in range(len(one.covariance)) if i not in gone]
    s = one.covariance
    weight = torch.zeros_like(one.weight)
    weight[stay] = torch.linalg.solve(s[stay][:, stay], s[stay] @ one.weight)
    return torch.linalg.inv(s[stay][:, stay]), weight[stay]


def step_by_step(readings: list[Reading], units: int) -> tuple[list[int], list[float]]:
    """Solve everything again for each unit that could go next."""
    order: list[int] = []
    errors: list[float] = []
    while len(order) < units:
        before = error(readings, tuple(order))
        costs = {u: error(readings, (*order, u)) - before for u in range(units) if u not in order}
        best = min(costs, key=lambda u: costs[u])
        order.append(best)
        errors.append(costs[best])
    return order, errors


SINGLE = tuple((i,) for i in range(7))
BLOCKS = tuple(tuple(range(3 * i, 3 * i + 3)) for i in range(5))
SCATTERED = ((4, 9), (0, 1), (2, 7), (8, 3), (6, 5))
UNEQUAL = ((0,), (1, 2), (), (3, 4, 5), (6,))
EMPTY = ((), (0,), (), (1,), (2,))

CASES = {
    "one place each": [reading(SINGLE)],
    "one place each, nothing else": [reading(SINGLE, more=0)],
    "blocks": [reading(BLOCKS)],
    "scattered": [reading(SCATTERED, 1)],
    "unequal": [reading(UNEQUAL, 2)],
    "two readers": [reading(SINGLE), reading(SINGLE[::-1], 3, outputs=5)],
    "three readers of different kinds": [reading(BLOCKS, 1), reading(UNEQUAL, 2), reading(SCATTERED, 4, outputs=1)],
    "some read by one alone": [reading(EMPTY, 1), reading(SCATTERED, 2)],
}
with_each_case = for_each("name", CASES)


def units_of(readings: list[Reading]) -> int:
    return len(readings[0].places)


@with_each_case
def test_the_first_to_go_is_the_cheapest_of_all(name):
    readings = CASES[name]
    order, errors = eliminate(readings, units_of(readings))
    alone = [error(readings, (unit,)) for unit in range(units_of(readings))]
    assert order[0] == alone.index(min(alone))
    assert errors[0] == pytest.approx(min(alone), rel=1e-9, abs=1e-12)


@with_each_case
def test_order_and_errors_are_those_of_solving_again_at_every_step(name):
    readings = CASES[name]
    order, errors = eliminate(readings, units_of(readings))
    expected, costs = step_by_step(readings, units_of(readings))
    assert order == expected
    assert errors == pytest.approx(costs, rel=1e-7, abs=1e-10)


@for_each("at_once", [1, 2, 5])
@with_each_case
def test_it_does_not_matter_when_the_whole_matrices_are_brought_up_to_date(at_once, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "AT_ONCE", at_once)
        order, errors = eliminate(CASES[name], units_of(CASES[name]))
    expected, costs = step_by_step(CASES[name], units_of(CASES[name]))
    assert order == expected
    assert errors == pytest.approx(costs, rel=1e-7, abs=1e-10)


@for_each("seed", range(10))
def test_other_seeds_too(seed):
    readings = [reading(SCATTERED, seed), reading(UNEQUAL, seed + 20)]
    order, errors = eliminate(readings, 5)
    expected, costs = step_by_step(readings, 5)
    assert order == expected
    assert errors == pytest.approx(costs, rel=1e-7, abs=1e-10)


@with_each_case
def test_errors_add_up_to_that_of_all_that_have_gone(name):
    readings = CASES[name]
    order, errors = eliminate(readings, units_of(readings))
    for count in range(1, len(order) + 1):
        expected = error(readings, tuple(order[:count]))
        assert sum(errors[:count]) == pytest.approx(expected, rel=1e-7, abs=1e-10)
    assert min(errors) >= -1e-10


@for_each("places", [SINGLE, BLOCKS, SCATTERED])
def test_a_cost_is_that_of_the_weights_as_they_are_by_then(places):
    """With the formula of Hassibi and Stork, on weights and an inverse that are computed afresh."""
    one = reading(places, 5, more=0)
    order, errors = eliminate([one], len(places))
    for step, unit in enumerate(order[:-1]):
        gone = tuple(order[:step])
        lost = {place for u in gone for place in places[u]}
        inverse, weight = solved_again(one, gone)
        rows = [
            sorted(set(range(len(one.covariance))) - lost).index(place) for place in places[unit] if place not in lost
        ]
        rest = torch.linalg.inv(inverse[rows][:, rows])
        expected = float(torch.trace(weight[rows].T @ rest @ weight[rows])) / one.scale
        assert errors[step] == pytest.approx(expected, rel=1e-7)


@for_each("places", [SINGLE, SCATTERED, UNEQUAL])
@for_each("seed", range(8))
def test_no_choice_is_better_than_the_best_and_none_twice_as_bad(places, seed):
    one = reading(places, seed, more=0)
    order, errors = eliminate([one], len(places))
    for count in range(1, len(places)):
        best = min(schur(one, chosen) for chosen in combinations(range(len(places)), count))
        reached = sum(errors[:count])
        assert best * (1 - 1e-9) - 1e-12 <= reached <= 2 * best + 1e-12, (order, count)


def test_doubles_go_first_and_cost_nothing():
    one = reading(SINGLE, 1, more=0)
    mix = torch.eye(7, dtype=torch.float64)
    mix[5] = mix[2]  # the sixth is the third again
    covariance = mix @ one.covariance @ mix.T + 1e-9 * torch.eye(7, dtype=torch.float64)
    order, errors = eliminate([Reading(one.weight, covariance, SINGLE, 1.0)], 7)
    assert order[0] in (2, 5)
    assert errors[0] < 1e-6 < errors[1]


def test_what_nobody_reads_goes_first():
    one = reading(SINGLE, 2, more=0)
    weight, covariance = one.weight.clone(), one.covariance.clone()
    weight[3] = 0
    covariance[3], covariance[:, 3] = 0, 0
    covariance[3, 3] = 1e-3
    order, errors = eliminate([Reading(weight, covariance, SINGLE, 1.0)], 7)
    assert (order[0], errors[0]) == (3, 0.0)


def test_nothing_is_changed_by_looking():
    readings = CASES["three readers of different kinds"]
    before = [(one.weight.clone(), one.covariance.clone()) for one in readings]
    assert eliminate(readings, 5) == eliminate(readings, 5)
    assert all(
        torch.equal(one.weight, w) and torch.equal(one.covariance, s)
        for one, (w, s) in zip(readings, before, strict=True)
    )
    assert eliminate([], 0) == ([], [])
