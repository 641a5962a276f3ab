"""Ranking and selection of neurons by scores, and the agreement of two rankings.

Orders are from most to least important. Ties keep the order of the neurons; NaN (not measured) comes last.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from lightning_neurons.errors import ArgumentError, check_choice, check_count, check_share, is_number

Normalization = Literal["none", "sum", "l2"]


def order(scores: Float[Tensor, " neuron"]) -> Int[Tensor, " neuron"]:
    """Return indices from the most to the least important neuron; stable, NaN last.

    Example:
        >>> order(torch.tensor([0.1, float("nan"), 0.7, 0.1])).tolist()
        [2, 0, 3, 1]
    """
    low = torch.where(scores.isnan(), torch.full_like(scores, -torch.inf), scores)
    # Two stable sorts: by score, then measured before unmeasured, so that NaN stays behind a score of -inf.
    first = torch.sort(low, descending=True, stable=True).indices
    return first[torch.sort(scores[first].isnan().int(), stable=True).indices]


def normalize(
    scores: Mapping[str, Tensor], how: Normalization = "none", *, in_loss_units: bool = False
) -> dict[str, Tensor]:
    """Make scores of different layers comparable, for a ranking across layers.

    Args:
        scores: By layer, ``(neuron,)``.
        how: Divide each layer by the sum of its absolute scores, by its L2 norm, or leave it as it is. A layer of
            zeros stays zero. L2 rescues Taylor-2017 and weight norms (Molchanov et al. 2017).
        in_loss_units: Whether scores are comparable already (Fisher and the second-order family); dividing them layer
            by layer then destroys information and draws a warning.

    Returns:
        By layer, ``(neuron,)``: the scaled scores.

    Raises:
        ArgumentError: If ``how`` is unknown.

    Example:
        >>> normalize({"a": torch.tensor([1.0, 3.0])}, "sum")["a"].tolist()
        [0.25, 0.75]
    """
    check_choice("normalize", how, get_args(Normalization))
    if how == "none":
        return dict(scores)
    if in_loss_units and len(scores) > 1:
        warnings.warn(
            f"normalize={how!r}: these scores are in units of the loss and comparable across layers as they are; "
            "dividing them layer by layer makes the global ranking worse. Use normalize='none'.",
            stacklevel=2,
        )
    power = 1 if how == "sum" else 2
    sizes = {n: torch.linalg.vector_norm(torch.nan_to_num(s), power) for n, s in scores.items()}
    return {n: s / sizes[n] if sizes[n] > 0 else s for n, s in scores.items()}


def select(
    scores: Float[Tensor, " neuron"],
    *,
    share: float | None = None,
    count: int | None = None,
    threshold: float | None = None,
    cumulative: float | None = None,
) -> Bool[Tensor, " neuron"]:
    """Return a mask of the important neurons, by exactly one rule. NaN is never chosen.

    Args:
        scores: Higher is more important.
        share: The top share, in [0, 1]; rounded to the nearest whole neuron, at least one unless 0.
        count: The top ``count``.
        threshold: Scores of at least this.
        cumulative: The smallest top set that holds this share of the layer's importance (needs scores >= 0).

    Returns:
        ``(neuron,)``, True for the chosen ones.

    Raises:
        ArgumentError: If not exactly one rule is given, or it is out of range.

    Example:
        >>> select(torch.tensor([5.0, 1.0, 3.0, 1.0]), cumulative=0.8).tolist()
        [True, False, True, False]
    """
    rules = {"share": share, "count": count, "threshold": threshold, "cumulative": cumulative}
    used = {name: value for name, value in rules.items() if value is not None}
    if len(used) != 1:
        raise ArgumentError.of("select", used, f"exactly one of {', '.join(rules)}")
    measured = ~scores.isnan()
    if threshold is not None:
        if not is_number(threshold) or math.isnan(threshold):
            raise ArgumentError.of("threshold", threshold, "a number")
        return measured & (scores >= threshold)
    keep = _how_many(scores[measured], share, count, cumulative)
    chosen = torch.zeros_like(measured)
    chosen[order(scores)[:keep]] = True
    return chosen


def _how_many(scores: Tensor, share: float | None, count: int | None, cumulative: float | None) -> int:
    if count is not None:
        return min(check_count("count", count, least=0), scores.numel())
    if share is not None:
        check_share("share", share)
        return max(round(share * scores.numel()), 1) if share and scores.numel() else 0
    assert cumulative is not None, "select checked that one rule is given"
    check_share("cumulative", cumulative)
    if (scores < 0).any():
        raise ArgumentError.of("cumulative", cumulative, "scores of at least 0; use share= or count= for signed scores")
    running = scores.double().sort(descending=True).values.cumsum(0)
    if not len(running) or running[-1] == 0 or cumulative == 0:
        return 0
    # Rounding of the running sum must not cost one neuron more.
    return int((running < cumulative * running[-1] * (1 - 1e-12)).sum()) + 1


def effective_number(scores: Float[Tensor, " neuron"]) -> float:
    """Compute the effective number of important neurons: exp of the entropy of |score| / sum.

    The number of neurons if all score alike, 1 if one holds everything, 0 if all score zero. Source: the effective
    rank of Roy and Vetterli 2007, on scores instead of singular values.

    Returns:
        The number of neurons if all score alike, 1 if one holds everything, 0 if all score zero; NaN counts as zero.

    Example:
        >>> round(effective_number(torch.tensor([2.0, 2.0, 0.0])), 6)
        2.0
    """
    size = torch.nan_to_num(scores.double()).abs()
    if not size.sum() > 0:
        return 0.0
    p = size / size.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def share_of_top(scores: Float[Tensor, " neuron"], share: float = 0.1) -> float:
    """Return the part of the layer's importance (sum of |score|) that its top ``share`` of neurons holds.

    Example:
        >>> share_of_top(torch.tensor([8.0, 1.0, 1.0]), 0.3)
        0.8
    """
    size = torch.nan_to_num(scores.double()).abs()
    return float(size[select(size, share=share)].sum() / size.sum()) if size.sum() > 0 else 0.0


@dataclass(frozen=True)
class Agreement:
    """Agreement of two rankings.

    Attributes:
        spearman: Rank correlation in [-1, 1]; ties share their mean rank.
        kendall: Kendall's tau-b in [-1, 1].
        jaccard: Size of the intersection over size of the union of the two top sets, in [0, 1].
    """

    spearman: float
    kendall: float
    jaccard: float


def agreement(first: Float[Tensor, " neuron"], second: Float[Tensor, " _"], *, share: float = 0.1) -> Agreement:
    """Compare two scores of the same neurons. Neurons that either has not measured (NaN) are left out.

    Correlations are NaN where a ranking is constant or fewer than two neurons are left. Random top sets of share ``p``
    reach a Jaccard index of about ``p / (2 - p)``.

    Args:
        first: Scores.
        second: Scores of the same neurons.
        share: The size of the top sets that ``jaccard`` compares.

    Returns:
        Spearman, Kendall and Jaccard of the neurons that both have measured.

    Raises:
        ArgumentError: If the two differ in length or ``share`` is out of range.

    Example:
        >>> agreement(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0]), share=0.3)
        Agreement(spearman=0.5, kendall=0.333..., jaccard=0.0)
    """
    if len(first) != len(second):
        raise ArgumentError.of("second", tuple(second.shape), f"as many scores as first has, {len(first)}")
    both = ~(first.isnan() | second.isnan())
    x, y = first[both].double().cpu(), second[both].double().cpu()
    a, b = select(x, share=share), select(y, share=share)
    union = int((a | b).sum())
    jaccard = int((a & b).sum()) / union if union else math.nan
    return Agreement(*_correlations(x, y), jaccard)


def _correlations(x: Tensor, y: Tensor) -> tuple[float, float]:
    if len(x) < 2 or bool(torch.all(x == x[0])) or bool(torch.all(y == y[0])):
        return math.nan, math.nan
    return float(stats.spearmanr(x, y).statistic), float(stats.kendalltau(x, y).statistic)
