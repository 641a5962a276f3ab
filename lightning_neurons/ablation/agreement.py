"""Agreement of a cheap criterion with measured ablations, which tells how far it can be trusted.

The measurement is the absolute change of the loss without a neuron. On the samples that the criterion was measured on,
agreement is flattered; on other samples it cannot exceed by much what the measurement agrees with itself between two
halves of the data, which is its reliability.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_neurons.criteria.agreement import agreement


@dataclass(frozen=True)
class OracleAgreement:
    """Spearman correlations over the neurons that have been measured, all layers together.

    Attributes:
        same_data: Of the criterion with the measurement on the same samples.
        held_out: With the measurement on other samples.
        reliability: Of the measurement on one half of the samples with that on the other: the ceiling of ``held_out``.
        neurons: Number of neurons that were compared.
    """

    same_data: float
    held_out: float
    reliability: float
    neurons: int


def oracle_agreement(
    scores: Mapping[str, Tensor], measured: Mapping[str, Tensor], held_out: Mapping[str, Tensor]
) -> OracleAgreement:
    """Compare a criterion with ablations.

    Args:
        scores: By layer, the criterion on one half of the samples.
        measured: By layer, the change of the loss on that half; NaN where a neuron was not measured.
        held_out: The same on the other half.

    Returns:
        Rank correlations over the neurons that have a score and were measured on both halves.

    Example:
        >>> score = {"fc": torch.tensor([1.0, 2.0, 3.0])}
        >>> oracle_agreement(score, {"fc": torch.tensor([0.1, -0.3, 0.5])}, {"fc": torch.tensor([0.2, 0.1, 0.3])})
        OracleAgreement(same_data=1.0, held_out=0.5, reliability=0.5, neurons=3)
    """
    layers = [name for name in measured if name in scores and name in held_out]
    columns = [
        torch.cat([of[name].double().cpu() for name in layers] or [torch.zeros(0)])
        for of in (scores, measured, held_out)
    ]
    score, first, second = columns[0], columns[1].abs(), columns[2].abs()
    known = ~(score.isnan() | first.isnan() | second.isnan())
    score, first, second = score[known], first[known], second[known]

    def correlation(a: Tensor, b: Tensor) -> float:
        return round(agreement(a, b).spearman, 12)

    return OracleAgreement(
        correlation(score, first), correlation(score, second), correlation(first, second), int(known.sum())
    )
