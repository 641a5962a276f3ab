"""Criteria of activity: strength and frequency of firing. Higher is more active, not the same as more important.

Means are over samples *and* positions. ``E`` below is that mean.
"""

from functools import partial
from operator import attrgetter

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_neurons.criteria.contract import Criterion, Statistic, Summary, mean_over_values
from lightning_neurons.criteria.view import LARGEST_SQUARES

TOTAL = Statistic("total", attrgetter("total"))
SQUARES = Statistic("squares", attrgetter("squares"))
MAGNITUDE = Statistic("magnitude", attrgetter("magnitude"))
POSITIVE = Statistic("positive", attrgetter("positive"))
MAXIMUM = Statistic("maximum", attrgetter("maximum"), reduce="max")
LARGEST_MAGNITUDE = Statistic("largest_magnitude", attrgetter("largest_magnitude"), reduce="max")


def variance(summary: Summary) -> Float[Tensor, " neuron"]:
    """Compute ``E[a^2] - E[a]^2``, from float64 sums over samples of float32 sums over space.

    Below about 1e-6 of ``E[a^2]`` the result is rounding noise; it is never negative, and NaN where float64 holds no
    squares, beyond 1e145.

    Returns:
        Variances, float64, in squared units of activations.
    """
    mean = summary.per_value(TOTAL)
    spread = (mean_square(summary) - mean.square()).clamp_min(0)
    return torch.where(spread.isinf(), torch.nan, spread)


def mean_square(summary: Summary) -> Float[Tensor, " neuron"]:
    """Compute ``E[a^2]``.

    Returns:
        Mean squares, float64, in squared units of activations; infinite where float64 does not hold them.
    """
    squares = summary.total(SQUARES)
    return torch.where(squares < LARGEST_SQUARES, summary.per_value(SQUARES), torch.inf)


def dormant_score(summary: Summary) -> Float[Tensor, " neuron"]:
    """Compute ``E|a|`` over its mean over the layer's neurons.

    Source: Sokar et al. 2023, "The Dormant Neuron Phenomenon in Deep Reinforcement Learning", equation 1
    (arXiv:2302.12902).

    Returns:
        Scores without a unit, 1 on average over the layer; all zeros for a silent layer.
    """
    magnitude = summary.per_value(MAGNITUDE)
    average = magnitude.nanmean()
    return magnitude / average if average > 0 else magnitude


def rms(summary: Summary) -> Float[Tensor, " neuron"]:
    """Compute ``sqrt(E[a^2])``.

    Returns:
        Root mean squares, float64, in units of activations.
    """
    return mean_square(summary).sqrt()


def maximum(summary: Summary) -> Float[Tensor, " neuron"]:
    """Return the largest value."""
    return summary.total(MAXIMUM)


MEAN = Criterion("mean", (TOTAL,), partial(mean_over_values, statistic=TOTAL))
RMS = Criterion("rms", (SQUARES,), rms)
MAX = Criterion("max", (MAXIMUM,), maximum)
ACTIVE_SHARE = Criterion("active_share", (POSITIVE,), partial(mean_over_values, statistic=POSITIVE))
VARIANCE = Criterion("variance", (TOTAL, SQUARES), variance)
DORMANT_SCORE = Criterion("dormant_score", (MAGNITUDE,), dormant_score)
