"""Selectivity, entropy and the sharing of neurons against closed forms and sets of Python."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_neurons.criteria.selectivity import class_entropy, class_selectivity, reuse, shared_by
from tests.criteria.streams import laws
from tests.tables import for_each

NAN = math.nan
seeds = st.integers(0, 10_000)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


@for_each(
    "values, expected",
    [
        ((4, 1, 1, 1), 0.6),
        ((1, 1, 4, 1), 0.6),
        ((2, 2, 2), 0.0),
        ((0, 7, 0), 1.0),
        ((3, 1), 0.5),
        ((3, 2, 0, 1), 0.5),
        ((NAN, 3, 1), 0.5),
        ((4, NAN, 1, 1, NAN, 1), 0.6),
        ((0, 0, 0), NAN),
        ((NAN, 0, 0), NAN),
        ((NAN, 5), NAN),
        ((5,), NAN),
    ],
)
def test_selectivity_in_closed_form(values, expected):
    assert class_selectivity(column(*map(float, values))).item() == pytest.approx(expected, abs=1e-9, nan_ok=True)


@for_each(
    "values, expected",
    [
        ((1, 1, 1, 1), 1.0),
        ((5, 0, 0), 0.0),
        ((2, 2, 0, 0), 0.5),
        ((3, 1), 2 - 0.75 * math.log2(3)),
        ((3, -4, 3, -1), 0.5),
        ((NAN, 1, 1), 1.0),
        ((2, 2, NAN, 0, 0), 0.5),
        ((0, 0, 0), NAN),
        ((-1, -2), NAN),
        ((NAN, 2), NAN),
    ],
)
def test_entropy_in_closed_form(values, expected):
    assert class_entropy(column(*map(float, values))).item() == pytest.approx(expected, abs=1e-9, nan_ok=True)


@laws
@given(seeds, st.permutations(range(5)), st.permutations(range(6)), st.sampled_from([1e-3, 1.0, 1e4]))
def test_the_order_of_classes_and_units_do_not_matter_and_neurons_move_along(seed, classes, neurons, factor):
    torch.manual_seed(seed)
    values = torch.rand(5, 6, dtype=torch.float64)
    moved = factor * values[list(classes)][:, list(neurons)]
    for index in (class_selectivity, class_entropy):
        found = index(values)
        torch.testing.assert_close(index(moved), found[list(neurons)], rtol=1e-7, atol=1e-9)
        assert ((found >= 0) & (found <= 1)).all()


@laws
@given(seeds)
def test_a_class_without_samples_changes_nothing(seed):
    torch.manual_seed(seed)
    values = torch.rand(4, 3)
    more = torch.cat([values[:2], torch.full((1, 3), NAN), values[2:]])
    for index in (class_selectivity, class_entropy):
        torch.testing.assert_close(index(more), index(values))


WIDTHS = {"conv": 7, "fc": 12, "wide": 31}


def random_sets(seed: int, sizes: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    """Sets of given sizes in each layer, one row for each class."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.zeros(len(sizes), width, dtype=torch.bool) for name, width in WIDTHS.items()}
    for row, of in enumerate(sizes):
        for name, width in WIDTHS.items():
            found[name][row, torch.randperm(width, generator=generator)[: of[name]]] = True
    return found


SIZES = [{"conv": 3, "fc": 6, "wide": 4}, {"conv": 5, "fc": 2, "wide": 20}, {"conv": 1, "fc": 11, "wide": 9}]


def as_sets(members: dict[str, torch.Tensor], row: int) -> set[tuple[str, int]]:
    return {(name, i) for name, m in members.items() for i, on in enumerate(m[row].tolist()) if on}


@laws
@given(seeds)
def test_the_jaccard_index_is_that_of_python_sets(seed):
    members = random_sets(seed, SIZES)
    observed, _ = reuse(members)
    for i in range(3):
        for j in range(3):
            a, b = as_sets(members, i), as_sets(members, j)
            assert observed[i, j].item() == pytest.approx(len(a & b) / len(a | b), abs=1e-12)
    counts = [
        sum((name, i) in as_sets(members, row) for row in range(3)) for name in WIDTHS for i in range(WIDTHS[name])
    ]
    assert shared_by(members).tolist() == [counts.count(n) for n in range(4)]


def test_random_sets_share_as_many_as_by_chance():
    observed = torch.stack([reuse(random_sets(seed, SIZES))[0] for seed in range(600)])
    chance = reuse(random_sets(0, SIZES))[1]
    off = ~torch.eye(3, dtype=torch.bool)
    assert (observed.mean(0) - chance)[off].abs().max() < 0.01
    assert observed.std(0)[off].min() > 0.02


def test_the_chance_level_depends_on_sizes_alone_and_is_symmetric():
    first, second = (reuse(random_sets(seed, SIZES))[1] for seed in (1, 2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, first.t())


@for_each("share", [0.1, 0.25, 0.5, 0.9])
def test_equal_shares_of_one_layer_have_the_chance_level_in_closed_form(share):
    for width, tolerance in ((40, 0.15), (40_000, 2e-4)):
        members = torch.zeros(2, width, dtype=torch.bool)
        members[:, : round(share * width)] = True
        found = reuse({"fc": members})[1][0, 1].item()
        assert found == pytest.approx(share / (2 - share), rel=tolerance)
        assert found > share / (2 - share), "the index is convex in the number of shared neurons"


def first_of(sizes: list[tuple[int, ...]], widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The first so many neurons of each layer, one row for each class."""
    return {
        f"layer{at}": torch.stack([torch.arange(width) < size[at] for size in sizes]) for at, width in enumerate(widths)
    }


@for_each(
    "widths, one, other",
    [
        ((4,), (2,), (2,)),
        ((5,), (4,), (3,)),
        ((4, 3), (2, 1), (1, 2)),
        ((3, 5, 2), (3, 1, 1), (1, 4, 0)),
        ((2, 2, 2, 3), (1, 0, 1, 2), (1, 2, 1, 1)),
        ((4, 2), (0, 0), (3, 1)),
        ((3, 2), (3, 2), (3, 2)),
    ],
)
def test_the_chance_level_is_the_mean_over_all_sets(widths, one, other):
    first = {(at, i) for at, size in enumerate(one) for i in range(size)}
    found = []
    for picks in itertools.product(
        *(itertools.combinations(range(width), size) for width, size in zip(widths, other, strict=True))
    ):
        second = {(at, i) for at, chosen in enumerate(picks) for i in chosen}
        found.append(len(first & second) / len(first | second))
    chance = reuse(first_of([one, other], widths))[1]
    assert chance[0, 1].item() == pytest.approx(sum(found) / len(found), abs=1e-12)
    assert chance[1, 0].item() == chance[0, 1].item()


def test_the_chance_level_of_several_small_layers_by_monte_carlo():
    widths, sizes = (3, 6, 4, 9), [(1, 4, 2, 3), (2, 1, 3, 7), (3, 0, 1, 2), (0, 0, 0, 0)]
    torch.manual_seed(0)
    both, draws = torch.zeros(4, 4, 20_000), 20_000
    for at, width in enumerate(widths):
        order = torch.rand(4, draws, width).argsort(-1)  # of each class anew
        on = (order < torch.tensor([size[at] for size in sizes])[:, None, None]).float()
        both += torch.einsum("idn,jdn->ijd", on, on)
    total = torch.tensor([float(sum(size)) for size in sizes])
    simulated = (both / (total[:, None, None] + total[:, None] - both)).mean(-1)
    chance = reuse(first_of(sizes, widths))[1]
    off = ~torch.eye(4, dtype=torch.bool)
    assert (simulated - chance)[off].abs().max() < 0.003
    assert chance[3, :3].tolist() == [0.0, 0.0, 0.0]


def test_two_empty_sets_have_no_index():
    observed, chance = reuse(first_of([(0, 0), (0, 0), (1, 0)], (3, 2)))
    for found in (observed, chance):
        assert found.isnan().tolist() == [[True, True, False], [True, True, False], [False] * 3]


def test_a_set_shares_everything_with_itself_and_nothing_with_its_complement():
    one = torch.tensor([[True, False, True, False, False]])
    observed, _ = reuse({"a": torch.cat([one, ~one]), "b": torch.cat([~one, one])})
    assert observed.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_neurons_are_counted_by_how_many_classes_share_them():
    members = {"a": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0]]).bool(), "b": torch.ones(3, 2).bool()}
    assert shared_by(members).tolist() == [1, 1, 0, 3]
    assert shared_by({"a": torch.zeros(4, 3).bool()}).tolist() == [3, 0, 0, 0, 0]
