"""Agreement of two rankings against naive twins, ties included."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_neurons.criteria import agreement
from lightning_neurons.errors import ArgumentError
from tests import reference
from tests.criteria.streams import laws
from tests.tables import for_each

numbers = st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0, 3.0, math.nan])
pairs = st.lists(st.tuples(numbers, numbers), min_size=0, max_size=10)


def tensor(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def twin(x: list[float], y: list[float], share: float) -> tuple[float, float, float]:
    """Correlations and overlap of what both have measured."""
    both = [(a, b) for a, b in zip(x, y, strict=True) if not (math.isnan(a) or math.isnan(b))]
    x, y = [a for a, _ in both], [b for _, b in both]
    tops = reference.top_share(x, share), reference.top_share(y, share)
    return reference.spearman(x, y), reference.kendall(x, y), reference.jaccard(*tops)


@laws
@given(pairs, st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_agreement_equals_its_twin(pairs, share):
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    found = agreement(tensor(x), tensor(y), share=share)
    expected = twin(x, y, share)
    assert (found.spearman, found.kendall, found.jaccard) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@laws
@given(st.lists(st.integers(0, 20), min_size=2, max_size=10, unique=True))
def test_a_ranking_agrees_with_itself_and_disagrees_with_its_reverse(values):
    same, reverse = agreement(tensor(values), tensor(values)), agreement(tensor(values), -tensor(values))
    assert (same.spearman, same.kendall, same.jaccard) == pytest.approx((1, 1, 1))
    assert (reverse.spearman, reverse.kendall) == pytest.approx((-1, -1))


@laws
@given(pairs)
def test_agreement_goes_both_ways_and_does_not_depend_on_scale(pairs):
    x, y = tensor(a for a, _ in pairs), tensor(b for _, b in pairs)
    there, back = agreement(x, y, share=0.5), agreement(3 * y + 1, x, share=0.5)
    values = lambda a: (a.spearman, a.kendall, a.jaccard)
    assert values(there) == pytest.approx(values(back), abs=1e-12, nan_ok=True)


def test_a_constant_ranking_has_no_correlation():
    found = agreement(torch.ones(4), torch.arange(4.0))
    assert math.isnan(found.spearman)
    assert math.isnan(found.kendall)


def test_fewer_than_two_measured_neurons_have_no_correlation():
    found = agreement(tensor([1, math.nan]), tensor([1, 2]))
    assert math.isnan(found.spearman)
    assert found.jaccard == 1
    assert math.isnan(agreement(tensor([]), tensor([])).jaccard)


@for_each("share", [0.1, 0.3])
def test_random_top_sets_overlap_as_the_formula_says(share):
    generator = random.Random(0)
    found = [
        agreement(tensor(generator.random() for _ in range(300)), tensor(generator.random() for _ in range(300)),
                  share=share).jaccard
        for _ in range(30)
    ]  # fmt: skip
    assert sum(found) / 30 == pytest.approx(share / (2 - share), abs=0.03)


def test_rankings_of_different_lengths_are_refused():
    with pytest.raises(ArgumentError, match=r"second=\(2,\) is not allowed: expected as many scores as first has, 3"):
        agreement(torch.ones(3), torch.ones(2))


@for_each("share", [-0.1, 1.1, math.nan])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ArgumentError, match=rf"share={share} is not allowed: expected a share in \[0, 1\]"):
        agreement(torch.arange(3.0), torch.arange(3.0), share=share)
