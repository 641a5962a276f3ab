"""Numbers behind the figures of one measurement."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_neurons.criteria.contract import known_deadness
from lightning_neurons.criteria.deadness import exact_at_the_end
from lightning_neurons.errors import UnknownNameError
from lightning_neurons.metrics.histogram import PARTS, folded, folded_edges, representatives
from lightning_neurons.results.ablation_report import AblationReport
from lightning_neurons.results.neuron_report import LayerCounts, NeuronReport

BAR = math.log10(2) / 4
"""Width of a bar of magnitudes in log10: four to a power of two."""


def layer_counts(report: NeuronReport, layer: str) -> LayerCounts:
    """Return the counts of a layer.

    Raises:
        UnknownNameError: If it was not measured.
    """
    if layer not in report.counts:
        raise UnknownNameError.among("layer", layer, report.counts)
    return report.counts[layer]


def silence_threshold(report: NeuronReport, counts: LayerCounts) -> float:
    """Return the largest magnitude that counts as silent, in activation units; 0 if only zero does, or if unknown."""
    unit = counts.rms if report.settings.get("relative_threshold", True) else 1.0
    return float(report.settings.get("threshold", 0)) * (unit or 0.0)


def magnitude_shares(counts: LayerCounts) -> tuple[float, Any, Any]:
    """Return the share of zeros, and of equally wide bars, lowest used to highest, the left edges (log10) and shares.

    The fine bins, which are not equally wide in logarithms, are cut where bars end.
    """
    bars = folded(counts.histogram, PARTS).double().numpy()
    fine = folded_edges(PARTS).log10().numpy()
    fine = np.append(fine, fine[-1] + BAR)  # what is above all bins
    edges = fine[0] + BAR * np.arange(round((fine[-1] - fine[0]) / BAR) + 1)
    below = np.append(0, bars[1:].cumsum())
    shares = np.diff(np.interp(edges, fine, below)) / bars.sum()
    used = np.flatnonzero(shares > 1e-12)  # more than rounding
    crop = slice(used[0], used[-1] + 1) if len(used) else slice(0)
    return float(bars[0] / bars.sum()), edges[:-1][crop], shares[crop]


def silent_shares(report: NeuronReport, layer: str | None, thresholds: Any) -> Tensor:
    """Compute ``NeuronReport.deadness_at`` at many thresholds, as ``(threshold, neuron)``, without unknown neurons.

    Args:
        report: A measurement.
        layer: None takes the neurons of all layers.
        thresholds: In the units of the report's own threshold.

    Returns:
        Shares of silent values in [0, 1].

    Raises:
        UnknownNameError: If the layer was not measured.
    """
    chosen = list(report.counts.values()) if layer is None else [layer_counts(report, layer)]
    parts = [torch.zeros(len(thresholds), 0, dtype=torch.float64)]
    for counts in chosen:
        if counts.rms is None or counts.largest is None or not counts.histogram.any():
            continue
        limits = thresholds * (counts.rms if report.settings.get("relative_threshold", True) else 1.0)
        inside = torch.searchsorted(representatives(), torch.as_tensor(limits), right=True)
        running = torch.nn.functional.pad(counts.histogram.cumsum(1), (1, 0))[:, inside].T.double()
        shares = running / counts.histogram.sum(1)
        exact = [exact_at_the_end(s, counts.largest, t, counts.values) for s, t in zip(shares, limits, strict=True)]
        deadness = known_deadness(torch.stack(exact), counts.left_out)
        parts.append(deadness[:, ~deadness.isnan().any(0)])
    return torch.cat(parts, dim=1)


def scored_and_measured(
    report: NeuronReport, ablation: AblationReport, criterion: str | None = None
) -> dict[str, Tensor]:
    """Pair scores with the measured change of the loss.

    Returns:
        By layer, scores and magnitudes of the change, ``(2, neuron)``, of the neurons that have both.
    """
    scores, pairs = report.importance(criterion, "none"), {}
    for layer, delta in ablation.delta_loss.items():
        if layer in scores and len(delta) == len(scores[layer]):
            both = torch.stack([scores[layer].double(), delta.double().abs()])
            pairs[layer] = both[:, both.isfinite().all(0)]
    return {layer: both for layer, both in pairs.items() if both.shape[1]}


def is_signal(values: Tensor) -> bool:
    """Return True if a sample is a signal of one or a few rows, not an image: at most 16, and 4 times as many columns.

    Example:
        >>> is_signal(torch.zeros(50)), is_signal(torch.zeros(12, 500)), is_signal(torch.zeros(8, 8))
        (True, True, False)
    """
    return values.ndim < 2 or (values.ndim == 2 and len(values) <= min(16, values.shape[1] // 4))


def finite(values: Tensor) -> Tensor:
    """Return values on the CPU with zero for NaN and infinity, ready to be drawn."""
    return values.detach().cpu().float().nan_to_num(0, 0, 0)


def as_channels(values: Tensor) -> Tensor:
    """Return an image as ``(channel, height, width)``; of ``(channel, depth, height, width)``, the middle slice."""
    while values.ndim > 3:
        values = values[:, values.shape[1] // 2]
    return values if values.ndim == 3 else values[None]


def summed_channels(values: Tensor) -> Tensor:
    """Sum a saliency map over its channels.

    Returns:
        ``(height, width)``, or ``(length,)`` of signals and tokens.
    """
    plain = finite(values)
    return plain.reshape(-1, plain.shape[-1]).sum(0) if is_signal(plain) else as_channels(plain).sum(0)


def tiled(weight: Tensor) -> Tensor:
    """Tile filters ``(out, in, height, width)``, means over ``in``, with gaps of NaN.

    Returns:
        A matrix of about as many filters across as down; a matrix of weights stays as it is.
    """
    if not weight.numel():
        return torch.full((1, 1), torch.nan)
    if weight.ndim < 4:
        return weight if weight.ndim < 3 else weight.mean(1)
    means = torch.stack([as_channels(w).mean(0) for w in weight])
    framed = torch.nn.functional.pad(means, (0, 1, 0, 1), value=torch.nan)
    columns = math.ceil(math.sqrt(len(framed)))
    more = -len(framed) % columns
    framed = torch.cat([framed, framed.new_full((more, *framed.shape[1:]), torch.nan)])
    _, height, width = framed.shape
    grid = framed.view(-1, columns, height, width).transpose(1, 2).reshape(-1, columns * width)
    return grid[:-1, :-1]
