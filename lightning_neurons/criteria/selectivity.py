"""Class selectivity of neurons, and overlap of classes' neurons.

Selectivity describes; it does not say what matters. Morcos et al. 2018 found that it hardly predicts the effect of an
ablation, and Leavitt and Morcos 2020 that training against it costs no accuracy.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor


def class_selectivity(activity: Float[Tensor, "klass neuron"]) -> Float[Tensor, " neuron"]:
    """Compute the class selectivity index of each neuron, in [0, 1] (Morcos et al. 2018, arXiv:1803.06959).

    ``(highest - rest) / (highest + rest)`` of the mean activity for the class that excites the neuron the most and the
    mean over the other classes. 0: all alike; 1: one class only; NaN: dead.

    Args:
        activity: Mean activity of each neuron for each class, not negative; NaN for classes without samples.

    Returns:
        ``(neuron,)`` in [0, 1], float64; NaN for dead neurons and where fewer than two classes have samples.

    Example:
        >>> class_selectivity(torch.tensor([[4.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])).tolist()
        [0.6, 0.0]
    """
    measured = activity[~activity.isnan().all(1)].double()
    if len(measured) < 2:
        return torch.full(activity.shape[1:], torch.nan, dtype=torch.float64)
    highest = measured.amax(0)
    rest = (measured.sum(0) - highest) / (len(measured) - 1)
    return torch.where(highest > 0, (highest - rest) / (highest + rest), torch.nan)


def class_entropy(importance: Float[Tensor, "klass neuron"]) -> Float[Tensor, " neuron"]:
    """Compute the entropy of each neuron's importance over classes, relative to the highest possible.

    Importance below 0 counts as 0; a neuron without any has no entropy (NaN).

    Returns:
        Entropies in [0, 1], float64: 1 serves all classes alike, 0 serves one; NaN for a neuron without any
        importance, and for all if fewer than two classes have samples.

    Example:
        >>> class_entropy(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist()
        [1.0, 0.0]
    """
    measured = importance[~importance.isnan().all(1)].double().clamp_min(0)
    if len(measured) < 2:
        return torch.full(importance.shape[1:], torch.nan, dtype=torch.float64)
    shares = measured / measured.sum(0)
    scale = torch.log(torch.tensor(float(len(measured)), dtype=torch.float64))
    entropy: Tensor = -torch.special.xlogy(shares, shares).sum(0)
    return (entropy / scale).abs()


def reuse(members: Mapping[str, Bool[Tensor, "klass neuron"]]) -> tuple[Tensor, Tensor]:
    """Compute the Jaccard index between the neuron sets of every two classes, and that of sets drawn at random.

    Random sets have the same sizes in each layer. How many neurons of a layer two of them share follows the
    hypergeometric distribution; over layers those are added, and the mean of the index is taken over the sum. For one
    wide layer and sets of a share ``p`` each, that is about ``p / (2 - p)``.

    Args:
        members: By layer, masks of the neurons that belong to each class.

    Returns:
        Observed and chance, ``(class, class)`` each.

    Example:
        >>> observed, chance = reuse({"fc": torch.tensor([[True, True, False, False], [True, False, True, False]])})
        >>> round(observed[0, 1].item(), 3), round(chance[0, 1].item(), 3)
        (0.333, 0.389)
    """
    layers = [m.double() for m in members.values()]
    both = torch.stack([m @ m.t() for m in layers]).sum(0)
    sizes = torch.stack([m.sum(1) for m in layers]).sum(0)
    widths = tuple(m.shape[1] for m in members.values())
    counts = list(zip(*(m.sum(1).tolist() for m in members.values()), strict=True))
    chance = [[_expected(*sorted((own, other)), widths) for other in counts] for own in counts]
    return both / (sizes[:, None] + sizes[None, :] - both), torch.tensor(chance, dtype=torch.float64)


@lru_cache(maxsize=2**16)
def _shared_in_layer(size: int, other: int, width: int) -> Any:
    """Return the distribution of the number of neurons that two random sets of a layer share."""
    return stats.hypergeom.pmf(np.arange(min(size, other) + 1), width, size, other)


@lru_cache(maxsize=2**16)
def _expected(first: tuple[int, ...], second: tuple[int, ...], widths: tuple[int, ...]) -> float:
    """Return the mean Jaccard index of random sets with so many neurons in each layer; NaN of two empty ones."""
    shared = np.ones(1)
    for size, other, width in zip(first, second, widths, strict=True):
        shared = np.convolve(shared, _shared_in_layer(size, other, width))
    total = sum(first) + sum(second)
    if not total:
        return float("nan")
    common = np.arange(len(shared))
    return float((shared * common / (total - common)).sum())


def shared_by(members: Mapping[str, Bool[Tensor, "klass neuron"]]) -> Int[Tensor, " count"]:
    """Count the neurons that belong to 0, 1, 2, ... classes.

    Returns:
        Counts over the neurons of all layers, one more than there are classes.

    Example:
        >>> shared_by({"fc": torch.tensor([[True, True, False], [True, False, False]])}).tolist()
        [1, 1, 1]
    """
    counts = torch.cat([m.sum(0) for m in members.values()])
    classes = len(next(iter(members.values())))
    return torch.bincount(counts, minlength=classes + 1)
