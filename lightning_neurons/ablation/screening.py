"""Ablations of the neurons that a cheap criterion finds the most and the least important, on two halves of the data.

Their agreement with the criterion tells how far that can be trusted. The measurement is the absolute change of the loss
without a neuron. On the samples that the criterion was measured on, agreement is flattered; on other samples it cannot
exceed by much what the measurement agrees with itself between two halves of the data, which is its reliability.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.ablation.ablate import measure_batches
from lightning_neurons.ablation.engine import AblationEngine
from lightning_neurons.ablation.sums import AblationSums
from lightning_neurons.criteria import Criterion
from lightning_neurons.criteria.deadness import SILENT
from lightning_neurons.criteria.ranking import agreement, order
from lightning_neurons.data.batches import batch_size_of, is_divisible, rows_of
from lightning_neurons.data.joining import form_of, join
from lightning_neurons.errors import MeasurementError
from lightning_neurons.hooks.intervention import Replacement
from lightning_neurons.layers.layer import Pattern, candidates
from lightning_neurons.measurement.losses import LossReduction
from lightning_neurons.measurement.measure import collect
from lightning_neurons.measurement.measurement import Measurement
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.measurement.settings import MeasurementSettings
from lightning_neurons.results.ablation_report import AblationReport
from lightning_neurons.results.neuron_report import NeuronReport


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
    valid = ~(score.isnan() | first.isnan() | second.isnan())
    score, first, second = score[valid], first[valid], second[valid]

    def correlation(a: Tensor, b: Tensor) -> float:
        return round(agreement(a, b).spearman, 12)

    return OracleAgreement(
        correlation(score, first), correlation(score, second), correlation(first, second), int(valid.sum())
    )


_CHUNK = 16
"""Samples to a batch: where losses cannot be told apart by sample, errors are over these."""


@dataclass(frozen=True)
class Screening:
    """Measured ablations, and their agreement with the criterion.

    Attributes:
        ablation: The measurement, on all samples.
        agreement: Of the criterion with the measurement.
        criterion: The criterion's name.
        report: The criterion's scores on the samples that it was measured on.
    """

    ablation: AblationReport
    agreement: OracleAgreement
    criterion: str
    report: NeuronReport


def screen(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFunction,
    criterion: Criterion,
    *,
    run: Callable[[Any, Any], Any],
    loss_reduction: LossReduction = "mean",
    layers: Sequence[Pattern] | None = None,
    ends: int | None = 16,
    replacement: Replacement = "zero",
    may_mix: bool = True,
) -> Screening:
    """Ablate the neurons at both ends of a criterion's ranking. Isolate the model around it, in evaluation mode.

    Args:
        model: The model.
        batches: The data; every second sample is held out from the criterion.
        loss_fn: Returns the loss of the model on a batch.
        criterion: The criterion that ranks the neurons.
        run: Runs the model on a batch where no loss is needed.
        loss_reduction: The reduction of a scalar of ``loss_fn`` over samples.
        layers: None for all but those that make the output; or patterns.
        ends: Number of neurons to measure at each end of the ranking; None measures all.
        replacement: The new activation of a switched-off neuron, as in ``ablate``.
        may_mix: Whether samples may be run in other company than their batch's.

    Returns:
        The ablations on all samples, and the criterion's scores on its half of them.

    Raises:
        MeasurementError: If there are too few samples for two halves, or no layer runs.
    """
    first, second = halves(batches, may_mix=may_mix)
    settings = MeasurementSettings.checked(
        criteria=[criterion], layers=layers, per_class=False, threshold=SILENT, relative_threshold=True,
        normalize="none", inputs="clean", eps=0.0, loss_reduction=loss_reduction,
    )  # fmt: skip
    study = AblationEngine(model, loss_fn, loss_reduction=loss_reduction, replacement=replacement)
    with study.open():
        study.look(first[0])
        chosen = _studied(study, layers)
        if not chosen:
            raise MeasurementError(
                "every layer that runs makes the output; name it in layers= to switch off its neurons"
            )
        device = next((p.device for p in model.parameters()), None)
        measurement = Measurement(model, settings.criteria, layers=chosen, device=device)
        collect(measurement, first, settings, loss_fn, run)
        report = measurement.report(settings={})
        by_criterion = report.scores or report.deadness_by
        scores = by_criterion[criterion.name]
        if criterion.kind == "deadness":
            scores = {name: 1 - values for name, values in scores.items()}
        neurons = _both_ends(scores, ends)
        widths = {name: study.layers[name].neurons for name in neurons}
        if replacement == "mean":
            study.measure_means([*first, *second])
        sums = [AblationSums(neurons, widths, {}) for _ in range(2)]
        for half, total in zip((first, second), sums, strict=True):
            measure_batches(study, half, total)
        deltas = [total.report(settings={}).delta_loss for total in sums]
        sums[0].deltas, sums[0].base = sums[0].deltas + sums[1].deltas, sums[0].base + sums[1].base
        found_agreement = oracle_agreement(scores, *deltas)
        plain = {"replacement": replacement, "criterion": criterion.name, "ends": ends}
        whole = sums[0].report(settings={**plain, "agreement": asdict(found_agreement)}, notes=study.remarks())
        return Screening(whole, found_agreement, criterion.name, report)


def halves(batches: Sequence[Any], *, may_mix: bool = True) -> tuple[list[Any], list[Any]]:
    """Return every second sample, and the others, in small batches; whole batches in turn where they cannot be divided.

    Args:
        batches: The data.
        may_mix: Whether samples may be run in other company than their batch's.

    Returns:
        Two lists of batches.

    Raises:
        MeasurementError: If there are fewer than two samples.
    """
    sizes = [batch_size_of(batch) for batch in batches]
    if not may_mix or not all(is_divisible(b) and form_of(b) == form_of(batches[0]) for b in batches):
        first, second = list(batches[::2]), list(batches[1::2])
    else:
        whole, total = join(batches, sizes), sum(sizes)
        first, second = (
            [rows_of(whole, rows, total) for rows in torch.arange(start, total, 2).split(_CHUNK)] for start in (0, 1)
        )
    if sum(sizes) < 2 or not first or not second:
        raise MeasurementError(f"{sum(sizes)} samples cannot be divided into two halves; raise max_samples")
    return first, second


def _studied(study: AblationEngine, layers: Sequence[Pattern] | None) -> list[str]:
    """Return the layers that take part."""
    if layers is None:
        return [name for name, layer in study.layers.items() if not layer.output]
    chosen = [name for name in candidates(study.model, layers) if name in study.layers]
    if not chosen:
        raise MeasurementError("none of the layers runs as a module")
    return chosen


def _both_ends(scores: Mapping[str, Tensor], ends: int | None) -> dict[str, list[int]]:
    """Return the neurons at both ends of the ranking over all layers."""
    pairs = [(name, i) for name, values in scores.items() for i in range(len(values))]
    ranked = order(torch.cat([values.double().cpu() for values in scores.values()])).tolist()
    chosen = ranked if ends is None or 2 * ends >= len(ranked) else [*ranked[:ends], *ranked[-ends:]]
    by_layer: dict[str, list[int]] = {}
    for place in sorted(chosen):
        by_layer.setdefault(pairs[place][0], []).append(pairs[place][1])
    return by_layer
