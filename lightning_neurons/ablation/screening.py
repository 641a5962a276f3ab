"""Ablations of the neurons that a cheap criterion finds the most and the least important, on two halves of the data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.ablation.ablate import measure_batches
from lightning_neurons.ablation.agreement import OracleAgreement, oracle_agreement
from lightning_neurons.ablation.engine import WhatIf
from lightning_neurons.ablation.sums import AblationSums
from lightning_neurons.criteria import Criterion
from lightning_neurons.criteria.deadness import SILENT
from lightning_neurons.criteria.ranking import order
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
    study = WhatIf(model, loss_fn, loss_reduction=loss_reduction, replacement=replacement)
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
        found = report.scores or report.deadness_by
        scores = found[criterion.name]
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


def _studied(study: WhatIf, layers: Sequence[Pattern] | None) -> list[str]:
    """Return the layers that take part."""
    if layers is None:
        return [name for name, layer in study.layers.items() if not layer.output]
    found = [name for name in candidates(study.model, layers) if name in study.layers]
    if not found:
        raise MeasurementError("none of the layers runs as a module")
    return found


def _both_ends(scores: Mapping[str, Tensor], ends: int | None) -> dict[str, list[int]]:
    """Return the neurons at both ends of the ranking over all layers."""
    pairs = [(name, i) for name, values in scores.items() for i in range(len(values))]
    ranked = order(torch.cat([values.double().cpu() for values in scores.values()])).tolist()
    chosen = ranked if ends is None or 2 * ends >= len(ranked) else [*ranked[:ends], *ranked[-ends:]]
    found: dict[str, list[int]] = {}
    for place in sorted(chosen):
        found.setdefault(pairs[place][0], []).append(pairs[place][1])
    return found
