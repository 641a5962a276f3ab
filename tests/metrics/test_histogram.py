"""The log histogram: its error, its counts, and what can be read off it."""

import math
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_neurons.criteria import LayerView
from lightning_neurons.metrics.histogram import (
    BINS,
    HIGHEST,
    LOWEST,
    PARTS,
    POSITIONS,
    RELATIVE_ERROR,
    bin_index,
    folded,
    folded_edges,
    positions,
    representatives,
    share_at_most,
)
from tests.criteria.streams import LAYER, laws, open_metric, traits
from tests.tables import for_each

magnitudes = st.floats(LOWEST, HIGHEST, exclude_max=True, width=32)


def count(values: Tensor) -> Tensor:
    """One neuron's histogram, by the definition."""
    return torch.bincount(bin_index(values).long(), minlength=BINS)[None]


def streamed(values: Tensor, *sizes: int) -> Tensor:
    """The same through the metric, in batches: ``(neuron, bin)``."""
    metric = open_metric(["near_zero"], traits(values.shape[1]), values.shape[1])
    for part in values.split(list(sizes) or [len(values)]):
        metric.update(LAYER, LayerView(part))
        metric.finish_batch()
    return metric.histogram[0]


@laws
@given(magnitudes, st.booleans())
def test_a_value_is_at_most_1_percent_off_its_bin(value, negative):
    index = bin_index(torch.tensor([-value if negative else value]))
    found = representatives()[index].item()
    assert abs(found - value) <= RELATIVE_ERROR * value * (1 + 1e-12)
    assert RELATIVE_ERROR < 0.01


def test_every_power_of_two_and_its_neighbours_are_at_most_1_percent_off():
    powers = 2.0 ** torch.arange(-20, 12)
    up, down = torch.nextafter(powers, powers * 2), torch.nextafter(powers[1:], powers[1:] / 2)
    values = torch.cat([powers, up, down])
    found = representatives()[bin_index(values)]
    assert ((found - values).abs() <= RELATIVE_ERROR * values.double() * (1 + 1e-12)).all()


@laws
@given(st.lists(magnitudes, min_size=2, max_size=20))
def test_larger_values_never_lie_in_lower_bins(values):
    index = bin_index(torch.tensor(sorted(values)))
    assert (index.diff() >= 0).all()


def test_zeros_tiny_and_huge_values_lie_outside():
    outside = torch.tensor([0.0, -0.0, LOWEST * 0.999, -1e-30, 1e-45])
    assert bin_index(outside).tolist() == [0] * 5
    assert bin_index(torch.tensor([HIGHEST, -HIGHEST, 1e30, math.inf, math.nan])).tolist() == [BINS - 1] * 5
    assert bin_index(torch.tensor([LOWEST, HIGHEST * 0.9999])).tolist() == [1, BINS - 2]


@for_each("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_lie_in_the_same_bins(dtype):
    values = torch.tensor([0.0, 0.25, -1.5, 96.0], dtype=dtype)
    assert bin_index(values).tolist() == bin_index(values.float()).tolist()


@laws
@given(st.integers(0, 1000), st.integers(1, 19))
def test_halves_merge_to_the_whole_bit_for_bit(seed, cut):
    torch.manual_seed(seed)
    values = torch.randn(20, 3, 5).exp()
    whole = streamed(values)
    assert torch.equal(streamed(values[:cut]) + streamed(values[cut:]), whole)
    assert torch.equal(streamed(values, cut, 20 - cut), whole)
    assert torch.equal(whole, torch.cat([count(values[:, i].flatten()) for i in range(3)]))
    assert whole.sum().item() == values.numel()


def test_what_is_not_finite_is_left_out():
    values = torch.randn(10, 2, 4)
    clean = streamed(values)
    values[3, 0, 1], values[7, 1, 2] = math.nan, math.inf
    found = streamed(values)
    assert torch.equal(found[0], streamed(values[[i for i in range(10) if i != 3]])[0])
    assert torch.equal(found[1], streamed(values[[i for i in range(10) if i != 7]])[1])
    assert found.sum().item() == clean.sum().item() - 8


@laws
@given(st.integers(0, 1000), st.sampled_from([0.001, 0.05, 0.5, 1.0, 3.0]))
def test_the_share_below_a_limit_is_exact_outside_of_1_percent_around_it(seed, limit):
    torch.manual_seed(seed)
    values = torch.randn(300)
    size = values.double().abs().numpy()
    share = share_at_most(count(values), limit).item()
    assert np.mean(size <= 0.99 * limit) <= share <= np.mean(size <= 1.01 * limit)


def test_nothing_counted_gives_nan():
    empty = torch.zeros(2, BINS, dtype=torch.int64)
    assert share_at_most(empty, 1.0).isnan().all()


def test_zeros_are_below_every_limit():
    counts = count(torch.tensor([0.0, 0.0, 1.0, 2.0]))
    assert share_at_most(counts, 0.0).item() == 0.5


def test_counts_are_exact_beyond_what_single_precision_can_count():
    counts = count(torch.tensor([1.0])) * (2**24 + 1) + count(torch.tensor([3.0]))
    assert share_at_most(counts, 2.0).item() == (2**24 + 1) / (2**24 + 2)


@laws
@given(st.integers(1, 5000))
def test_positions_are_a_few_different_ones_within_the_picture(space):
    chosen = positions(space).tolist()
    assert len(chosen) == min(space, POSITIONS)
    assert chosen == sorted(set(chosen))
    assert chosen[0] >= 0
    assert chosen[-1] < space


@for_each("side", [8, 16, 32, 56])
def test_positions_spread_over_rows_and_columns(side):
    chosen = positions(side * side)
    for half in (chosen // side, chosen % side):
        assert 3 <= int((half < side // 2).sum()) <= 5


@laws
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4, 8, 64]))
def test_folded_bars_are_sums_of_neighbouring_bins(seed, parts):
    torch.manual_seed(seed)
    counts = torch.randint(0, 50, (3, BINS))
    bars = folded(counts, parts).tolist()
    width, expected = PARTS // parts, [0] * ((BINS - 2) // (PARTS // parts) + 2)
    for neuron in counts.tolist():
        for place, count_ in enumerate(neuron):
            inner = (place - 1) // width + 1
            expected[0 if place == 0 else len(expected) - 1 if place == BINS - 1 else inner] += count_
    assert bars == expected


@for_each("parts", [1, 2, 4, 64])
def test_edges_are_equal_parts_of_every_power_of_two(parts):
    expected = [2.0**power * (1 + part / parts) for power in range(-20, 12) for part in range(parts)] + [2.0**12]
    assert folded_edges(parts).tolist() == expected


@laws
@given(st.lists(magnitudes, min_size=1, max_size=20), st.sampled_from([1, 2, 4]))
def test_each_value_lies_between_the_edges_of_its_bar(values, parts):
    bars, edges = folded(count(torch.tensor(values)), parts), folded_edges(parts)
    expected = [sum(low <= value < high for value in values) for low, high in pairwise(edges.tolist())]
    assert bars[1:-1].tolist() == expected
    assert bars[[0, -1]].tolist() == [0, 0]


def test_what_counts_as_zero_and_what_is_above_have_bars_of_their_own():
    bars = folded(count(torch.tensor([0.0, 1e-9, -1e9, 1.0])), 2)
    assert (int(bars[0]), int(bars[-1]), int(bars.sum())) == (2, 1, 4)


def test_folded_counts_are_exact_beyond_what_single_precision_can_count():
    counts = torch.zeros(2, BINS, dtype=torch.int64)
    counts[:, 5] = 2**24 + 1
    assert folded(counts, 2).max().item() == 2 * (2**24 + 1)
