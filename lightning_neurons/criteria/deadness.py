"""Five measures of deadness in [0, 1], where 1 is dead, and a confidence bound for neurons that never fired.

A neuron that was silent in all finite samples while others were NaN or infinite may have fired in those: it is unknown
(NaN), by each of these measures.

================ ============================================================== ========================
name             1 means                                                        defined for
================ ============================================================== ========================
``near_zero``    no value of ``|a|`` exceeds the threshold                      every layer
``apoz``         every value is exactly zero                                    rectified layers
``dormant``      dormant score at most tau (0 or 1)                             every layer
``constant``     the value never changes (0 or 1)                               every layer
``saturated``    every value lies at a bound of the function                    sigmoid- and tanh-like
================ ============================================================== ========================
"""

import math
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_neurons.criteria.activity import (
    LARGEST_MAGNITUDE,
    MAGNITUDE,
    POSITIVE,
    SQUARES,
    TOTAL,
    dormant_score,
    variance,
)
from lightning_neurons.criteria.contract import Criterion, LayerTraits, Statistic, Summary, mean_over_values
from lightning_neurons.criteria.view import LARGEST_SQUARES, LayerView
from lightning_neurons.errors import ArgumentError, is_number

SATURATION_MARGIN = 0.05
"""Distance from a bound, in activation units: |tanh| > 0.95, sigmoid < 0.05 or > 0.95 (Glorot and Bengio 2010)."""

CONSTANT_TOLERANCE = 1e-3
"""Standard deviation over root mean square below which a neuron counts as constant. float32 sums resolve about 5e-4."""

SILENT = 0.01
"""Default threshold of silence everywhere: a share of the layer's root mean square."""


def check_threshold(value: float, name: str = "threshold") -> float:
    """Return ``value`` if it is a finite number of at least zero.

    Raises:
        ArgumentError: Otherwise.
    """
    if not is_number(value) or not math.isfinite(value) or value < 0:
        raise ArgumentError.of(name, value, "a finite number of at least 0")
    return float(value)


def near_zero(threshold: float = SILENT, *, relative: bool = True) -> Criterion:
    """Make the criterion of the share of values with ``|a|`` at most ``threshold``; 1 only if no value exceeds it.

    The share is read off a histogram of at most 8 positions per sample with bins 2 % wide; whether a neuron *ever*
    exceeds the threshold is decided on all positions.

    Args:
        threshold: In units of the layer's root mean square if ``relative``, else in activation units.
        relative: An absolute threshold means something else in each layer; a relative one does not.

    Returns:
        A criterion with scores in [0, 1].

    Raises:
        ArgumentError: If ``threshold`` is negative or not finite.
    """
    check_threshold(threshold)
    score = partial(near_zero_share, threshold=threshold, relative=relative)
    return Criterion("near_zero", (SQUARES, LARGEST_MAGNITUDE), score, "deadness", histogram=True)


def near_zero_share(summary: Summary, *, threshold: float, relative: bool) -> Float[Tensor, " neuron"]:
    """Compute the score of ``near_zero``.

    Returns:
        The share of values, from 0 to 1, whose magnitude is at most the threshold; 1 only if all are.
    """
    assert summary.near_zero is not None, "counted wherever a criterion asks for it"
    assert summary.values is not None, "counted wherever activations are"
    limit = threshold * layer_rms(summary) if relative else threshold
    return exact_at_the_end(summary.near_zero(limit), summary.total(LARGEST_MAGNITUDE), limit, summary.values)


def layer_rms(summary: Summary) -> float:
    """Compute the root mean square over all finite values of a layer.

    Where float64 does not hold the squares, the largest value alone is taken to make it up.

    Returns:
        The root mean square, in units of activations; 0 for a layer that saw no values.
    """
    assert summary.values is not None
    seen, squares = int(summary.values.sum()), summary.total(SQUARES)
    if not seen:
        return 0.0
    if bool((squares < LARGEST_SQUARES).all()) or LARGEST_MAGNITUDE.name not in summary.totals:
        return math.sqrt(float(squares.sum()) / seen)
    return float(summary.total(LARGEST_MAGNITUDE).nan_to_num(0).amax()) / math.sqrt(seen)


def exact_at_the_end(
    share: Float[Tensor, " neuron"],
    largest: Float[Tensor, " neuron"],
    limit: float,
    values: Int[Tensor, " neuron"],
) -> Float[Tensor, " neuron"]:
    """Return shares that are 1 only for neurons that never fire: sampled positions may miss the one where they do."""
    seldom = torch.minimum(share, 1 - 1 / values.clamp_min(2).double())
    dead = torch.where(largest <= limit, torch.ones_like(share), seldom)
    return torch.where(values > 0, dead, torch.full_like(share, math.nan))


def refuse_unless_rectified(traits: LayerTraits) -> str | None:
    """Return the reason to refuse a layer without a rectifier, as APoZ counts exact zeros; else None."""
    if traits.rectified:
        return None
    function = f"{traits.activation} makes" if traits.activation else "no activation function makes"
    return f"APoZ counts exact zeros and {function} none in {traits.name!r}; use 'near_zero' or 'constant'"


def zero_share(summary: Summary) -> Float[Tensor, " neuron"]:
    """Return the share of values that are zero, where none is negative."""
    return 1 - summary.per_value(POSITIVE)


APOZ = Criterion(
    "apoz",
    (POSITIVE,),
    zero_share,
    "deadness",
    refuse_unless_rectified,
)
"""Average percentage of zeros, Hu et al. 2016 (arXiv:1607.03250), as a share."""


def dormant(tau: float = 0.025) -> Criterion:
    """Make the criterion that is 1 for tau-dormant neurons: dormant score at most ``tau`` (inclusive), else 0.

    Source: Sokar et al. 2023, definition 3.1 (arXiv:2302.12902). All neurons of a silent layer are dormant.

    Returns:
        A criterion of deadness that needs mean magnitudes alone.

    Raises:
        ArgumentError: If ``tau`` is negative or not finite.
    """
    check_threshold(tau, "tau")
    return Criterion("dormant", (MAGNITUDE,), partial(is_dormant, tau=tau), "deadness")


def is_dormant(summary: Summary, *, tau: float) -> Float[Tensor, " neuron"]:
    """Compute the score of ``dormant``.

    Returns:
        1 for dormant neurons, 0 for others, NaN for those without a dormant score; float64.
    """
    score = dormant_score(summary)
    return torch.where(score.isnan(), score, (score <= tau).double())


def constant(tolerance: float = CONSTANT_TOLERANCE) -> Criterion:
    """Make the criterion that is 1 if the standard deviation is at most ``tolerance`` of the root mean square, else 0.

    The deadness of smooth activation functions: a constant neuron can be folded into downstream biases. Source:
    variance-based pruning, Berisha et al. 2025 (arXiv:2507.12988); *post*-activation variance.

    Returns:
        A criterion of deadness that needs sums and sums of squares of activations.

    Raises:
        ArgumentError: If ``tolerance`` is negative or not finite.
    """
    check_threshold(tolerance, "tolerance")
    return Criterion("constant", (TOTAL, SQUARES), partial(is_constant, tolerance=tolerance), "deadness")


def is_constant(summary: Summary, *, tolerance: float) -> Float[Tensor, " neuron"]:
    """Compute the score of ``constant``.

    Returns:
        1 for constant neurons, 0 for others, NaN for those without a variance; float64.
    """
    spread = variance(summary)
    still = spread <= tolerance**2 * summary.per_value(SQUARES)
    return torch.where(spread.isnan(), spread, still.double())


def near_bound(view: LayerView) -> Float[Tensor, "batch neuron"]:
    """Count values within 0.05 of either bound of the activation function.

    Returns:
        Counts over space, in the type of the activations.
    """
    assert view.bounds is not None, "other layers are refused"
    low, high = view.bounds
    a = view.activation
    return ((a < low + SATURATION_MARGIN) | (a > high - SATURATION_MARGIN)).to(a.dtype).sum(-1)


NEAR_BOUND = Statistic("near_bound", near_bound)


def refuse_unless_bounded(traits: LayerTraits) -> str | None:
    """Return the reason to refuse a layer whose activation function has no two bounds, or None."""
    if traits.bounds is not None:
        return None
    return f"{traits.name!r} does not end in a sigmoid- or tanh-like function; use 'near_zero' or 'constant'"


SATURATED = Criterion(
    "saturated",
    (NEAR_BOUND,),
    partial(mean_over_values, statistic=NEAR_BOUND),
    "deadness",
    refuse_unless_bounded,
)


def never_fired_bound(samples: Int[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
    """Return the 95 % upper bound on the firing rate of a neuron that fired in none of ``samples``: the rule of three.

    Example:
        >>> never_fired_bound(torch.tensor([300]))
        tensor([0.0100], dtype=torch.float64)
    """
    return (3.0 / samples.double()).clamp_max(1.0)
