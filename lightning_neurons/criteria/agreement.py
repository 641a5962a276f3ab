"""Agreement of two rankings of the same neurons."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from lightning_neurons.criteria.ranking import select
from lightning_neurons.errors import ArgumentError


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
