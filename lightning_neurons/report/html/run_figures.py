"""Figures of a whole run, each with a description in words."""

import math

import torch

from lightning_neurons.criteria import agreement
from lightning_neurons.report.figures import history as history_figures
from lightning_neurons.report.figures import measurements as figures
from lightning_neurons.report.html.embed import embedded_figure, new_axes
from lightning_neurons.report.html.parts import Picture
from lightning_neurons.report.html.wording import dead_by_threshold, percent, real
from lightning_neurons.results.ablation_report import AblationReport
from lightning_neurons.results.history import NeuronHistory
from lightning_neurons.results.neuron_report import NeuronReport
from lightning_neurons.results.pruning_history import PruningHistory

_WIDTH = 4.9
"""Width of figures in inches: half of a wide page, so that letters keep their size."""


def threshold_figure(report: NeuronReport) -> Picture:
    """Return the figure of dead neurons at other thresholds."""
    alt = f"Dead neurons of all layers by threshold {dead_by_threshold(report)}."
    axes = figures.deadness_curve(report, axes=new_axes(_WIDTH, 3.3))
    return embedded_figure(axes.figure, alt, "Deadness by threshold")


def layer_comparisons(report: NeuronReport, history: NeuronHistory | None) -> list[Picture]:
    """Return the figures of sensitivity by layer, and of dead neurons by layer over the run."""
    drawn = [_layers(report)] if report.scores else []
    if history is not None and len(history) > 1 and any(history.entries[-1].dead):
        drawn.append(_dead(history))
    return drawn


def _layers(report: NeuronReport) -> Picture:
    means = {n: m for n, s in report.importance().items() if not math.isnan(m := float(s.nanmean()))}
    alt = f"Mean {report.main_criterion} of each of {len(means)} layers"
    if means:
        high, low = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        alt += f": highest in {high} with {real(means[high])}, lowest in {low} with {real(means[low])}"
    axes = figures.sensitivity_by_layer(report, axes=new_axes(_WIDTH, _height(len(report.counts))))
    return embedded_figure(axes.figure, f"{alt}.", "Sensitivity by layer")


def _dead(history: NeuronHistory) -> Picture:
    counts = [sum(map(len, entry.dead.values())) for entry in history.entries]
    alt = (
        f"Dead neurons by layer over {len(counts)} measurements: {counts[0]} in the first, {counts[-1]} in the last, "
        f"at most {max(counts)}."
    )
    axes = history_figures.dead_history(history, axes=new_axes(_WIDTH, _height(len(history.entries[-1].widths))))
    return embedded_figure(axes.figure, alt, "Dead neurons over the run")


def _height(layers: int) -> float:
    """Return the height in inches of a figure with a line for each layer."""
    return min(2 + 0.2 * layers, 14)


def agreement_figure(report: NeuronReport, ablation: AblationReport) -> Picture | None:
    """Return the figure of the main criterion against the measured change of the loss; None if no neuron has both."""
    scores = report.importance()
    pairs = [(scores[n], d) for n, d in ablation.delta_loss.items() if n in scores and len(scores[n]) == len(d)]
    if not pairs:
        return None
    score, delta = (torch.cat([pair[i].double() for pair in pairs]) for i in (0, 1))
    finite = score.isfinite() & delta.isfinite()
    if not finite.any():
        return None
    rank = agreement(score[finite], delta[finite].abs()).spearman
    alt = (
        f"{int(finite.sum())} neurons by {report.main_criterion} and by the measured change of the loss without them; "
        f"Spearman correlation with its size: {real(rank)}."
    )
    axes = figures.agreement_scatter(report, ablation, axes=new_axes(_WIDTH, 4.4))
    return embedded_figure(axes.figure, alt, "Criterion and measurement")


def pruning_figure(pruning: PruningHistory) -> Picture:
    """Return the figure of sizes and the monitored metric after each cut."""
    left = ", ".join(percent(point.macs / max(pruning.macs, 1)) for point in pruning.points)
    alt = f"Progress over {len(pruning.points)} cuts; multiply-accumulate operations left after each: {left}."
    metrics = [point.after for point in pruning.points if point.after is not None]
    if metrics and pruning.monitor:
        alt += f" {pruning.monitor} after the last: {real(metrics[-1])}."
    axes = history_figures.pruning_progress(pruning, axes=new_axes(_WIDTH, 4))
    return embedded_figure(axes.figure, alt, "Progress")
